"""How the nodes of token trees lie to each other and to the state. Knows positions and groups;
knows nothing of keys and values.

B batch, N tree nodes, S slots of a state's near tokens that are looked at, M convolution taps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.near import Near

FEW = 32
"""Up to this many tokens on top of a state go as a tree that is a chain: less to set up."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The same for every layer, so worked out once a pass."""

    positions: Tensor
    """[B, N], in the sequence."""
    near: Tensor
    """[B, N, S+N], does the node see this key, and is it near? Keys in the order slots, nodes; an
    empty slot is seen by nobody."""
    far: Tensor
    """[B, N, S+N], does the node see this key, and is it far?"""
    lags: Tensor
    """[B, N, M-1+N], tokens back to each stored value and each node; M: out of reach."""
    crosses: bool
    """May a node see a key that is far? (True where nobody has looked.)"""

    @classmethod
    def of(
        cls, visible: Tensor, length: Tensor, *, near: Near, taps: int, trim: bool = False
    ) -> Layout:
        """`visible` [B, N, N] as in `tree.Tree`, `length` [B] tokens in the state, `taps` the
        number M (1 without a convolution). S is all slots. With `trim` it is looked at what there
        is: S is no more than what a row has filled, and `crosses` is exact. That spares work, but
        on a GPU looking waits."""
        num_slots = near.slots
        if trim:
            num_slots = near.filled(int((length if near.window else length % near.group).max()))
        positions = length[:, None] + visible.sum(-1) - 1  # B N
        held = near.held(length, num_slots)[:, None]  # B 1 S
        filled = held >= 0
        slots = filled & near.sees(positions[:, :, None], held)
        nodes = visible & near.sees(positions[:, :, None], positions[:, None, :])
        back = torch.arange(taps - 1, 0, -1, device=visible.device)  # of stored values, to length
        to_tail = (positions - length[:, None])[:, :, None] + back
        to_nodes = torch.where(visible, positions[:, :, None] - positions[:, None, :], taps)
        far = torch.cat([filled & ~slots, visible & ~nodes], dim=2)
        return cls(
            positions=positions,
            near=torch.cat([slots, nodes], dim=2),
            far=far,
            crosses=not trim or bool(far.any()),
            lags=torch.cat([to_tail, to_nodes], dim=2).clamp(max=taps),
        )

    @property
    def visible(self) -> Tensor:
        """[B, N, N], is node m an ancestor of node n, or n itself?"""
        num_nodes = self.near.shape[1]
        seen = self.near | self.far
        return seen[:, :, seen.shape[2] - num_nodes :]

    def without_slots(self) -> Layout:
        """The same where only nodes and stored values are looked at."""
        num_nodes = self.near.shape[1]
        near, far = (mask[:, :, mask.shape[2] - num_nodes :] for mask in (self.near, self.far))
        return replace(self, near=near, far=far)

    def at(self, num_slots: int) -> Layout:
        """The same with this many slots, at least S, looked at."""
        num_nodes = self.near.shape[1]
        trimmed = self.near.shape[2] - num_nodes
        if trimmed == num_slots:
            return self

        def wider(mask: Tensor) -> Tensor:
            slots, nodes = mask.split([trimmed, num_nodes], dim=2)
            return torch.cat([F.pad(slots, (0, num_slots - trimmed)), nodes], dim=2)

        return replace(self, near=wider(self.near), far=wider(self.far))
