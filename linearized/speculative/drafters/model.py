"""Guesses from a smaller model with the target's vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearized.models import commit, decoder, extend, verify
from linearized.speculative.drafters.base import Ask, Drafter
from linearized.speculative.pool import Pool
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree
from linearized.state import Pending

CHUNK = 512
"""Tokens read at once."""
TAIL = 16
"""Tokens that a text may have gone on by without being read before its tree is drafted."""


class ModelDrafter(Drafter):
    """Grows its trees by levels: on each, all nodes so far are verified in one forward of the
    draft, and the most probable continuations are added; the best of them all are the tree. So its
    state is not copied, and nothing of a wrong guess has to be undone: what the target accepts is
    committed the next time, from the keys and values that are there already."""

    def __init__(
        self, model: PreTrainedModel, *, depth: int = 8, width: int = 4, floor: float = 0.02
    ) -> None:
        """`model`, linearized or not. `width`: guesses that are followed on each level."""
        self.model = decoder(model)
        self.depth = depth
        self.width = width
        self.least = math.log(floor) if floor > 0 else -math.inf
        """Guesses whose whole path has less log-probability, as the draft sees it, are left out."""
        self._pool: Pool[Text] = Pool(self.model)
        self._read: dict[Text, int] = {}
        """Tokens of each text that are in its state."""
        self._last: tuple[list[_Verified], Pending] | None = None
        """What was verified last, and may be committed."""

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        self._commit()
        for ask in asks:
            self._catch_up(ask.text)
        order = self._pool.arrange([ask.text for ask in asks])
        by_text = {ask.text: _Growth(ask, self._read[ask.text]) for ask in asks}
        self._grow([by_text[text] for text in order])
        return [by_text[ask.text].tree().best(ask.nodes) for ask in asks]

    def forget(self, text: Text) -> None:
        self._commit()
        if text in self._pool:
            self._pool.remove(text)
            del self._read[text]

    def _grow(self, growths: list[_Growth]) -> None:
        """Level by level, until no guess is worth following."""
        for level in range(max(growth.ask.depth for growth in growths)):
            logits, pending = self._verify(growths)
            self._last = (
                [
                    _Verified(growth.ask.text, tuple(growth.tokens), tuple(growth.parents))
                    for growth in growths
                ],
                pending,
            )
            for row, growth in enumerate(growths):
                if level < growth.ask.depth:
                    growth.add(logits[row], min(self.width, growth.ask.nodes), self.least)
            if not any(growth.frontier for growth in growths):
                return

    def _verify(self, growths: list[_Growth]) -> tuple[Tensor, Pending]:
        widest = max(len(growth.tokens) for growth in growths)
        device = self.model.device
        tokens = [[*growth.tokens, *[0] * (widest - len(growth.tokens))] for growth in growths]
        parents = [[*growth.parents, *[-1] * (widest - len(growth.parents))] for growth in growths]
        tree = torch.tensor(tokens, device=device), torch.tensor(parents, device=device)
        return verify(self.model, *tree, self._pool.first(len(growths)))

    def _commit(self) -> None:
        """Of what was verified last, all that the texts have taken up."""
        if self._last is None:
            return
        trees, pending = self._last
        self._last = None
        paths = []
        for tree in trees:
            read = self._read[tree.text]
            path = tree.path(tree.text.tokens[read:-1])  # the last token is the next tree's root
            self._read[tree.text] += len(path)
            paths.append(path)
        self._pool.ahead(max(map(len, paths)))
        commit(self._pool.first(len(trees)), pending, paths)

    def _catch_up(self, text: Text) -> None:
        """Read all but the last few tokens."""
        if text not in self._pool:
            self._pool.add(text)
            self._read[text] = 0
        start, stop = self._read[text], len(text.tokens) - 1
        if stop - start < TAIL:
            return
        self._pool.ahead(stop - start)
        state = self._pool.row(text)
        for begin in range(start, stop, CHUNK):
            ids = text.tokens[begin : min(begin + CHUNK, stop)]
            extend(
                self.model, torch.tensor([ids], device=self.model.device), state, logits_to_keep=1
            )
        self._read[text] = stop


@dataclass(slots=True)
class _Growth:
    """A tree in the making: the tokens that the draft has not read yet, one after the other, and
    guesses behind the last of them."""

    ask: Ask
    num_read: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    guesses: list[float] = field(default_factory=list)
    """Logarithms of the probabilities of the guesses' paths."""
    paths: list[tuple[int, ...]] = field(default_factory=list)
    """Of the guesses."""
    frontier: list[int] = field(default_factory=list)
    """Nodes to go on from; -1: the last token."""
    num_tail: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.ask.text.tokens[self.num_read :]
        self.parents = list(range(-1, len(self.tokens) - 1))
        self.num_tail = len(self.tokens)
        self.frontier = [-1]

    def add(self, logits: Tensor, width: int, least: float) -> None:
        """A level more, from logits [N, V] at the nodes."""
        if not self.frontier:
            return
        text, last = self.ask.text, self.num_tail - 1
        nodes = [last if guess < 0 else self.num_tail + guess for guess in self.frontier]
        paths = [() if guess < 0 else self.paths[guess] for guess in self.frontier]
        likely = [0.0 if guess < 0 else self.guesses[guess] for guess in self.frontier]
        # With the shared noise in them, the scores tell how sure this very guess is.
        scores = text.sampler.scores(logits[nodes], text.tokens, paths).log_softmax(1)
        scores = scores + scores.new_tensor(likely)[:, None]
        best = scores.flatten().topk(min(width, scores.numel()))
        frontier = []
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value < least:
                break
            row, token = divmod(index, scores.shape[1])
            frontier.append(len(self.guesses))
            self.tokens.append(token)
            self.parents.append(nodes[row])
            self.guesses.append(min(value, likely[row]))
            self.paths.append((*paths[row], token))
        self.frontier = frontier

    def tree(self) -> TokenTree:
        parents = tuple(max(parent - self.num_tail, -1) for parent in self.parents[self.num_tail :])
        scores = tuple(math.exp(guess) for guess in self.guesses)
        return TokenTree(tuple(self.tokens[self.num_tail :]), parents, scores)


@dataclass(frozen=True, slots=True)
class _Verified:
    """Nodes that the draft has keys and values of."""

    text: Text
    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def path(self, tokens: Sequence[int]) -> list[int]:
        """That of these tokens, as far as there are nodes for them."""
        children = {
            (p, t): n for n, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        path: list[int] = []
        for token in tokens:
            node = children.get((path[-1] if path else -1, token))
            if node is None:
                break
            path.append(node)
        return path
