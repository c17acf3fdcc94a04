"""What a forward leaves for a state to take in, and what must hold before it does. Knows tensors;
knows nothing of models.

L linearized layers, S softmax layers, B rows, K key/value heads, T tokens, N tree nodes, X key
width, U value width, D and E those of softmax layers, C hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from linearized.errors import StateError
from linearized.state.decode import DecodeState


@dataclass(frozen=True, slots=True)
class Fresh:
    """Keys and values of new tokens, or of tree nodes: what a forward leaves and a state takes
    in."""

    layers: tuple[Tensor, Tensor]
    """Keys [L, B, K, T, X] and values [L, B, K, T, U] of the linearized layers."""
    history: tuple[Tensor, Tensor] | None = None
    """[S, B, K, T, D] and [S, B, K, T, E] of the layers that keep softmax, where there are any."""
    shift: Tensor | None = None
    """[L, B, T, C], where a model shifts channels by a token."""
    backend: str | None = None
    """Who folds them in; None: the library chooses."""

    def rows(self, start: int, stop: int) -> Fresh:
        """Views of some neighbouring rows."""
        return self._map(lambda tensor: tensor[:, start:stop])

    def first(self, count: int) -> Fresh:
        """Views of the first tokens."""
        return self._map(lambda tensor: tensor[:, :, :, :count])

    def at(self, index: Tensor) -> Fresh:
        """Tokens `index` [B, J] of each row."""
        if len(index) == 1 and self.layers[0].numel():
            return self._map(lambda tensor: tensor.index_select(3, index[0]))

        def picked(tensor: Tensor) -> Tensor:
            along = index[None, :, None, :, None]
            return tensor.gather(3, along.expand(*tensor.shape[:3], -1, tensor.shape[4]))

        return self._map(picked)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Fresh:
        """Of tensors [L, B, K, T, ·]."""
        keys, values = map(change, self.layers)
        history, shift = self.history, self.shift
        if history is not None:
            history = (change(history[0]), change(history[1]))
        if shift is not None:
            shift = change(shift[:, :, None])[:, :, 0]
        return Fresh((keys, values), history, shift, self.backend)


@dataclass(frozen=True, slots=True)
class Pending:
    """What verified tree nodes would add to the state that they were verified against: nothing
    yet."""

    fresh: Fresh
    parents: Tensor
    """[B, N], -1: child of the last committed token."""
    stamp: Tensor | None
    """[B], of the state that the nodes were verified against."""
    hidden: Tensor | None = None
    """[B, N, C], of the last layer, where it was asked for."""

    @classmethod
    def of(
        cls, fresh: Fresh, parents: Tensor, state: DecodeState, hidden: Tensor | None = None
    ) -> Pending:
        stamp = None if state.stamp is None else state.stamp.clone()
        return cls(fresh, parents, stamp, hidden)

    def check(self, path: Sequence[Sequence[int]], state: DecodeState) -> None:
        """Raises StateError unless `path` walks down each row's tree from the last committed
        token and the state is what was verified against, or a copy of it."""
        if len(path) != state.batch_size:
            raise StateError(f"one path a row: {state.batch_size} rows, got {len(path)} paths")
        known = self.stamp is not None and state.stamp is not None
        if known and not torch.equal(cast(Tensor, self.stamp), cast(Tensor, state.stamp)):
            raise StateError(
                "these nodes were verified against another state, or this one has moved on since: "
                "verify again before committing"
            )
        for row, (nodes, parents) in enumerate(zip(path, self.parents.tolist(), strict=True)):
            last = -1
            for node in nodes:
                if not 0 <= node < len(parents) or parents[node] != last:
                    raise StateError(
                        f"row {row}: {list(nodes)} is no path from the last committed token down "
                        f"a tree with parents {parents}"
                    )
                last = node
