"""A state after more tokens, in place. Knows groups and slots; knows nothing of queries.

B batch, K key/value heads, T tokens, G group size, S slots of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearized.ops.grid import Grid, gather
from linearized.state import GroupState


def fold_(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Take T more tokens into the state, in place; see `reference.fold_`."""
    num_tokens, group = k.shape[2], state.group
    first = state.length % group
    if mask is None and bool((first + num_tokens < group).all()):
        slots = first[:, None] + torch.arange(num_tokens, device=k.device)
        index = slots[:, None, :, None]
        state.keys.scatter_(2, index.expand_as(k), k)
        state.values.scatter_(2, index.expand_as(v), v)
    else:
        _close(state, k, v, mask)
    width = state.tail.shape[3]
    newest = v[..., v.shape[3] - width :]
    count = torch.full_like(state.length, num_tokens) if mask is None else mask.sum(1)
    if state.tail.shape[2] and mask is None:
        num_tail = state.tail.shape[2]
        recent = torch.cat([state.tail[:, :, min(num_tokens, num_tail) :], newest], dim=2)
        state.tail.copy_(recent[:, :, recent.shape[2] - num_tail :])
    elif state.tail.shape[2]:
        placed = Grid.of(num_tokens, 1, mask=mask).place(newest)
        slots = count[:, None] + torch.arange(state.tail.shape[2], device=k.device)
        state.tail.copy_(gather(torch.cat([state.tail, placed], dim=2), slots))
    state.length.add_(count)


def _close(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Add what fills a group to the memory, keep the rest."""
    num_tokens, group = k.shape[2], state.group
    features = state.memory.shape[2]
    if group == 1 and mask is None:  # every token fills one
        _remember(state.memory, k[..., k.shape[3] - features :], v)
        return
    grid = Grid.of(num_tokens, group, length=state.length, mask=mask)
    keys = grid.prepend(grid.place(k), state.keys)  # B K S X
    values = grid.prepend(grid.place(v), state.values)
    count = torch.full_like(state.length, num_tokens) if mask is None else mask.sum(1)
    closed = (state.length % group + count) // group * group  # B, slots
    if bool(closed.any()):
        is_closed = (torch.arange(keys.shape[2], device=k.device) < closed[:, None]).to(keys.dtype)
        _remember(
            state.memory,
            keys[..., keys.shape[3] - features :] * is_closed[:, None, :, None],
            values,
        )
    slots = closed[:, None] + torch.arange(group, device=k.device)  # B G
    there = (slots < keys.shape[2])[:, None, :, None]
    slots = slots.clamp(max=keys.shape[2] - 1)
    state.keys.copy_(gather(keys, slots) * there)
    state.values.copy_(gather(values, slots) * there)


def _remember(memory: Tensor, features: Tensor, values: Tensor) -> None:
    wide = memory.dtype
    memory.add_(features.to(wide).transpose(-1, -2) @ values.to(wide))
