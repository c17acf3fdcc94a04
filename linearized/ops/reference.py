"""Linear attention as it is defined, pair by pair. The readable truth: quadratic, any float dtype,
differentiable. Every faster backend is tested against it. (You et al., ICML 2024; the group-exact
tree form is this project's.)

B batch, H query heads, K key/value heads (each serves H/K query heads), T tokens or tree nodes,
X width of queries and keys, U width of values, G group size, M taps. `Form` says what a pair
weighs; the convolution adds w_{h,i} for a token i back; closed groups of the past are in the
state's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearized.ops.form import Form
from linearized.state import GroupState
from linearized.tree import ancestors


def linear_attention(
    q: Tensor,  # [B, H, T, X]
    k: Tensor,  # [B, K, T, X]
    v: Tensor,  # [B, K, T, U]
    *,
    form: Form,
    alpha: Tensor | None,  # [H]; None: 1
    taps: Tensor | None,  # [H, M], column i of lag i; not causal: [H, 2M-1], of lag i - (M-1)
    state: GroupState | None = None,
    mask: Tensor | None = None,  # [B, T], False: no token here
    segments: Tensor | None = None,  # [B, T], a new document begins where the number changes
) -> Tensor:
    """Outputs [B, H, T, U] of T tokens that follow the state's in time. Writes nothing. Where
    `mask` is False there is no token: it takes no position, nobody sees it, its output is zero."""
    rows, num_tokens = q.shape[0], q.shape[2]
    state = empty_state(k, v, form=form, taps=taps) if state is None else state
    everywhere = torch.ones(rows, num_tokens, dtype=torch.bool, device=q.device)
    mask = everywhere if mask is None else mask.bool()
    together = mask[:, None, :].expand(-1, num_tokens, -1)  # B T T
    if segments is not None:
        changes = torch.zeros_like(segments)
        changes[:, 1:] = (segments[:, 1:] != segments[:, :-1]).long()
        documents = changes.cumsum(1)
        together = together & (documents[:, :, None] == documents[:, None, :])
    so_far = together & everywhere.new_ones(num_tokens, num_tokens).tril()
    positions = state.length[:, None] + so_far.sum(-1) - 1
    visible = so_far if form.causal else together
    out = _attend(q, k, v, positions, visible, form=form, alpha=alpha, taps=taps, state=state)
    return out * mask[:, None, :, None]


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parents: Tensor,  # [B, T], -1: child of the last token in the state
    state: GroupState,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
) -> Tensor:
    """Outputs [B, H, T, U] of T tree nodes, each what sequential decoding along its path would
    give, across group boundaries too. Writes nothing."""
    visible = ancestors(parents)
    positions = state.length[:, None] + visible.sum(-1) - 1
    return _attend(q, k, v, positions, visible, form=form, alpha=alpha, taps=taps, state=state)


def fold_(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Take T more tokens (those that `mask` [B, T] keeps) into the state, in place, token by
    token: a group that fills is added to the memory and its slots are cleared."""
    rows, _, num_tokens, width = k.shape
    features, own = width - state.memory.shape[-2], v.shape[-1] - state.tail.shape[-1]
    if mask is None:
        mask = torch.ones(rows, num_tokens, dtype=torch.bool, device=k.device)
    memory, keys, values, tail, length = (x.clone() for x in state.tensors().values())
    slots = torch.arange(state.group, device=k.device)
    for t in range(num_tokens):
        here = mask[:, t]  # B
        slot = (slots == (length % state.group)[:, None]) & here[:, None]  # B G
        slot = slot[:, None, :, None]
        keys = torch.where(slot, k[:, :, t, None].to(keys.dtype), keys)
        values = torch.where(slot, v[:, :, t, None].to(values.dtype), values)
        newest = torch.cat([tail, v[:, :, t, None, own:].to(tail.dtype)], dim=2)[:, :, 1:]
        tail = torch.where(here[:, None, None, None], newest, tail)
        length = length + here
        full = (here & (length % state.group == 0))[:, None, None, None]
        wide = memory.dtype
        added = keys[..., features:].to(wide).transpose(-1, -2) @ values.to(wide)
        memory = torch.where(full, memory + added, memory)
        keys = torch.where(full, 0, keys)
        values = torch.where(full, 0, values)
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
        group=form.group,
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
    num_tokens, group = q.shape[2], form.group
    repeats = q.shape[1] // k.shape[1]
    start = state.length // group * group  # B, first position of the open group
    slots = start[:, None] + torch.arange(group, device=q.device)  # B G
    before = slots[:, None, :] < state.length[:, None, None]
    key_positions = torch.cat([slots, positions], dim=1)[:, None, :]  # B 1 G+T
    seen = torch.cat([before.expand(-1, num_tokens, -1), visible], dim=2)  # B T G+T
    same = seen & (key_positions // group == positions[:, :, None] // group)
    earlier = seen & ~same

    keys = torch.cat([state.keys, k], dim=2).repeat_interleave(repeats, dim=1)
    values = torch.cat([state.values, v], dim=2).repeat_interleave(repeats, dim=1)
    memory = state.memory.repeat_interleave(repeats, dim=1)
    if form.inside == "slots":
        return _slots(q, keys, values, seen, memory)
    num_features, width = form.features, q.shape[3]
    inside = width - num_features if width > num_features else width
    local = q[..., :inside] @ keys[..., :inside].transpose(-1, -2)  # B H T G+T
    scale = q.new_ones(q.shape[1], 1, 1) if alpha is None else alpha[:, None, None]
    features = scale * q[..., width - num_features :]
    across = features @ keys[..., width - num_features :].transpose(-1, -2)
    weights = _inside(form.inside, local, across, same[:, None]) + across * earlier[:, None]
    out = weights @ values + (features.to(memory.dtype) @ memory).to(q.dtype)
    if taps is None:
        return out
    num_tail = state.tail.shape[2]
    tail = state.length[:, None] - num_tail + torch.arange(num_tail, device=q.device)
    value_positions = torch.cat([tail, positions], dim=1)[:, None, :]
    seen = torch.cat([(tail >= 0)[:, None, :].expand(-1, num_tokens, -1), visible], dim=2)
    column = positions[:, :, None] - value_positions  # B T M-1+T
    column = column if form.causal else column + taps.shape[1] // 2
    reached = seen & (column >= 0) & (column < taps.shape[1])
    weights = taps[:, column.clamp(0, taps.shape[1] - 1)].transpose(0, 1) * reached[:, None]
    return out + weights @ torch.cat([state.tail, v], dim=2).repeat_interleave(repeats, dim=1)


def _inside(kind: str, local: Tensor, across: Tensor, same: Tensor) -> Tensor:
    """Weights of the pairs in one group."""
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
    seen = seen[:, None].to(keys.dtype)
    tokens = torch.einsum("bhjr,bhju->bhjru", keys, values)
    memories = torch.einsum("bxtj,bhjru->bhtru", seen, tokens) + memory[:, :, None]
    width = q.shape[3]
    picks = torch.einsum("bhtd,bhtrd->bhtr", q.to(memories.dtype), memories[..., :width])
    answers = torch.einsum("bhtr,bhtru->bhtu", picks.softmax(-1), memories[..., width:])
    return answers.to(q.dtype)
