"""Guesses from the target itself, with some of its layers left out."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearized.errors import ModelError
from linearized.models import shortened
from linearized.speculative.drafters.base import Ask, Drafter, check_sizes
from linearized.speculative.drafters.growth import Growth, grow
from linearized.speculative.pool import Pool
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree
from linearized.step import step
from linearized.tree import Tree

FILE = "layers.json"
FORMAT = "linearized-layers/1"


class LayersDrafter(Drafter):
    """Whole layers are skipped (Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding", ICLR
    2025, skips halves of them, too). It reads the target's own states, which hold what the whole
    model made of the text, and so has none of its own and nothing to catch up with. Which layers
    are worth keeping differs from model to model: `jobs.layers` looks for them."""

    def __init__(
        self, layers: Sequence[int], *, depth: int = 4, width: int = 3, floor: float = 0.02
    ) -> None:
        """`layers`: those that are kept, counted from 0."""
        check_sizes(depth=depth, width=width)
        self.layers = tuple(sorted(set(layers)))
        self.depth = depth
        self.width = width
        self.floor = floor
        self._target: tuple[PreTrainedModel, Pool[Text]] | None = None

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> LayersDrafter:
        """With the layers that `jobs.layers` found for the target in this folder.

        Raises:
            ModelError: it found none there.
        """
        path = Path(folder) / FILE
        try:
            found = json.loads(path.read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, expected {FORMAT!r}")
            return cls([int(layer) for layer in found["layers"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"cannot read {path} ({error}); run jobs.layers first") from error

    @property
    def identity(self) -> Hashable:
        return type(self), self.layers, self.depth, self.width, self.floor

    def join(self, model: PreTrainedModel, pool: Pool[Text]) -> None:
        """
        Raises:
            ModelError: the target has no such layers.
        """
        shortened(model, self.layers)
        self._target = model, pool

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        assert self._target is not None, "it drafts for the texts of an engine"
        model, pool = self._target
        by_text = {ask.text: Growth(ask, len(ask.text.tokens) - 1) for ask in asks}
        rows = pool.arrange(list(by_text))
        state = pool.first(len(rows))

        part = shortened(model, self.layers)

        def forward(tree: Tree) -> Tensor:
            return step(part, tree, state).logits

        growths = [by_text[text] for text in rows]
        grow(growths, forward, width=self.width, floor=self.floor, device=model.device)
        return [by_text[ask.text].tree() for ask in asks]
