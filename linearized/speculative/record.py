"""How often a drafter's guesses were right. Knows trees and what became of them."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from linearized.speculative.tree import TokenTree

MEMORY = 0.95
"""What the weight of an observation falls to with every further round: some twenty count."""
LONG_MEMORY = 0.99
"""The same, for what a drafter's scores are worth, which changes slowly."""
STEPS = (0.01, 0.02, 0.04, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55, 0.75, 0.9)
"""Between these, guesses that a drafter finds so probable are right equally often, …"""
RANKS = 3
"""… if they are its first, its second, or later choices."""
DOUBTED = 5.0
"""Observations that old knowledge counts for, once it is doubted."""
PRIOR = 3.0
"""Observations that what other texts have shown counts for, in a text of its own."""


@dataclass(slots=True)
class Average:
    """A mean in which later observations weigh more."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value
        self.weight += weight

    def shrink(self, weight: float) -> None:
        """Count for no more than so many observations."""
        if self.weight > weight:
            self.fade(weight / self.weight)

    def fade(self, memory: float = MEMORY) -> None:
        self.total *= memory
        self.weight *= memory

    def mean(self, prior: float, strength: float = PRIOR) -> float:
        """As if `prior` had been observed so often before."""
        return (self.total + strength * prior) / (self.weight + strength)


class Record:
    """How right a drafter was, by depth. What has not been seen for a while fades, also where it
    is not drafted any more."""

    def __init__(self) -> None:
        self.steps: dict[int, Average] = defaultdict(Average)
        """[level], was it accepted, where the level above it was?"""
        self.guesses = [[Average() for _ in range(len(STEPS) + 1)] for _ in range(RANKS)]
        """[rank][between `STEPS`], was a guess right, where its parent was?"""

    def observe(self, tree: TokenTree, new: Sequence[int], depth: int) -> None:
        """A tree that was drafted `depth` deep, worth verifying or not, and how the text went on:
        by what was accepted of it, and a token more."""
        for average in self.steps.values():
            average.fade()
        accepted = len(new) - 1
        for level in range(1, min(depth, accepted + 1) + 1):
            self.steps[level].add(float(accepted >= level))
        self.learn(tree.parents, tree.steps, tree.ranks, tree.follow(new), len(new))

    def learn(
        self,
        parents: Sequence[int],
        steps: Sequence[float],
        ranks: Sequence[int],
        path: Sequence[int],
        num_new: int,
    ) -> None:
        """Of the nodes of a tree, those on `path` were right, and it is known what followed the
        first of them: the text went on by so many tokens."""
        for average in itertools.chain(*self.guesses):
            average.fade(LONG_MEMORY)
        known, right = {-1, *path[: num_new - 1]}, {*path}
        for node, parent in enumerate(parents):
            if parent in known:
                self.guess(steps[node], ranks[node]).add(float(node in right))

    def doubt(self) -> None:
        """What is known is old: new observations are to count for more."""
        for average in self.steps.values():
            average.shrink(DOUBTED)

    def chance(self, step: float, rank: int, prior: float | None = None) -> float:
        """How often a guess is right, where its parent is, that the drafter finds so probable, and
        its first, second, … choice. `prior`: as others have seen it. As long as nobody has, as the
        drafter says itself; only its first choice is right more often than it is probable, since
        the target, too, takes one that it likes best."""
        if prior is None:
            prior = step if rank else step**0.5
        return self.guess(step, rank).mean(prior)

    def guess(self, step: float, rank: int) -> Average:
        """Guesses of this kind: were they right, where their parents were?"""
        return self.guesses[min(rank, RANKS - 1)][bisect.bisect(STEPS, step)]
