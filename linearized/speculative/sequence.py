"""One text in the making, on the target's side: its tokens, its state, its sampling.

Plain and synchronous. Whatever tree it is given, its tokens are those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from linearized.errors import RequestError
from linearized.models import check_decoder, commit, extend, new_state, verify
from linearized.speculative.sampling import Sampling
from linearized.speculative.tree import TokenTree

PREFILL_CHUNK = 512


class Sequence:
    """Call `prefill` until it is True, then `step` until `finished` is set."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Iterable[int],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.model = model
        self.tokens = list(prompt)
        self.num_prompt = len(self.tokens)
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self.finished: str | None = "length" if max_new_tokens == 0 else None
        self.rounds = 0
        """Verifications so far; each gave at least one token."""
        self.drafted = 0
        self.accepted = 0
        check_decoder(model)
        _check(self.tokens, max_new_tokens, model.config.vocab_size)
        self.state = new_state(model)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def prefill(self) -> bool:
        """Fold the next chunk of the prompt. The last token stays out: it is the root of the
        first tree. True when that is all."""
        done = int(self.state.length[0])
        chunk = self.tokens[done : min(done + PREFILL_CHUNK, self.num_prompt - 1)]
        if chunk:
            extend(self.model, self._ids(chunk), self.state, logits_to_keep=1)
        return done + len(chunk) == self.num_prompt - 1

    def step(self, tree: TokenTree = TokenTree.empty) -> list[int]:
        """One round: verify the tree, walk it, commit. Returns the new tokens, one or more. A tree
        with a token outside the vocabulary is left aside: a drafter is not trusted."""
        if any(not 0 <= token < self.model.config.vocab_size for token in tree.tokens):
            tree = TokenTree.empty
        ids = self._ids([self.tokens[-1], *tree.tokens])
        parents = self._ids([-1, *(parent + 1 for parent in tree.parents)])
        logits, pending = verify(self.model, ids, parents, self.state)
        positions = self._positions(tree)
        chosen = self.sampling.scores(logits[0], positions).argmax(1).tolist()
        path, new = tree.walk(chosen)
        commit(self.state, pending, [[0, *(node + 1 for node in path)]])
        self.rounds += 1
        self.drafted += len(tree)
        new = self._until_finished(new)
        self.accepted += min(len(path), len(new))
        self.tokens += new
        return new

    def _positions(self, tree: TokenTree) -> torch.Tensor:
        """Of the token that follows each node, the root first."""
        positions = [len(self.tokens)]
        for parent in tree.parents:
            positions.append(positions[parent + 1] + 1)
        return torch.tensor(positions, device=self.model.device)

    def _until_finished(self, new: list[int]) -> list[int]:
        new = new[: self.num_prompt + self.max_new_tokens - len(self.tokens)]
        for i, token in enumerate(new):
            if token in self.stop_ids:
                self.finished = "stop"
                return new[: i + 1]
        if len(self.tokens) + len(new) == self.num_prompt + self.max_new_tokens:
            self.finished = "length"
        return new

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self.model.device)


def _check(prompt: list[int], max_new_tokens: int, vocab_size: int) -> None:
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    wrong = [token for token in prompt if not 0 <= token < vocab_size]
    if wrong:
        raise RequestError(
            f"token id {wrong[0]} is outside the vocabulary of {vocab_size}", param="prompt"
        )
    if max_new_tokens < 0:
        raise RequestError(
            f"max_new_tokens must be at least 0, got {max_new_tokens}", param="max_tokens"
        )
