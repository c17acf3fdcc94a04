"""Grouped linear attention as it is defined, pair by pair. The readable truth: quadratic, any
float dtype, differentiable. Every faster backend has the same three functions and is tested
against these. (You et al., ICML 2024; the group-exact tree form is this project's.)

B batch, H query heads, K key/value heads (each serves H/K query heads), T tokens or tree nodes,
D key width, E value width, G group size, M taps.

With q̂ = q/‖q‖, k̂ = k/‖k‖ and a token at position p in group p // G, the weight of a visible
token j for token t is relu(q̂_t·k̂_j)² in one group, α_h q̂_t·k̂_j if j's group is an earlier
one, plus w_{h,i} if j lies i tokens back; closed groups of the past are in the state's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearized.state import GroupState


def attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, K, T, D]
    v: Tensor,  # [B, K, T, E]
    *,
    alpha: Tensor | None,  # [H]; None: no memory, the group alone
    taps: Tensor | None,  # [H, M], column i the weight of lag i; None: no convolution
    group: int,
    state: GroupState | None = None,
    mask: Tensor | None = None,  # [B, T], False: no token here
) -> Tensor:
    """Outputs [B, H, T, E] of T tokens that follow the state's in time. Writes nothing. Where
    `mask` is False there is no token: it takes no position, nobody sees it, its output is zero."""
    state = empty_state(k, v, group=group, taps=taps) if state is None else state
    mask = (
        torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        if (mask is None)
        else mask.bool()
    )
    positions = state.length[:, None] + mask.cumsum(1) - 1  # B T
    visible = (positions[:, None, :] <= positions[:, :, None]) & mask[:, None, :]  # B T T
    out = _attend(q, k, v, positions, visible, alpha=alpha, taps=taps, group=group, state=state)
    return out * mask[:, None, :, None]


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parents: Tensor,  # [B, T], -1: child of the last token in the state
    state: GroupState,
    *,
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
) -> Tensor:
    """Outputs [B, H, T, E] of T tree nodes, each what sequential decoding along its path would
    give, across group boundaries too. Writes nothing."""
    visible = ancestors(parents)
    positions = state.length[:, None] + visible.sum(-1) - 1
    return _attend(q, k, v, positions, visible, alpha=alpha, taps=taps, group=group, state=state)


def fold(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> GroupState:
    """The state after T more tokens (those that `mask` [B, T] keeps), token by token: a group
    that fills is added to the memory and its slots are cleared. The given state is unchanged."""
    rows, _, num_tokens, _ = k.shape
    if mask is None:
        mask = torch.ones(rows, num_tokens, dtype=torch.bool, device=k.device)
    keys = unit(k)
    slots = torch.arange(state.group, device=k.device)
    for t in range(num_tokens):
        here = mask[:, t]  # B
        slot = (slots == (state.length % state.group)[:, None]) & here[:, None]  # B G
        slot = slot[:, None, :, None]
        open_keys = torch.where(slot, keys[:, :, t, None], state.keys)
        open_values = torch.where(slot, v[:, :, t, None], state.values)
        length = state.length + here
        full = (here & (length % state.group == 0))[:, None, None, None]
        wide = state.memory.dtype
        added = open_keys.to(wide).transpose(-1, -2) @ open_values.to(wide)  # B K D E
        tail = torch.cat([state.tail, v[:, :, t, None]], dim=2)[:, :, 1:]
        state = GroupState(
            memory=torch.where(full, state.memory + added, state.memory),
            keys=torch.where(full, torch.zeros_like(open_keys), open_keys),
            values=torch.where(full, torch.zeros_like(open_values), open_values),
            tail=torch.where(here[:, None, None, None], tail, state.tail),
            length=length,
        )
    return state


def unit(x: Tensor) -> Tensor:
    """x/‖x‖ over the last dimension; a zero vector stays zero, with a finite gradient."""
    squared = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)
    safe = torch.where(squared > 0, squared, torch.ones_like(squared))
    return (x * safe.rsqrt()).to(x.dtype)


def ancestors(parents: Tensor) -> Tensor:
    """[B, N] parents to [B, N, N]: is m an ancestor of n, or n itself?"""
    num_nodes = parents.shape[1]
    nodes = torch.arange(num_nodes, device=parents.device)
    reach = (parents[:, :, None] == nodes) | (nodes[:, None] == nodes)
    for _ in range(max(num_nodes - 1, 1).bit_length()):  # paths of length 1, 2, 4, …
        reach = (reach.float() @ reach.float()) > 0
    return reach


def empty_state(k: Tensor, v: Tensor, *, group: int, taps: Tensor | None) -> GroupState:
    """The state before the first token, for keys and values of these shapes."""
    return GroupState.empty(
        k.shape[0],
        heads=k.shape[1],
        key_width=k.shape[3],
        value_width=v.shape[3],
        group=group,
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
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
    state: GroupState,
) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    q, k = unit(q), unit(k)
    start = state.length // group * group  # B, first position of the open group
    slots = start[:, None] + torch.arange(group, device=q.device)  # B G
    before = slots[:, None, :] < state.length[:, None, None]
    key_positions = torch.cat([slots, positions], dim=1)[:, None, :]  # B 1 G+T
    seen = torch.cat([before.expand(-1, q.shape[2], -1), visible], dim=2)  # B T G+T
    same = seen & (key_positions // group == positions[:, :, None] // group)
    earlier = seen & ~same

    keys = torch.cat([state.keys, k], dim=2).repeat_interleave(repeats, dim=1)
    values = torch.cat([state.values, v], dim=2).repeat_interleave(repeats, dim=1)
    scores = q @ keys.transpose(-1, -2)  # B H T G+T
    weights = scores.relu().square() * same[:, None]
    if alpha is not None:
        weights = weights + alpha[:, None, None] * scores * earlier[:, None]
    out = weights @ values
    if alpha is not None:
        memory = state.memory.repeat_interleave(repeats, dim=1)
        past = (q.to(memory.dtype) @ memory).to(q.dtype)
        out = out + alpha[:, None, None] * past
    if taps is not None:
        num_tail = state.taps - 1
        tail = state.length[:, None] - num_tail + torch.arange(num_tail, device=q.device)
        value_positions = torch.cat([tail, positions], dim=1)[:, None, :]
        lag = positions[:, :, None] - value_positions  # B T M-1+T
        seen = torch.cat([(tail >= 0)[:, None, :].expand(-1, q.shape[2], -1), visible], dim=2)
        inside = seen & (lag >= 0) & (lag < taps.shape[1])
        weights = taps[:, lag.clamp(0, taps.shape[1] - 1)].transpose(0, 1) * inside[:, None]
        values = torch.cat([state.tail, v], dim=2).repeat_interleave(repeats, dim=1)
        out = out + weights @ values
    return out
