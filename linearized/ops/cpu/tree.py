"""The nodes of token trees on top of a state. Knows nothing of walks over sequences.

B batch, H query heads, K key/value heads, N tree nodes, X width of queries and keys, U of values,
S slots of near tokens, M taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.ops.form import Form
from linearized.ops.layout import Layout
from linearized.state import GroupState

COPIED = 1 << 16
"""Most numbers of a state's slots that are copied beside the nodes, which saves a product."""


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    state: GroupState,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
) -> Tensor:
    """Outputs [B, H, N, U] of N tree nodes; see `backends.Backend`."""
    batch, heads, num_nodes, width = q.shape
    kv_heads, num_features = k.shape[1], form.features
    rows = heads // kv_heads * num_nodes

    dtype, wide = v.dtype, torch.promote_types(v.dtype, state.memory.dtype)
    if (
        dtype != wide or q.dtype != wide
    ):  # sums of half precision, each rounded, drift apart from a sequence's
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if taps is not None and taps.dtype != wide:
        taps = taps.to(wide)
    num_slots = layout.near.shape[2] - num_nodes
    memory = state.memory.flatten(0, 1)
    queries = q.reshape(batch * kv_heads, rows, width)
    if form.inside == "slots":
        keys = _joined(state.keys[:, :, :num_slots], k)
        values = _joined(state.values[:, :, :num_slots], v)
        out = _slots(queries, keys, values, layout, memory)
        return out.view(batch, heads, num_nodes, -1).to(dtype)
    features = queries[..., width - num_features :]
    if alpha is not None and num_features:
        scaled = q[..., width - num_features :] * alpha[:, None, None]
        features = scaled.reshape(batch * kv_heads, rows, num_features)
    inside = width - num_features or width
    shape = (batch, heads, num_nodes, num_slots + num_nodes)
    parts = _parts(state.keys[:, :, :num_slots], k)
    local = _scores(queries[..., :inside], [part[..., :inside] for part in parts]).view(shape)
    across = None
    if num_features and (form.inside == "linear" or layout.crosses):
        if inside == width:  # the same scores
            across = local if alpha is None else local * alpha[:, None, None]
        else:
            far = [part[..., width - num_features :] for part in parts]
            across = _scores(features, far).view(shape)
    weights = _weights(form, local, across, layout).view(batch * kv_heads, rows, -1)
    out = _products(weights, _parts(state.values[:, :, :num_slots], v))
    if num_features:
        out.baddbmm_(features, memory)
    if taps is not None:
        reach = F.pad(taps, (0, 1))[:, layout.lags].transpose(0, 1)  # B H N M-1+N
        reach = reach.reshape(batch * kv_heads, rows, -1)
        out.baddbmm_(reach, _joined(state.tail, v))
    out = out.view(batch, heads, num_nodes, -1)
    return out if dtype == wide else out.to(dtype)


def _parts(slots: Tensor, nodes: Tensor) -> list[Tensor]:
    """[B·K, S, X] of the state and [B·K, N, X] of the nodes: apart, as there may be many times as
    many slots as nodes, or one after the other where that is little to copy."""
    if slots.numel() <= COPIED:
        return [_joined(slots, nodes)]
    return [slots.flatten(0, 1).to(nodes.dtype), nodes.flatten(0, 1)]


def _scores(queries: Tensor, keys: list[Tensor]) -> Tensor:
    """[B·K, R·N, S+N]."""
    found = [torch.bmm(queries, part.transpose(1, 2)) for part in keys]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _products(weights: Tensor, values: list[Tensor]) -> Tensor:
    """[B·K, R·N, U], of weights [B·K, R·N, S+N]."""
    if len(values) == 1:
        return torch.bmm(weights, values[0])
    slots, nodes = weights.split([part.shape[1] for part in values], dim=2)
    return torch.bmm(nodes, values[1]).baddbmm_(slots, values[0])


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """[B, K, S or M-1, X] of the state and [B, K, N, X] of the nodes, in the wider type."""
    return torch.cat([old, new], dim=2).flatten(0, 1)


def _weights(form: Form, local: Tensor, across: Tensor | None, layout: Layout) -> Tensor:
    """[B, H, N, S+N]; `across` has α in it, and is None where no pair of nodes needs it."""
    near, far = layout.near[:, None], layout.far[:, None]
    if form.inside == "linear":
        assert across is not None
        return across * (near | far)
    if form.inside == "none":
        return torch.zeros_like(local) if across is None else across * far
    if form.inside == "relu2":
        weights = local.relu().square_().mul_(near)
    elif form.inside == "laplace":
        weights = torch.erf((local - 0.5**0.5) * (2 * torch.pi) ** 0.5).add(1) / 2 * near
    else:
        lowest = torch.finfo(local.dtype).min
        seen = local.masked_fill(~near, lowest)
        weights = (seen - seen.amax(-1, keepdim=True)).exp() * near
    return weights if across is None else weights.addcmul_(across, far.to(across.dtype))


def _slots(q: Tensor, features: Tensor, values: Tensor, layout: Layout, memory: Tensor) -> Tensor:
    """Linformer: pick among the memory's rows, and be answered by them."""
    batch, num_nodes, width = len(layout.near), layout.near.shape[1], q.shape[2]
    seen = (layout.near | layout.far)[:, None, None]  # B 1 1 N S+N
    keys, values = values[..., :width], values[..., width:]

    def masked(weights: Tensor) -> Tensor:  # [B·K, R·N, S+N]
        apart = weights.view(batch, -1, weights.shape[1] // num_nodes, *seen.shape[3:])
        return (apart * seen).view(weights.shape)

    scores = masked(q @ keys.transpose(1, 2))
    picks = (q @ memory[..., :width].transpose(1, 2) + scores @ features).softmax(-1)
    weights = masked(picks @ features.transpose(1, 2))
    return weights @ values + picks @ memory[..., width:]
