"""Where tokens go on the grid of groups, and the walk over a sequence on it. Knows positions,
padding and documents; what pairs weigh is its caller's.

A token's slot is its position less that of the oldest near group's first token, so that slot // G
counts groups; a document begins on a group's first slot. Slots without a token hold zeros, which
weigh nothing. B batch, T tokens, C groups, G group size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized import documents
from linearized.near import Near
from linearized.ops.form import Form
from linearized.ops.reference import unit
from linearized.state import GroupState


def over_grid(
    scan: Callable[..., Tensor],
    chunk: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: GroupState | None,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
    unit_norm: bool,
    mask: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    """`backends.Backend.attend_sequence` by way of `scan` (see `cpu/scan.py`), which walks over
    slots: chunks are groups, or of the size `chunk` where groups make no difference."""
    if unit_norm and state is not None:  # its keys have norm 1 already
        q, k, unit_norm = unit(q), unit(k), False
    length = state.length if state is not None and form.grouped else None
    near = form.near if form.grouped else Near(chunk)
    grid = Grid.of(q.shape[2], near, length=length, mask=mask, segments=segments)
    memory = before = valid = sinks = None
    keys, values = grid.place(k), grid.place(v)
    if state is not None:
        keys = grid.prepend(keys, state.keys, near, length)
        values = grid.prepend(values, state.values, near, length)
        memory = state.memory
        before = grid.before(state.tail) if taps is not None else None
    if near.sinks:
        sinks = (
            grid.sinks(keys, near, None if state is None else state.keys),
            grid.sinks(values, near, None if state is None else state.values),
        )
    if form.inside == "softmax" and not form.causal and grid.slots is not None:
        valid = grid.valid(q.shape[0], q.device)
    out = scan(
        grid.place(q),
        keys,
        values,
        form=form,
        unit_norm=unit_norm,
        alpha=alpha,
        taps=taps,
        memory=memory,
        before=before,
        start=grid.start,
        valid=valid,
        sinks=sinks,
    )
    return grid.take(out)


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout of T tokens a row, and how to go there and back."""

    num_tokens: int
    num_slots: int
    slots: Tensor | None = None
    """[B, T], -1: no token here; None: token t is in slot t."""
    tokens: Tensor | None = None
    """[B, S], of each slot, -1: none."""
    offset: Tensor | None = None
    """[B], tokens that come before these on the grid; None: none."""
    start: Tensor | None = None
    """[B, C], first group of the document that a group belongs to, less than 0 where that began
    before slot 0; None: one document, 0 (or no matter)."""
    whole: bool = False
    """Is there a token in every column?"""

    @classmethod
    def of(
        cls,
        num_tokens: int,
        near: Near,
        *,
        length: Tensor | None = None,  # [B], tokens before these
        mask: Tensor | None = None,  # [B, T]
        segments: Tensor | None = None,  # [B, T]
        look: bool = True,
    ) -> Grid:
        """A token where `mask` is not False; a new document where `segments` changes. With `look`
        it is looked whether any group is open, which spares work where none is, and waits for a
        GPU."""
        group = near.group
        if segments is not None:
            return _of_documents(group, segments, mask)
        offset = start = None
        if length is not None and near.slots > 1:
            offset = length - near.oldest(length)
            if look and not bool((length if near.sinks else offset).any()):
                offset = None
        if mask is None and offset is None:
            return cls(num_tokens, num_tokens)
        if mask is None:
            assert length is not None
            ranks = torch.arange(num_tokens, device=length.device).expand(len(length), -1)
        else:
            ranks = mask.long().cumsum(1) - 1
        slots = ranks
        num_slots = -(-num_tokens // group) * group
        if offset is not None:  # the near tokens come first
            slots = ranks + offset[:, None]
            num_slots = -(-(num_tokens + near.ring - 1) // group) * group
            if length is not None and near.slots > group:
                begins = -(near.oldest(length) // group)
                start = begins[:, None].expand(-1, num_slots // group)
        if mask is not None:
            slots = torch.where(mask.bool(), slots, -1)
        tokens = _inverse(slots, num_slots)
        return cls(num_tokens, num_slots, slots, tokens, offset, start, whole=mask is None)

    def place(self, x: Tensor) -> Tensor:
        """[B, K, T, X] to [B, K, S, X]."""
        if self.slots is None:
            return x
        placed: Tensor = _Move.apply(x, self.tokens, self.slots, False, self.whole)
        return placed

    def prepend(self, placed: Tensor, old: Tensor, near: Near, length: Tensor | None) -> Tensor:
        """Add what a state holds [B, K, slots, X] after `length` tokens, in order of time. It holds
        zeros where the new tokens lie."""
        if self.offset is None:
            return placed
        if near.slots > near.group:
            assert length is not None
            index = torch.arange(near.ring, device=old.device)
            old = gather(old, near.slot(near.oldest(length)[:, None] + index))
        return placed + F.pad(old, (0, 0, 0, placed.shape[2] - old.shape[2]))

    def sinks(self, x: Tensor, near: Near, old: Tensor | None) -> Tensor:
        """[B, K, C or 1, sinks, X], those of each group's document, of what lies on the grid and
        what a state holds."""
        if self.start is None:
            first = x[:, :, : near.sinks]
            return F.pad(first, (0, 0, 0, near.sinks - first.shape[2]))[:, :, None]
        if old is None:
            index = near.group * self.start[:, :, None] + torch.arange(near.sinks, device=x.device)
            index = index.flatten(1).clamp(max=x.shape[2] - 1)
            return gather(x, index).unflatten(2, (-1, near.sinks))
        here = (self.start[:, 0] == 0)[:, None, None, None]
        return torch.where(here, x[:, :, : near.sinks], old[:, :, : near.sinks])[:, :, None]

    def before(self, tail: Tensor) -> Tensor:
        """The M-1 values before slot 0, as far as the new tokens reach, from the last M-1."""
        if self.offset is None:
            return tail
        index = torch.arange(tail.shape[2], device=tail.device) - self.offset[:, None]
        return gather(tail, index.clamp(min=0)) * (index >= 0)[:, None, :, None]

    def valid(self, rows: int, device: torch.device) -> Tensor:
        """[B, S], is there a new token in this slot?"""
        ones = torch.ones(rows, 1, self.num_tokens, 1, device=device)
        return self.place(ones)[:, 0, :, 0] > 0

    def take(self, x: Tensor) -> Tensor:
        """[B, H, S, X] back to [B, H, T, X]; zero where there is no token."""
        if self.slots is None:
            return x
        taken: Tensor = _Move.apply(x, self.slots, self.tokens, self.whole, False)
        return taken


def gather(x: Tensor, slots: Tensor) -> Tensor:
    """[B, K, S, X] at [B, J] slots: [B, K, J, X]."""
    index = slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


class _Move(torch.autograd.Function):
    """[B, K, T, X] to [B, K, S, X], where slot s holds token `there[:, s]`, or zeros if that is -1.
    `back` is the other way round, and the way of the gradient: neither adds anything up. `whole`
    and `whole_back` say that no number is -1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Tensor, back: Tensor, whole: bool, whole_back: bool
    ) -> Tensor:
        ctx.save_for_backward(there, back)
        ctx.whole, ctx.whole_back = whole, whole_back
        batch, heads, num_rows, width = x.shape
        num_found = there.shape[1]
        index = there.clamp(min=0)
        missing = None if whole else there < 0
        if x.transpose(1, 2).is_contiguous():  # as models have them: all heads of a token at once
            index = index + num_rows * torch.arange(batch, device=x.device)[:, None]
            rows = x.transpose(1, 2).view(batch * num_rows, heads * width)
            found = _rows(rows, index, missing).view(batch, num_found, heads, width)
            return found.transpose(1, 2)
        first = num_rows * torch.arange(batch * heads, device=x.device)
        index = index[:, None] + first.view(batch, heads, 1)
        missing = None if missing is None else missing[:, None].expand(-1, heads, -1)
        rows = x.reshape(batch * heads * num_rows, width)
        return _rows(rows, index, missing).view(batch, heads, num_found, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        there, back = ctx.saved_tensors
        moved: Tensor = _Move.apply(grad, back, there, ctx.whole_back, ctx.whole)
        return moved, None, None, None, None


def _rows(x: Tensor, index: Tensor, missing: Tensor | None) -> Tensor:
    """Rows of a matrix, zeros in place of the missing ones."""
    found = x.index_select(0, index.flatten())
    if missing is not None and x.device.type == "cpu":
        found.index_fill_(0, missing.flatten().nonzero()[:, 0], 0)
    elif missing is not None:  # where to count them would wait
        found.masked_fill_(missing.flatten()[:, None], 0)
    return found


def _inverse(slots: Tensor, num_slots: int) -> Tensor:
    """[B, T] slots of tokens to [B, S] tokens of slots."""
    rows, num_tokens = slots.shape
    tokens = slots.new_full((rows, num_slots + 1), -1)
    columns = torch.arange(num_tokens, device=slots.device).expand(rows, -1)
    index = torch.where(slots < 0, num_slots, slots)  # no token: beyond the grid
    return tokens.scatter_(1, index, columns)[:, :-1]


def _of_documents(group: int, segments: Tensor, mask: Tensor | None) -> Grid:
    """Each document on groups of its own. What there is to know is asked for all at once: a GPU is
    waited for once."""
    rows, num_tokens = segments.shape
    kept = torch.ones_like(segments, dtype=torch.bool) if mask is None else mask.bool()
    document = documents.numbers(segments)  # B T
    lengths = torch.zeros_like(segments, dtype=torch.int64)  # B T, of documents
    lengths = lengths.scatter_add(1, document, kept.long())
    groups = (lengths + group - 1) // group
    ends = groups.cumsum(1)
    begins = F.pad(ends[:, :-1], (1, 0))
    starts = F.pad(lengths.cumsum(1)[:, :-1], (1, 0))  # in tokens
    ranks = kept.long().cumsum(1) - 1 - starts.gather(1, document)
    slots = begins.gather(1, document) * group + ranks
    slots = torch.where(kept, slots, -1)
    moved = (slots != torch.arange(num_tokens, device=slots.device)).any()
    facts = torch.stack([ends[:, -1].max(), document.max(), moved.long()])
    num_groups, last, is_moved = facts.tolist()
    if last == 0:
        return Grid.of(num_tokens, Near(group), mask=mask)
    num_groups = max(num_groups, 1)
    columns = torch.arange(num_groups, device=segments.device).expand(rows, -1).contiguous()
    owner = torch.searchsorted(ends, columns, right=True).clamp(max=num_tokens - 1)
    start = begins.gather(1, owner)
    if not is_moved:
        return Grid(num_tokens, num_tokens, start=start, whole=True)
    num_slots = num_groups * group
    tokens = _inverse(slots, num_slots)
    return Grid(num_tokens, num_slots, slots, tokens, start=start, whole=mask is None)
