"""A drafter at work: what it is asked for, what of it is worth verifying, and who learns from what
became of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from linearized.speculative.costs import Clock
from linearized.speculative.drafters.base import Ask, Drafter
from linearized.speculative.planner import Planner
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree


class Draft:
    """A tree, the larger one that it was cut out of, and who is to hear what became of them."""

    def __init__(
        self,
        tree: TokenTree = TokenTree.empty,
        whole: TokenTree = TokenTree.empty,
        planner: Planner | None = None,
        depth: int = 0,
    ) -> None:
        self.tree = tree
        self._whole = whole
        self._planner = planner
        self.depth = depth

    def observe(self, text: Text, new: Sequence[int]) -> None:
        if self._planner is not None and self.depth:
            self._planner.observe(text, self._whole, new, self.depth)


class Drafting:
    """A drafter, and what is known of it."""

    def __init__(self, drafter: Drafter, max_nodes: int) -> None:
        self._drafter = drafter
        self._max_nodes = max_nodes
        self._planner: Planner | None = None

    def plan(self, clock: Clock) -> None:
        self._planner = Planner(clock, max_depth=self._drafter.depth, max_nodes=self._max_nodes)

    def draft(self, texts: list[Text], batch: int) -> list[Draft]:
        """For these texts, in a round of `batch` of them."""
        planner, depth = self._planner, self._drafter.depth
        if not any(_guessable(text) for text in texts):  # a try without a text would tell nothing
            return [Draft() for _ in texts]
        if planner is not None:
            depth = planner.depth(texts, batch)
        ends = ((text, min(depth, _guessable(text))) for text in texts)
        asks = [Ask(text, end, self._max_nodes) for text, end in ends if end]
        if not asks:
            return [Draft() for _ in texts]
        if planner is not None:
            follow = planner.follow(len(asks))
            asks = [replace(ask, follow=follow, trust=planner.trust(ask.text)) for ask in asks]
        began = time.perf_counter()
        wholes = trees = self._drafter.propose(asks)
        if planner is not None:
            seconds = time.perf_counter() - began
            levels = max(max(tree.depths, default=1) for tree in trees)
            trees = planner.trim([ask.text for ask in asks], trees, batch, seconds)
            nodes = sum(map(len, trees)) / len(trees)
            planner.took(len(asks), depth, seconds, levels=levels, nodes=nodes)
        found = {
            ask.text: Draft(tree.best(ask.nodes), whole, planner, ask.depth)
            for ask, tree, whole in zip(asks, trees, wholes, strict=True)
        }
        return [found.get(text) or Draft() for text in texts]

    def forget(self, text: Text) -> None:
        self._drafter.forget(text)
        if self._planner is not None:
            self._planner.forget(text)


def _guessable(text: Text) -> int:
    """Tokens that a tree can still give: every round adds one by itself."""
    return text.num_left - 1
