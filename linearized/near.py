"""Which keys a query meets one by one, and where a state keeps them. Knows positions; knows nothing
of keys and values.

A query's near keys are those of its own group, of the `window` groups before it, and a document's
first `sinks`; all others are far ones, which it meets summed up in a memory. B batch, G group size,
R = (window + 1)·G slots of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Near:
    """A state keeps position p in slot p if p < sinks, else in slot sinks + p mod R. So nothing
    moves as a text grows: a group that is far from now on makes room for the next one."""

    group: int
    """Tokens of a group, G."""
    window: int = 0
    """Groups before a query's own."""
    sinks: int = 0
    """First tokens of a document; no more than G."""

    @property
    def ring(self) -> int:
        return (self.window + 1) * self.group

    @property
    def slots(self) -> int:
        """Of a state, sinks and ring."""
        return self.sinks + self.ring

    def slot(self, positions: Tensor) -> Tensor:
        """In which slot a state keeps these positions."""
        slots = positions % self.ring
        if not self.sinks:
            return slots
        return torch.where(positions < self.sinks, positions, slots + self.sinks)

    def held(self, length: Tensor, slots: int | None = None) -> Tensor:
        """[B, slots], the position in each of a state's first slots after `length` [B] tokens; -1:
        none."""
        index = torch.arange(self.slots if slots is None else slots, device=length.device)
        last = length[:, None] - 1
        ring = last - (last - index + self.sinks) % self.ring
        oldest = self.oldest(length)[:, None].clamp(min=self.sinks)
        ring = torch.where(ring >= oldest, ring, -1)
        if not self.sinks:
            return ring
        first = torch.where(index <= last, index, -1)
        return torch.where(index < self.sinks, first, ring)

    def oldest(self, positions: Tensor) -> Tensor:
        """The first position of the oldest group that is near to these."""
        groups = positions // self.group
        return (groups - self.window).clamp(min=0) * self.group

    def filled(self, longest: int) -> int:
        """The first so many slots hold whatever states of up to so many tokens hold. (Without a
        window, states of any lengths: pass the largest number of tokens in an open group.)"""
        return min(self.sinks + longest, self.slots)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Is a key near to a query? Of two tensors of positions, a query's no smaller."""
        near = queries // self.group - keys // self.group <= self.window
        return near | (keys < self.sinks) if self.sinks else near
