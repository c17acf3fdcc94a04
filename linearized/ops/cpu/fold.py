"""A state after more tokens, in place. Knows groups and slots; knows nothing of queries.

L layers, B rows, K key/value heads, T tokens, S slots of the grid, M taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearized.ops.grid import Grid, gather
from linearized.state import GroupState


def fold_(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Take T more tokens into the state, in place; see `backends.Backend`. Rows may lie apart from
    each other."""
    layers = state.stacked
    k, v = (x if x.ndim == 5 else x[None] for x in (k, v))
    if k.dtype != state.keys.dtype or v.dtype != state.values.dtype:  # inside autocast
        k, v = k.to(state.keys.dtype), v.to(state.values.dtype)
    num_tokens = k.shape[3]
    if state.length.device.type != "cpu":  # to look who closes a group would wait for a GPU
        _close(layers, k, v, mask, look=False)
        state.length.add_(num_tokens if mask is None else mask.sum(1))
        return
    lengths = state.length.tolist()
    counts = [num_tokens] * len(lengths) if mask is None else mask.sum(1).tolist()
    closing = [
        length % state.group + count >= state.group
        for length, count in zip(lengths, counts, strict=True)
    ]
    if not any(closing):
        _fill(layers, k, v, mask)
    elif all(closing):
        _close(layers, k, v, mask)
    else:
        closes = torch.tensor(closing, device=k.device)
        some = _rows(layers, rows := closes.nonzero()[:, 0])
        _close(some, k[:, rows], v[:, rows], None if mask is None else mask[rows])
        kept = torch.ones(k.shape[1], num_tokens, device=k.device) if mask is None else mask
        _fill(layers, k, v, kept.bool() & ~closes[:, None])
        for name, tensor in some.tensors().items():
            if name != "length":
                getattr(layers, name).index_copy_(1, rows, tensor)
    state.length.add_(num_tokens if mask is None else mask.sum(1))


def _rows(layers: GroupState, rows: Tensor) -> GroupState:
    """Copies."""
    tensors = {n: x[:, rows] for n, x in layers.tensors().items() if n != "length"}
    return layers.having(**tensors, length=layers.length[rows])


def _fill(layers: GroupState, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Put tokens into slots; no group is filled by that."""
    near, length = layers.near, layers.length
    if mask is None and len(length) == 1 and (first := int(length)) >= near.sinks:
        slot, num_tokens = near.sinks + first % near.ring, k.shape[3]
        layers.keys[:, :, :, slot : slot + num_tokens] = k
        layers.values[:, :, :, slot : slot + num_tokens] = v
    elif mask is None:
        slots = near.slot(length[:, None] + torch.arange(k.shape[3], device=k.device))
        index = slots[None, :, None, :, None]
        layers.keys.scatter_(3, index.expand_as(k), k)
        layers.values.scatter_(3, index.expand_as(v), v)
    else:
        rows, columns = mask.nonzero(as_tuple=True)
        slots = near.slot(length[rows] + (mask.long().cumsum(1) - 1)[rows, columns])
        layers.keys[:, rows, :, slots] = k[:, rows, :, columns]
        layers.values[:, rows, :, slots] = v[:, rows, :, columns]
    _slide(layers.tail, v, mask)


def _slide(tail: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """The last M-1 values, after more of them."""
    num_tail, num_tokens = tail.shape[3], v.shape[3]
    if not num_tail:
        return
    newest = v[..., v.shape[4] - tail.shape[4] :]
    if mask is None:
        recent = torch.cat([tail[:, :, :, min(num_tokens, num_tail) :], newest], dim=3)
        tail.copy_(recent[:, :, :, recent.shape[3] - num_tail :])
        return
    kept_first = (~mask.bool()).long().argsort(dim=1, stable=True)  # B T
    last = num_tail + mask.sum(1, keepdim=True)
    slots = last - torch.arange(num_tail, 0, -1, device=v.device)  # B M-1, of the tail and then T
    columns = kept_first.gather(1, (slots - num_tail).clamp(min=0))
    slots = torch.where(slots < num_tail, slots, num_tail + columns)
    index = slots[None, :, None, :, None].expand_as(tail)
    tail.copy_(torch.cat([tail, newest], dim=3).gather(3, index))


def _close(
    layers: GroupState, k: Tensor, v: Tensor, mask: Tensor | None, look: bool = True
) -> None:
    """Add what becomes far to the memory, keep the rest."""
    num_layers, near, features = k.shape[0], layers.near, layers.memory.shape[3]
    if near.slots == 1 and mask is None:  # every token fills a group
        _remember(layers.memory, k[..., k.shape[4] - features :], v)
        _slide(layers.tail, v, None)
        return
    length = layers.length.repeat(num_layers)
    repeated = None if mask is None else mask.repeat(num_layers, 1)
    grid = Grid.of(k.shape[3], near, length=length, mask=repeated, look=look)
    keys, values = (
        grid.prepend(grid.place(new.flatten(0, 1)), old.flatten(0, 1), near, length)
        for new, old in ((k, layers.keys), (v, layers.values))
    )  # L·B K S X
    count = torch.full_like(length, k.shape[3]) if repeated is None else repeated.sum(1)
    first = near.oldest(length)[:, None]  # the position of slot 0
    index = torch.arange(keys.shape[2], device=k.device)
    leaves = (index < near.oldest(length + count)[:, None] - first) & (index + first >= near.sinks)
    far = keys[..., keys.shape[3] - features :] * leaves[:, None, :, None].to(keys.dtype)
    _remember(layers.memory, far.unflatten(0, k.shape[:2]), values.unflatten(0, k.shape[:2]))
    held = near.held(length + count)
    slots = torch.where(held < 0, keys.shape[2], held - first)  # L·B S
    for line, kept in ((keys, layers.keys), (values, layers.values)):
        there = ((slots >= 0) & (slots < line.shape[2]))[:, None, :, None]
        found = gather(line, slots.clamp(0, line.shape[2] - 1)) * there
        if near.sinks:  # those that came before slot 0 stay
            found = torch.where((slots < 0)[:, None, :, None], kept.flatten(0, 1), found)
        kept.copy_(found.unflatten(0, k.shape[:2]))
    _slide(layers.tail, v, mask)


def _remember(memory: Tensor, features: Tensor, values: Tensor) -> None:
    wide = memory.dtype
    memory.add_(features.to(wide).transpose(-1, -2) @ values.to(wide))
