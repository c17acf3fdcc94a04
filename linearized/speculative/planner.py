"""How many guesses pay. Knows times and how often guesses were right; knows no model.

A round costs the drafting and one verification, and gives a token more than it accepts. What pays
is what gives the most tokens a second, no guess at all included.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from linearized.speculative.costs import Clock, Recent
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree

MEMORY = 0.95
"""What the weight of an observation falls to with every further round: some twenty count."""
LONG_MEMORY = 0.99
"""The same, for what a drafter's scores are worth, which changes slowly."""
STEPS = (0.01, 0.02, 0.04, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.55, 0.75, 0.9)
"""Between these, guesses that a drafter finds so probable are right equally often, …"""
RANKS = 3
"""… if they are its first, its second, or later choices."""
PRIOR = 3.0
"""Observations that what other texts have shown counts for, in a text of its own."""
FIRST_PROBE, FIRST_REST, LAST = 8, 64, 256
"""Rounds without a drafter until it is tried again, and rounds with it until there are some
without, to know what those take by now. Each time that this changes nothing doubles them, up to the
last."""
PROBE, REST = 2, 4
"""Rounds of such a try. The first is an expensive one: a drafter reads what it has missed; a target
without drafts finds the processor's caches full of something else."""


@dataclass(slots=True)
class Average:
    """A mean in which later observations weigh more."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value
        self.weight += weight

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

    def guess(self, step: float, rank: int) -> Average:
        """Guesses of this kind: were they right, where their parents were?"""
        return self.guesses[min(rank, RANKS - 1)][bisect.bisect(STEPS, step)]


FOLLOW = 0.1
"""What a level costs, in tokens of a text, as long as it is not known."""
MARGIN = 1.1
"""How much faster than without drafts it must promise to be: the best promise of several is often
one that is not kept."""
OPTIMISM = 0.7
"""Of one who has drafted nothing yet: is a guess right, given that all before it are?"""


class Planner:
    """For one drafter: how deep to draft, and what of a tree to verify."""

    def __init__(self, clock: Clock, *, max_depth: int, max_nodes: int) -> None:
        self._clock = clock
        self._max_depth = max_depth
        self._max_nodes = max_nodes
        self._all = Record()
        self._texts: dict[Text, Record] = {}
        self._seconds: dict[tuple[int, int], Recent] = defaultdict(Recent)
        """Of drafting, by texts and depth."""
        self._levels: dict[int, Recent] = defaultdict(Recent)
        """Of a level of the trees, by texts."""
        self._sizes: dict[int, Average] = defaultdict(Average)
        """Nodes of a tree that was worth verifying, by the depth that it was drafted."""
        self._planned: tuple[list[Text], int, int] | None = None
        """For these texts, in a round of so many, so deep; None: something new was learnt."""
        self._rate = 0.0
        """Tokens a second, as it was planned last."""
        self._drafts = False
        """Does drafting pay, by what was planned last?"""
        self._same, self._until, self._trial = 0, FIRST_PROBE, 0
        """Rounds that it did or did not, how many until the other is tried, and what is left of
        such a try."""
        self._cold = True

    def depth(self, texts: Sequence[Text], batch: int) -> int:
        """How deep to draft for these texts, in a round of `batch` of them; 0: not at all. The
        first rounds are without drafts, to know what they have to beat."""
        depth = 0
        if self._clock.knows(batch):
            if self._planned is None or self._planned[:2] != (texts, batch):
                self._planned = list(texts), batch, self._best_depth(texts, batch)
            depth = self._probed(self._planned[2])
        self._cold |= not depth
        return depth

    def _best_depth(self, texts: Sequence[Text], batch: int) -> int:
        best, self._rate = 0, batch / self._clock.seconds(batch, 0, drafted=False)
        least = self._rate * MARGIN
        expected = float(batch)
        reaches = [self.reach(text) for text in texts]
        for depth in range(1, self._max_depth + 1):
            expected += sum(map(next, reaches))
            nodes = max(round(self._sizes[depth].mean(min(2 * depth, self._max_nodes))), 1)
            seconds = self._clock.seconds(batch, nodes, drafted=True)
            rate = expected / (seconds + self._drafting(len(texts), depth))
            if rate > max(self._rate, least):
                best, self._rate = depth, rate
        return best

    def follow(self, texts: int) -> float:
        """How probable a guess must be for the next level of the trees of so many texts to be worth
        its time: what the time of a level gives otherwise, in tokens of one text."""
        known = [count for count, times in self._levels.items() if times]
        if not known:
            return FOLLOW
        near = min(known, key=lambda count: abs(count - texts))
        return min(self._levels[near].median * self._rate / texts, 1.0)

    def reach(self, text: Text) -> Iterator[float]:
        """The chance that a tree for this text is right down to the first level, the second, …"""
        own = self._texts.get(text)
        chance, shared = 1.0, OPTIMISM
        for level in itertools.count(1):
            shared = self._all.steps[level].mean(shared)  # like the level above, if unknown
            chance *= own.steps[level].mean(shared) if own is not None else shared
            yield chance

    def trust(self, text: Text) -> Callable[[float, int], float]:
        """How often a guess for this text is right that the drafter finds so probable, and its
        first, second, … choice, given that all before it are. As long as nothing is known, as it
        says itself; only its first choice is right more often than it is probable, since the
        target, too, takes one that it likes best."""
        shared, own = self._all, self._texts.get(text)

        def chance(step: float, rank: int) -> float:
            known = shared.guess(step, rank).mean(step if rank else step**0.5)
            return known if own is None else own.guess(step, rank).mean(known)

        return chance

    def trim(
        self, texts: Sequence[Text], trees: Sequence[TokenTree], batch: int, seconds: float
    ) -> list[TokenTree]:
        """Of each tree, drafted in so many seconds all together, the nodes that pay in a round of
        `batch` texts whose trees are verified side by side, as wide as the widest."""
        chances = [self._chances(text, tree) for text, tree in zip(texts, trees, strict=True)]
        gains = [sorted(chance, reverse=True) for chance in chances]
        widest = min(max(map(len, trees), default=0), self._max_nodes)
        best, expected = 0, float(batch)
        best_rate = batch / (seconds + self._clock.seconds(batch, 0, drafted=True))
        for nodes in range(1, widest + 1):
            expected += sum(gain[nodes - 1] for gain in gains if len(gain) >= nodes)
            rate = expected / (seconds + self._clock.seconds(batch, nodes, drafted=True))
            if rate > best_rate:
                best, best_rate = nodes, rate
        return [tree.best(best, by=chance) for tree, chance in zip(trees, chances, strict=True)]

    def observe(self, text: Text, tree: TokenTree, new: Sequence[int], depth: int) -> None:
        """For this text a tree was drafted `depth` deep, and then it went on by `new` tokens."""
        self._planned = None
        if text not in self._texts:
            self._texts[text] = Record()
        for record in (self._all, self._texts[text]):
            record.observe(tree, new, depth)

    def took(self, texts: int, depth: int, seconds: float, *, levels: int, nodes: float) -> None:
        """Drafting up to so deep for so many texts took so long. The deepest tree has so many
        levels, and on average so many nodes were worth verifying."""
        self._planned = None
        if self._cold:  # it had to read what it had missed
            self._cold = False
        else:
            self._seconds[texts, depth].add(seconds)
            self._levels[texts].add(seconds / levels)
        self._sizes[depth].fade()
        self._sizes[depth].add(nodes)

    def forget(self, text: Text) -> None:
        self._texts.pop(text, None)

    def _chances(self, text: Text, tree: TokenTree) -> list[float]:
        """That each node is right, with all above it."""
        trust = self.trust(text)
        chances: list[float] = []
        for parent, step, rank in zip(tree.parents, tree.steps, tree.ranks, strict=True):
            chances.append(trust(step, rank) * (chances[parent] if parent >= 0 else 1.0))
        return chances

    def _drafting(self, texts: int, depth: int) -> float:
        """Seconds, of the nearest that is known."""
        known = [key for key, times in self._seconds.items() if times]
        if not known:
            return 0.0
        near = min(known, key=lambda key: (abs(key[0] - texts), abs(key[1] - depth)))
        return self._seconds[near].median * depth / near[1]

    def _probed(self, best: int) -> int:
        """What was found to pay less, to draft or not to, is tried again now and then."""
        if bool(best) != self._drafts:
            self._drafts, self._trial, self._same = bool(best), 0, 0
            self._until = FIRST_REST if best else FIRST_PROBE
        if not self._trial:
            self._same += 1
            if self._same < self._until:
                return best
            self._same, self._until = 0, min(2 * self._until, LAST)
            self._trial = REST if best else PROBE
        self._trial -= 1
        return 0 if best else min(2, self._max_depth)
