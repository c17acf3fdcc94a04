"""The nodes of token trees on top of a state. Knows nothing of walks over sequences.

B batch, H query heads, K key/value heads, N tree nodes, X width of queries and keys, U of values,
G group size, M taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.ops.form import Form
from linearized.ops.nodes import Nodes
from linearized.state import GroupState


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    nodes: Nodes,
    state: GroupState,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
) -> Tensor:
    """Outputs [B, H, N, U] of N tree nodes; see `reference.attend_tree`."""
    batch, heads, num_nodes, width = q.shape
    kv_heads, num_features = k.shape[1], form.features
    keys = torch.cat([state.keys, k], dim=2)
    values = torch.cat([state.values, v], dim=2)

    def mixed(weights: Tensor, values: Tensor) -> Tensor:  # [B, H, N, J] of [B, K, J, U]
        rows = weights.reshape(batch, kv_heads, heads // kv_heads * num_nodes, weights.shape[3])
        return (rows @ values).view(batch, heads, num_nodes, -1)

    if form.inside == "slots":
        return _tree_slots(q, keys, values, nodes, state.memory, mixed)
    queries = q.reshape(batch, kv_heads, heads // kv_heads * num_nodes, width)
    features = queries[..., width - num_features :]
    scale = None if alpha is None else alpha[:, None, None]
    inside = width - num_features or width
    shared = inside == width
    local = mixed(queries[..., :inside], keys[..., :inside].transpose(-1, -2))
    across = local
    if num_features and not shared:
        across = mixed(features, keys[..., width - num_features :].transpose(-1, -2))
    weights = _tree_weights(form, local, across, scale, nodes)
    out = mixed(weights, values)
    if num_features:
        read = mixed(features.to(state.memory.dtype), state.memory).to(out.dtype)
        out = out + (read if scale is None else scale * read)
    if taps is not None:
        reach = F.pad(taps, (0, 1))[:, nodes.lags].transpose(0, 1)  # B H N M-1+N
        out = out + mixed(reach, torch.cat([state.tail, v], dim=2))
    return out


def _tree_weights(
    form: Form, local: Tensor, across: Tensor, scale: Tensor | None, nodes: Nodes
) -> Tensor:
    """[B, H, N, G+N]."""
    same, earlier = nodes.same[:, None], nodes.earlier[:, None]
    scaled = across if scale is None else scale * across
    if form.inside == "linear":
        return scaled * (same | earlier)
    if form.inside == "none":
        return scaled * earlier if form.features else torch.zeros_like(local)
    if form.inside == "relu2":
        weights = local.relu().square() * same
    elif form.inside == "laplace":
        weights = torch.erf((local - 0.5**0.5) * (2 * torch.pi) ** 0.5).add(1) / 2 * same
    else:
        lowest = torch.finfo(local.dtype).min
        seen = local.masked_fill(~same, lowest)
        weights = (seen - seen.amax(-1, keepdim=True)).exp() * same
    return weights + scaled * earlier if form.features else weights


def _tree_slots(
    q: Tensor,
    features: Tensor,
    values: Tensor,
    nodes: Nodes,
    memory: Tensor,
    mixed: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    seen = (nodes.same | nodes.earlier)[:, None]
    width = q.shape[3]
    keys, values = values[..., :width], values[..., width:]
    rows = memory.to(q.dtype)
    scores = mixed(q, keys.transpose(-1, -2)) * seen
    picks = mixed(q, rows[..., :width].transpose(-1, -2)) + mixed(scores, features)
    picks = picks.softmax(-1)
    weights = mixed(picks, features.transpose(-1, -2)) * seen
    return mixed(weights, values) + mixed(picks, rows[..., width:])
