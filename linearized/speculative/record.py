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
        path = tree.follow(new)
        for average in itertools.chain(*self.guesses):
            average.fade(LONG_MEMORY)
        known = {-1, *path[: len(new) - 1]}  # nodes after which it is known what came
        nodes = zip(tree.parents, tree.steps, tree.ranks, strict=True)
        for node, (parent, step, rank) in enumerate(nodes):
            if parent in known:
                self.guess(step, rank).add(float(node in path))

    def doubt(self) -> None:
        """What is known is old: new observations are to count for more."""
        for average in self.steps.values():
            average.shrink(DOUBTED)

    def guess(self, step: float, rank: int) -> Average:
        """Guesses of this kind: were they right, where their parents were?"""
        return self.guesses[min(rank, RANKS - 1)][bisect.bisect(STEPS, step)]
