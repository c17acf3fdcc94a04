"""Drafters: who guesses how a text goes on. A guess changes the speed and never the text.

All have one method, `propose(tokens, sampling)`, and rebuild whatever they remember from the
token ids they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from linearized.models import extend, new_state
from linearized.speculative.sampling import Sampling
from linearized.speculative.sequence import PREFILL_CHUNK
from linearized.speculative.tree import TokenTree


class Drafter(Protocol):
    def propose(self, tokens: Sequence[int], sampling: Sampling) -> TokenTree:
        """Guess what follows `tokens`, all that there are so far. Usually they extend those of
        the last call; they need not."""
        ...


class ModelDrafter:
    """A smaller linearized model with the target's vocabulary. Its tree is a chain of its best
    guesses, each with its next best as leaves beside it, so one forward a level is enough."""

    def __init__(
        self, model: PreTrainedModel, *, depth: int = 4, width: int = 2, floor: float = 0.05
    ) -> None:
        self.model = model
        self.depth = depth
        self.width = width
        self.floor = floor
        """Stop where the chain's probability, as the draft sees it, falls below this."""
        self._read: list[int] = []
        self._state = new_state(model)
        self._scratch = self._state.clone()

    def propose(self, tokens: Sequence[int], sampling: Sampling) -> TokenTree:
        logits = self._catch_up(list(tokens))
        guesses: list[int] = []
        parents: list[int] = []
        last, likely = -1, 1.0
        for level in range(self.depth):
            position = torch.tensor([len(tokens) + level], device=self.model.device)
            best = sampling.scores(logits, position)[0].topk(self.width).indices.tolist()
            parents += [last] * self.width
            last = len(guesses)
            guesses += best
            likely *= float(logits[0].softmax(0)[best[0]])
            if level + 1 == self.depth or likely < self.floor:
                break
            if level == 0:
                self._scratch.copy_(self._state)
            logits = self._extend(best[:1], self._scratch)
        return TokenTree(tuple(guesses), tuple(parents))

    def _catch_up(self, tokens: list[int]) -> torch.Tensor:
        """Read what is new; all of it again if the text is another one."""
        read = len(self._read)
        if read >= len(tokens) or tokens[:read] != self._read:
            self._state = new_state(self.model)
            read = 0
        self._read = tokens
        for start in range(read, len(tokens), PREFILL_CHUNK):
            logits = self._extend(tokens[start : start + PREFILL_CHUNK], self._state)
        return logits

    def _extend(self, tokens: list[int], state: object) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        return extend(self.model, ids, state, logits_to_keep=1)[:, -1]  # type: ignore[arg-type]


class NgramDrafter:
    """Looks up how the text went on the last time its last few tokens occurred in it."""

    def __init__(self, *, depth: int = 6, longest: int = 4, shortest: int = 2) -> None:
        self.depth = depth
        self.sizes = range(longest, shortest - 1, -1)
        self._read: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, tokens: Sequence[int], sampling: Sampling) -> TokenTree:
        tokens = list(tokens)
        self._index(tokens)
        for size in self.sizes:
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                return TokenTree.chain(tokens[start : start + self.depth])
        return TokenTree.empty

    def _index(self, tokens: list[int]) -> None:
        """Remember where each n-gram that something follows was last seen."""
        read = len(self._read)
        if tokens[:read] != self._read:
            self._after.clear()
            read = 0
        for end in range(max(read, 1), len(tokens)):
            for size in self.sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._read = tokens
