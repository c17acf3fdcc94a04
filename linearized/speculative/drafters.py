"""Drafters: who guesses how a text goes on. A guess changes the speed and never the text.

All have one method, `propose(tokens, sampling)`, and rebuild whatever they remember from the
token ids they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from linearized.models import extend, new_state, verify
from linearized.speculative.sampling import Sampling
from linearized.speculative.sequence import PREFILL_CHUNK
from linearized.speculative.tree import TokenTree


class Drafter(Protocol):
    def propose(self, tokens: Sequence[int], sampling: Sampling) -> TokenTree:
        """Guess what follows `tokens`, all that there are so far. Usually they extend those of
        the last call; they need not."""
        ...


class ModelDrafter:
    """A smaller linearized model with the target's vocabulary. Its tree grows level by level: on
    each, the `width` likeliest continuations of the level before, all verified in one forward."""

    def __init__(
        self, model: PreTrainedModel, *, depth: int = 2, width: int = 4, floor: float = 0.02
    ) -> None:
        self.model = model
        self.depth = depth
        self.width = width
        self.floor = floor
        """Guesses less probable than this, as the draft sees their whole path, are left out."""
        self._read: list[int] = []
        self._state = new_state(model)

    def propose(self, tokens: Sequence[int], sampling: Sampling) -> TokenTree:
        logits = self._catch_up(list(tokens))
        guesses: list[int] = []
        parents: list[int] = []
        frontier, likely = [-1], torch.zeros(1, device=logits.device)
        for level in range(self.depth):
            positions = torch.full_like(likely, len(tokens) + level, dtype=torch.int64)
            # With the shared noise in them, the scores tell how sure this very guess is.
            paths = likely[:, None] + sampling.scores(logits, positions).log_softmax(1)
            best = paths.flatten().topk(min(self.width, paths.numel()))
            likely = best.values[best.values.exp() >= self.floor]
            if not len(likely):
                break
            flat = best.indices[: len(likely)].tolist()
            parents += [frontier[i // paths.shape[1]] for i in flat]
            frontier = list(range(len(guesses), len(guesses) + len(flat)))
            guesses += [i % paths.shape[1] for i in flat]
            if level + 1 < self.depth:
                logits = self._verify(guesses, parents)[frontier]
        return TokenTree(tuple(guesses), tuple(parents))

    def _verify(self, guesses: list[int], parents: list[int]) -> torch.Tensor:
        device = self.model.device
        tree = torch.tensor([guesses], device=device), torch.tensor([parents], device=device)
        return verify(self.model, *tree, self._state)[0][0]

    def _catch_up(self, tokens: list[int]) -> torch.Tensor:
        """Read what is new; all of it again if the text is another one."""
        read = len(self._read)
        if read >= len(tokens) or tokens[:read] != self._read:
            self._state = new_state(self.model)
            read = 0
        self._read = tokens
        for start in range(read, len(tokens), PREFILL_CHUNK):
            ids = torch.tensor([tokens[start : start + PREFILL_CHUNK]], device=self.model.device)
            logits = extend(self.model, ids, self._state, logits_to_keep=1)[:, -1]
        return logits


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
