"""Guesses from a smaller model with the target's vocabulary."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.fold import accept
from linearized.models import context_limit, decoder, extend
from linearized.speculative.chooser import Place
from linearized.speculative.drafters.base import Ask, Drafter, check_sizes
from linearized.speculative.drafters.foresight import Foresight
from linearized.speculative.drafters.growth import Growth, grow, likeliest
from linearized.speculative.pool import Pool
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree
from linearized.state import Fresh
from linearized.step import step
from linearized.tree import Tree

CHUNK = 512
"""Tokens read at once."""
GLANCE = 128
"""Tokens of a text that are read in one step of looking ahead: others need not wait long."""
WIDE = 2
"""Times as many guesses are looked behind where nobody waits."""
TAIL = 16
"""Tokens that a text may have gone on by without being read before its tree is drafted."""


_Looked = tuple[Text, Sequence[int], Sequence[int]]
"""A text, and the tokens and parents of a tree on top of what was read of it."""


class ModelDrafter(Drafter):
    """Grows its trees by levels; the best of all their nodes are the tree. Its state is not copied,
    and nothing of a wrong guess has to be undone: what the target accepts is committed the next
    time, from the keys and values that are there already."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        depth: int = 8,
        width: int = 4,
        floor: float = 0.02,
        num_tokens: int | None = None,
    ) -> None:
        """`model`, linearized or not. `width`: guesses that are followed on each level.
        `num_tokens`: of the tokenizer that it shares with the target, where one of them has rows
        beyond those, to pad its vocabulary; None: both have as many rows."""
        check_sizes(depth=depth, width=width)
        self.model = decoder(model)
        self.depth = depth
        self.width = width
        self.floor = floor
        """Guesses whose whole path is less likely right are left out."""
        self._num_tokens = num_tokens
        self._target_rows = self._limit = (
            self.model.config.vocab_size if num_tokens is None else num_tokens
        )
        self._legible: WeakKeyDictionary[Text, int] = WeakKeyDictionary()
        """How much of each text consists of tokens that it has."""
        self._longest = context_limit(self.model)
        self._pool: Pool[Text] = Pool(self.model)
        self._read: dict[Text, int] = {}
        """Tokens of each text that are in its state."""
        self._last: tuple[list[_Looked], Fresh] | None = None
        """What it has keys and values of, on top of each state, and may be committed."""
        self._given = model

    @property
    def identity(self) -> Hashable:
        return type(self), ref(self._given), self.depth, self.width, self.floor, self._num_tokens

    def join(self, model: PreTrainedModel, pool: Pool[Text]) -> None:
        """
        Raises:
            ConfigError: the target has another vocabulary.
        """
        mine, theirs = self.model.config.vocab_size, model.config.vocab_size
        if self._num_tokens is None and mine != theirs:
            raise ConfigError(
                f"the draft's vocabulary has {mine} tokens, the target's {theirs}; they must share "
                "one tokenizer. If they do, and one is padded, give ModelDrafter its num_tokens"
            )
        if self._num_tokens is not None and self._num_tokens > min(mine, theirs):
            raise ConfigError(
                f"num_tokens is {self._num_tokens}, more than the draft's vocabulary of {mine} or "
                f"the target's of {theirs} has; they must share one tokenizer"
            )
        self._target_rows = theirs
        # As many as the target's at once: programs are compiled for rows of a pool of one size.
        self._pool.grow(pool.num_rows)

    def serves(self, text: Text) -> bool:
        """Not one that has, or whose sampling names, a token that they do not share."""
        known = self._legible.get(text, 0)
        if not known:
            sampling = text.sampling
            named = [*sampling.stop_ids, *(token for token, _ in sampling.logit_bias)]
            if max(named, default=0) >= self._limit:
                return False
        if max(text.tokens[known:], default=0) >= self._limit:
            return False
        self._legible[text] = len(text.tokens)
        return True

    @torch.no_grad()
    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        self._commit()
        known = [ask for ask in asks if self._can_read(ask)]
        if not known:
            return [TokenTree.empty] * len(asks)
        for ask in known:
            while not self._catch_up(ask.text, CHUNK):
                pass
        order = self._pool.arrange([ask.text for ask in known])
        by_text = {ask.text: Growth(ask, self._read[ask.text]) for ask in known}
        self._grow([by_text[text] for text in order])
        trees = {text: growth.tree() for text, growth in by_text.items()}
        return [trees.get(ask.text, TokenTree.empty) for ask in asks]

    @torch.no_grad()
    def foresee(
        self, foresights: Sequence[Foresight], depths: Sequence[int], *, wide: bool = False
    ) -> None:
        """One forward, behind the best guesses of each text. A text of which much has not been read
        is read a little further instead."""
        self._commit()
        fronts: dict[Text, tuple[Foresight, list[int]]] = {}
        for known, depth in zip(foresights, depths, strict=True):
            if self._longest is not None:
                depth = min(depth, self._longest - len(known.text.tokens))
            front = known.frontier(depth, WIDE * self.width if wide else self.width)
            if not front:
                known.close()
            elif self._catch_up(known.text, GLANCE):
                fronts[known.text] = known, front
        if fronts:
            order = self._pool.arrange(list(fronts))
            self._look([fronts[text] for text in order])

    def forget(self, text: Text) -> None:
        try:
            self._commit()
        finally:
            if text in self._pool:
                self._pool.remove(text)
                del self._read[text]

    def _can_read(self, ask: Ask) -> bool:
        """Text and tree, with a table of positions that may be shorter than the target's."""
        return self._longest is None or len(ask.text.tokens) + ask.depth <= self._longest

    def _grow(self, growths: list[Growth]) -> None:
        state = self._pool.first(len(growths))

        def forward(tree: Tree) -> Tensor:
            found = step(self.model, tree, state)
            assert found.fresh is not None
            looked: list[_Looked] = [
                (one.ask.text, tuple(one.tokens), tuple(one.parents)) for one in growths
            ]
            self._last = looked, found.fresh
            return self._of_target(found.logits)

        grow(growths, forward, width=self.width, floor=self.floor, device=self.model.device)

    def _look(self, fronts: Sequence[tuple[Foresight, list[int]]]) -> None:
        looked: list[_Looked] = []
        rows, places = [], []
        for known, front in fronts:
            tail = known.text.tokens[self._read[known.text] :]
            nodes = known.above(front)
            place = {node: len(tail) + i for i, node in enumerate(nodes)} | {-1: len(tail) - 1}
            tokens = (*tail, *(known.tokens[node] for node in nodes))
            behind = (place[known.parents[node]] for node in nodes)
            looked.append((known.text, tokens, (*range(-1, len(tail) - 1), *behind)))
            rows.append([place[node] for node in front])
            places += [Place(known.text, known.path(node)) for node in front]
        tree = Tree.side_by_side(
            [(tokens, parents) for _, tokens, parents in looked], self.model.device
        )
        found = step(self.model, tree, self._pool.first(len(fronts)))
        assert found.fresh is not None
        self._last = looked, found.fresh
        width = found.logits.shape[1]
        flat = [number * width + row for number, own in enumerate(rows) for row in own]
        guesses = iter(likeliest(self._of_target(found.logits), flat, places, self.width))
        for known, front in fronts:
            known.add(front, [next(guesses) for _ in front])

    def _of_target(self, logits: Tensor) -> Tensor:
        """Logits [B, N, V] as the target has them: -inf where there is no token."""
        if self._num_tokens is None:
            return logits
        missing = self._target_rows - self._num_tokens
        return nn.functional.pad(logits[..., : self._num_tokens], (0, missing), value=-math.inf)

    def _commit(self) -> None:
        """Of what was verified last, all that the texts have taken up."""
        if self._last is None:
            return
        read, fresh = self._last
        self._last = None
        texts = [text for text, *_ in read]
        paths = []
        for text, tokens, parents in read:
            tree = TokenTree(tuple(tokens), tuple(parents))
            paths.append(tree.follow(text.tokens[self._read[text] : -1]))  # the last: the next root
        self._pool.ahead(max(map(len, paths)))
        state = self._pool.first(len(texts))
        try:
            accept(state, fresh, paths)
        finally:  # as far as it came
            self._read.update(zip(texts, state.length.tolist(), strict=True))

    def _catch_up(self, text: Text, most: int) -> bool:
        """Read on, so many tokens at most. Says whether all but the last few are read."""
        if text not in self._pool:
            self._pool.add(text)
            self._read[text] = 0
        start, stop = self._read[text], len(text.tokens) - 1
        if stop - start < TAIL:
            return True
        ids = text.tokens[start : min(start + most, stop)]
        self._pool.ahead(len(ids))
        tokens = torch.tensor([ids], device=self.model.device)
        extend(self.model, tokens, self._pool.row(text), logits_to_keep=1)
        self._read[text] += len(ids)
        return self._read[text] == stop
