"""Linear attention as it is defined, pair by pair. The readable truth: quadratic, any float dtype,
differentiable. Every faster backend is tested against it. (You et al., ICML 2024; the group-exact
tree form is this project's.)

B batch, H query heads, K key/value heads (each serves H/K query heads), T tokens or tree nodes,
X width of queries and keys, U width of values, S slots of a state, M taps. `Form` says what a pair
weighs; the convolution adds w_{h,i} for a token i back; far tokens of the past are in the state's
memory. Sums are in float32 at least, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearized import documents
from linearized.ops.form import Form
from linearized.ops.layout import Layout
from linearized.state import GroupState


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: GroupState | None = None,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
    unit_norm: bool = False,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Outputs [B, H, T, U] of T tokens that follow the state's in time; see `backends.Backend`."""
    if unit_norm:
        q, k = unit(q), unit(k)
    rows, num_tokens = q.shape[0], q.shape[2]
    state = empty_state(k, v, form=form, taps=taps) if state is None else state
    columns = torch.arange(num_tokens, device=q.device)
    so_far = documents.visible(columns, causal=True, mask=mask, segments=segments)
    positions = state.length[:, None] + so_far.sum(-1) - 1
    visible = so_far
    if not form.causal:
        visible = documents.visible(columns, causal=False, mask=mask, segments=segments)
    visible = visible.expand(rows, -1, -1)
    out = _attend(q, k, v, positions, visible, form=form, alpha=alpha, taps=taps, state=state)
    return out if mask is None else out * mask.bool()[:, None, :, None]


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
    """Outputs [B, H, N, U] of N tree nodes; see `backends.Backend`. Of the layout it reads who
    descends from whom and where they stand: groups and lags it works out for itself."""
    positions, visible = layout.positions, layout.visible
    return _attend(q, k, v, positions, visible, form=form, alpha=alpha, taps=taps, state=state)


def fold_(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Take T more tokens into the state, in place, token by token: what becomes far is added to the
    memory and its slots are cleared. See `backends.Backend`."""
    num_tokens, width = k.shape[-2:]
    features, own = width - state.memory.shape[-2], v.shape[-1] - state.tail.shape[-1]
    if mask is None:
        mask = torch.ones(len(state.length), num_tokens, dtype=torch.bool, device=k.device)
    mask = mask.bool()
    near = state.near
    memory, keys, values, tail, length = (x.clone() for x in state.tensors().values())
    slots, held = torch.arange(near.slots, device=k.device), near.held(length)
    for t in range(num_tokens):
        here = mask[:, t]  # B
        slot = (slots == near.slot(length)[:, None]) & here[:, None]  # B S
        held = torch.where(slot, length[:, None], held)
        slot = slot[:, None, :, None]
        keys = torch.where(slot, k[..., t, None, :].to(keys.dtype), keys)
        values = torch.where(slot, v[..., t, None, :].to(values.dtype), values)
        newest = torch.cat([tail, v[..., t, None, own:].to(tail.dtype)], dim=-2)[..., 1:, :]
        tail = torch.where(here[:, None, None, None], newest, tail)
        length = length + here
        leaves = (held >= near.sinks) & (held < near.oldest(length)[:, None])  # B S
        held = torch.where(leaves, -1, held)
        leaves = leaves[:, None, :, None]
        wide = memory.dtype
        far = torch.where(leaves, keys[..., features:], 0).to(wide)
        memory = memory + far.transpose(-1, -2) @ values.to(wide)
        keys = torch.where(leaves, 0, keys)
        values = torch.where(leaves, 0, values)
    for old, new in zip(
        state.tensors().values(), (memory, keys, values, tail, length), strict=True
    ):
        old.copy_(new)


def unit(x: Tensor) -> Tensor:
    """x/‖x‖ over the last dimension; a zero vector stays zero, with a finite gradient."""
    norm = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return (x / torch.where(norm > 0, norm, 1)).to(x.dtype)


def empty_state(k: Tensor, v: Tensor, *, form: Form, taps: Tensor | None) -> GroupState:
    """The state before the first token, for keys and values of these shapes."""
    return GroupState.empty(
        k.shape[0],
        heads=k.shape[1],
        features=form.features,
        key_width=k.shape[3],
        value_width=v.shape[3],
        tail_width=v.shape[3],
        near=form.near,
        taps=1 if taps is None else taps.shape[1],
        dtype=k.dtype,
        device=k.device,
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,  # [B, T]
    visible: Tensor,  # [B, T, T]: does token t see token j?
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
    state: GroupState,
) -> Tensor:
    num_tokens, near = q.shape[2], state.near
    repeats, dtype = q.shape[1] // k.shape[1], v.dtype
    wide = torch.promote_types(q.dtype, state.memory.dtype)
    q, k, v = (x.to(wide) for x in (q, k, v))
    held = near.held(state.length)  # B S
    before = (held >= 0)[:, None, :].expand(-1, num_tokens, -1)
    key_positions = torch.cat([held, positions], dim=1)[:, None, :]  # B 1 S+T
    seen = torch.cat([before, visible], dim=2)  # B T S+T
    is_near = near.sees(positions[:, :, None], key_positions)
    if not form.causal:  # then there is no window, and groups lie on both sides
        is_near = key_positions // near.group == positions[:, :, None] // near.group
    same, far = seen & is_near, seen & ~is_near

    keys = torch.cat([state.keys.to(wide), k], dim=2).repeat_interleave(repeats, dim=1)
    values = torch.cat([state.values.to(wide), v], dim=2).repeat_interleave(repeats, dim=1)
    memory = state.memory.to(wide).repeat_interleave(repeats, dim=1)
    if form.inside == "slots":
        return _slots(q, keys, values, seen, memory).to(dtype)
    num_features, width = form.features, q.shape[3]
    inside = width - num_features if width > num_features else width
    local = q[..., :inside] @ keys[..., :inside].transpose(-1, -2)  # B H T S+T
    scale = q.new_ones(q.shape[1], 1, 1) if alpha is None else alpha.to(wide)[:, None, None]
    features = scale * q[..., width - num_features :]
    across = features @ keys[..., width - num_features :].transpose(-1, -2)
    weights = _inside(form.inside, local, across, same[:, None]) + across * far[:, None]
    out = weights @ values + features @ memory
    if taps is None:
        return out.to(dtype)
    num_tail = state.tail.shape[2]
    tail = state.length[:, None] - num_tail + torch.arange(num_tail, device=q.device)
    value_positions = torch.cat([tail, positions], dim=1)[:, None, :]
    seen = torch.cat([(tail >= 0)[:, None, :].expand(-1, num_tokens, -1), visible], dim=2)
    column = positions[:, :, None] - value_positions  # B T M-1+T
    column = column if form.causal else column + taps.shape[1] // 2
    reached = seen & (column >= 0) & (column < taps.shape[1])
    weights = taps.to(wide)[:, column.clamp(0, taps.shape[1] - 1)].transpose(0, 1)
    weights = weights * reached[:, None]
    line = torch.cat([state.tail.to(wide), v], dim=2).repeat_interleave(repeats, dim=1)
    return (out + weights @ line).to(dtype)


def _inside(kind: str, local: Tensor, across: Tensor, same: Tensor) -> Tensor:
    """Weights of the near pairs."""
    if kind == "none":
        return torch.zeros_like(local)
    if kind == "linear":
        return across * same
    if kind == "relu2":
        return local.relu().square() * same
    if kind == "laplace":
        return torch.erf((local - 0.5**0.5) * (2 * torch.pi) ** 0.5).add(1) / 2 * same
    lowest = torch.finfo(local.dtype).min
    largest = local.masked_fill(~same, lowest).amax(-1, keepdim=True)
    return torch.where(same, local - largest, lowest).exp()


def _slots(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, memory: Tensor) -> Tensor:
    """Linformer's two sums, a memory for every token."""
    seen = seen[:, None].to(keys.dtype)  # B 1 T S+T
    tokens = torch.einsum("bhjr,bhju->bhjru", keys, values)
    memories = torch.einsum("bxtj,bhjru->bhtru", seen, tokens) + memory[:, :, None]
    width = q.shape[3]
    picks = torch.einsum("bhtd,bhtrd->bhtr", q, memories[..., :width])
    answers = torch.einsum("bhtr,bhtru->bhtu", picks.softmax(-1), memories[..., width:])
    return answers
