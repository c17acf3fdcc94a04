"""What one forward carries down to every layer: the state that they read, and what they leave, each
at its slot. Knows slots and tensors; knows no model.

B batch, T tokens or tree nodes, H query heads, K key/value heads, C hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearized import ops
from linearized.attention import softmax_attention
from linearized.errors import ModelError
from linearized.state import DecodeState, Fresh

Pair = tuple[Tensor, Tensor]


@dataclass(slots=True)
class Context:
    """Travels as the keyword argument `linear_context`. Nothing is written to the state."""

    state: DecodeState
    layout: ops.Layout | None = None
    """How the nodes of a tree lie to the state; None: tokens that follow it in time."""
    mask: Tensor | None = None
    """[B, T], False where a row has no token; None: all are there."""
    owner: nn.Module | None = None
    """The module whose hook made this context and folds what it collects."""
    encoding: bool = False
    """The encoder's text is read: cross attention leaves its memories."""
    backend: str | None = None
    """Whom the layers have asked to compute; it folds, too."""
    num_tokens: int = 0
    """T, where the owner is to know it afterwards."""
    linear: dict[int, Pair] = field(default_factory=dict)
    """By slot, keys [B, K, T, X] and values [B, K, T, U] of linearized layers."""
    softmax: dict[int, Pair] = field(default_factory=dict)
    """By slot, those of layers that keep softmax."""
    memories: dict[int, Tensor] = field(default_factory=dict)
    """By slot, what cross attention knows of the other text."""
    shifts: dict[int, Tensor] = field(default_factory=dict)
    """By slot, [B, T, C], what each token hands to the next one, where a model shifts channels."""

    def attend(
        self,
        slot: int,
        attention: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float | None,
        backend: str | None,
    ) -> Tensor:
        """Linear attention of new tokens on top of the state, [B, H, T, E]."""
        out, keys, values = attention(
            q, k, v, scaling=scaling, state=self.state.layer(slot), mask=self.mask,
            layout=self.layout,
        )  # fmt: skip
        self.linear[slot] = keys, values
        self.backend = backend
        return out

    def attend_softmax(self, slot: int, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        """Softmax attention of new tokens on top of the history, [B, H, T, E]."""
        history = self.state.history
        assert history is not None
        self.softmax[slot] = k, v
        return softmax_attention(
            q, k, v, mask=self.mask, layout=self.layout, history=history.layer(slot),
            length=self.state.length, **settings,
        )  # fmt: skip

    def attend_across(
        self,
        slot: int,
        attention: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention to the encoder's text, [B, H, T, E]: to what is known of it, or, while it is
        read, to its tokens."""
        assert self.state.cross is not None
        memory = None if self.encoding else self.state.cross[slot]
        out, self.memories[slot] = attention(q, k, v, scaling=scaling, mask=mask, memory=memory)
        return out

    def shift(self, slot: int, own: Tensor) -> Tensor | None:
        """Leave what each token hands on; [B, C] of the last token before these."""
        self.shifts[slot] = own
        return None if self.state.shift is None else self.state.shift[slot]

    def fresh(self) -> Fresh:
        """What the layers left.

        Raises:
            ModelError: some have left nothing.
        """
        num_linear = self.state.num_layers
        if len(self.linear) < num_linear:
            raise ModelError(
                f"{len(self.linear)} of {num_linear} linear layers found the decode state: the "
                "model hands no keyword arguments down to them, or its attention implementation "
                "was changed after linearizing"
            )
        return Fresh(
            layers=_stacked(self.linear) or (self.state.layers.keys, self.state.layers.values),
            history=_stacked(self.softmax),
            shift=_in_order(self.shifts),
            backend=self.backend,
        )

    def remember(self) -> None:
        """Keep in the state what cross attention has read."""
        memories = _in_order(self.memories)
        assert self.state.cross is not None and memories is not None
        self.state.cross.copy_(memories)
        self.state.written()


def _stacked(pairs: dict[int, Pair]) -> Pair | None:
    if not pairs:
        return None
    keys, values = zip(*(pairs[slot] for slot in sorted(pairs)), strict=True)
    return torch.stack(keys), torch.stack(values)


def _in_order(tensors: dict[int, Tensor]) -> Tensor | None:
    if not tensors:
        return None
    return torch.stack([tensors[slot] for slot in sorted(tensors)])
