"""How the nodes of token trees lie to each other and to the state. Knows positions and groups;
knows nothing of keys and values.

B batch, N tree nodes, G group size, S slots of the open group that are looked at, M convolution
taps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 32
"""Up to this many tokens on top of a state go as a tree that is a chain: less to set up."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The same for every layer, so worked out once a pass."""

    positions: Tensor
    """[B, N], in the sequence."""
    same: Tensor
    """[B, N, S+N], does the node see this key in its own group? Keys in the order open group's
    slots, nodes; an empty slot is seen by nobody."""
    earlier: Tensor
    """[B, N, S+N], does the node see this key in an earlier group?"""
    lags: Tensor
    """[B, N, M-1+N], tokens back to each stored value and each node; M: out of reach."""
    crosses: bool
    """May a node see a key in an earlier group? (True where nobody has looked.)"""

    @classmethod
    def of(
        cls, visible: Tensor, length: Tensor, *, group: int, taps: int, trim: bool = False
    ) -> Layout:
        """`visible` [B, N, N] as in `tree.Tree`, `length` [B] tokens in the state, `taps` the
        number M (1 without a convolution). S is G. With `trim` it is looked at what there is: S is
        no more than what a row has filled, and `crosses` is exact. That spares work, but on a GPU
        looking waits."""
        positions = length[:, None] + visible.sum(-1) - 1  # B N
        groups = positions // group
        num_slots = int((length % group).max()) if trim else group
        slots = torch.arange(num_slots, device=visible.device)
        filled = (slots < (length % group)[:, None])[:, None]  # B 1 G
        here = (groups == (length // group)[:, None])[:, :, None]  # B N 1
        same = visible & (groups[:, :, None] == groups[:, None, :])
        back = torch.arange(taps - 1, 0, -1, device=visible.device)  # of stored values, to length
        to_tail = (positions - length[:, None])[:, :, None] + back
        to_nodes = torch.where(visible, positions[:, :, None] - positions[:, None, :], taps)
        earlier = torch.cat([filled & ~here, visible & ~same], dim=2)
        return cls(
            positions=positions,
            same=torch.cat([filled & here, same], dim=2),
            earlier=earlier,
            crosses=not trim or bool(earlier.any()),
            lags=torch.cat([to_tail, to_nodes], dim=2).clamp(max=taps),
        )

    @property
    def visible(self) -> Tensor:
        """[B, N, N], is node m an ancestor of node n, or n itself?"""
        num_nodes = self.same.shape[1]
        seen = self.same | self.earlier
        return seen[:, :, seen.shape[2] - num_nodes :]

    def at(self, num_slots: int) -> Layout:
        """The same with this many slots, at least S, of the open group looked at."""
        num_nodes = self.same.shape[1]
        trimmed = self.same.shape[2] - num_nodes
        if trimmed == num_slots:
            return self

        def wider(mask: Tensor) -> Tensor:
            slots, nodes = mask.split([trimmed, num_nodes], dim=2)
            return torch.cat([F.pad(slots, (0, num_slots - trimmed)), nodes], dim=2)

        return replace(self, same=wider(self.same), earlier=wider(self.earlier))
