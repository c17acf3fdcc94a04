"""What linear attention remembers: a memory of far tokens, the near ones, the last values.
Knows tensors; knows nothing of tokens.

L linearized layers, B rows (one sequence each), K key/value heads, F width of the features that go
into the memory, X key width (of which the last F columns are the features), U value width, E width
of a head's own values (the last E columns of the U), S slots of near tokens, M convolution taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearized.near import Near


@dataclass(frozen=True, slots=True)
class GroupState:
    """What linear attention remembers of the tokens so far, for one layer ([B, …]) or for all
    of them stacked ([L, B, …]). Slots that hold no token are zero, and so weigh nothing."""

    memory: Tensor
    """[…, K, F, U], Σ φ(k) vᵀ over far tokens; float32 at least."""
    keys: Tensor
    """[…, K, S, X], of near tokens, each in the slot that `near` says."""
    values: Tensor
    """[…, K, S, U], of near tokens."""
    tail: Tensor
    """[…, K, M-1, E], the last values in order of time, for the convolution."""
    length: Tensor
    """[B], int64, tokens folded in so far."""
    near: Near

    @classmethod
    def empty(
        cls,
        *leading: int,
        heads: int,
        features: int,
        key_width: int,
        value_width: int,
        tail_width: int,
        near: Near,
        taps: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> GroupState:
        """Zeros; `leading` is (B,) or (L, B)."""

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*leading, heads, *shape, dtype=of, device=device)

        return cls(
            memory=zeros(features, value_width, of=torch.promote_types(dtype, torch.float32)),
            keys=zeros(near.slots, key_width),
            values=zeros(near.slots, value_width),
            tail=zeros(taps - 1, tail_width),
            length=torch.zeros(leading[-1], dtype=torch.int64, device=device),
            near=near,
        )

    @classmethod
    def none(
        cls, rows: int, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> GroupState:
        """Of a model without linear layers: lengths."""
        return cls.empty(
            0, rows, heads=1, features=0, key_width=0, value_width=0, tail_width=0,
            near=Near(1), taps=1, dtype=dtype, device=device,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.near.group

    @property
    def taps(self) -> int:
        return self.tail.shape[-2] + 1

    @property
    def stacked(self) -> GroupState:
        """This state as [L, B, …], views of the same tensors: of one layer, if it is one's."""
        if self.memory.ndim == 5:
            return self
        memory, keys, values, tail = self.memory, self.keys, self.values, self.tail
        return self.having(
            memory=memory[None], keys=keys[None], values=values[None], tail=tail[None]
        )

    def tensors(self) -> dict[str, Tensor]:
        return {
            "memory": self.memory,
            "keys": self.keys,
            "values": self.values,
            "tail": self.tail,
            "length": self.length,
        }

    def having(self, **tensors: Tensor) -> GroupState:
        """The same with these tensors in place of its own."""
        return GroupState(**{**self.tensors(), **tensors}, near=self.near)

    def clone(self) -> GroupState:
        return self.having(**{name: tensor.clone() for name, tensor in self.tensors().items()})
