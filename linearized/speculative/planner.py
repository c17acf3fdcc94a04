"""How many guesses pay. Knows times and how often guesses were right; knows no model.

A round costs the drafting and one verification, and gives a token more than it accepts. What pays
is what gives the most tokens a second, no guess at all included.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

from linearized.speculative.account import Account
from linearized.speculative.costs import Clock, Recent, Varying
from linearized.speculative.record import Average, Record
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree

FOLLOW = 0.1
"""What a level costs, in tokens of a text, as long as it is not known."""
SLOW = 1.5
"""Times what such a round takes as a rule: what takes longer says nothing about drafts."""
OPTIMISM = 0.7
"""Of one who has drafted nothing yet: is a guess right, given that all before it are?"""


class Planner:
    """For one drafter: how deep to draft, and what of a tree to verify."""

    def __init__(
        self, clock: Clock, *, max_depth: int, max_nodes: int, steady: bool = True
    ) -> None:
        """`steady`: drafting takes about as long each time."""
        self._clock = clock
        self._max_depth = max_depth
        self._max_nodes = max_nodes
        self._all = Record()
        self._texts: WeakKeyDictionary[Text, Record] = WeakKeyDictionary()
        times = Recent if steady else Varying
        self._seconds: dict[tuple[int, int], Recent] = defaultdict(times)
        """Of drafting, by texts and depth."""
        self._levels: dict[int, Recent] = defaultdict(times)
        """Of a level of the trees, by texts."""
        self._sizes: dict[int, Average] = defaultdict(Average)
        """Nodes of a tree that was worth verifying, by the depth that it was drafted."""
        self._planned: tuple[list[Text], int, int] | None = None
        """For these texts, in a round of so many, so deep; None: something new was learnt."""
        self._rate = 0.0
        """Tokens a second, as it was planned last."""
        self._accounts: dict[int, Account] = defaultdict(Account)
        """By texts, halved again and again."""
        self._spent, self._usual = 0.0, 0.0
        """Seconds of drafting in this round, and what it takes as a rule."""
        self._cold = True

    def depth(self, texts: Sequence[Text], batch: int) -> int:
        """How deep to draft for these texts, in a round of `batch` of them; 0: not at all. The
        first rounds are without drafts, to know what they have to beat."""
        depth = 0
        if self._clock.knows(batch):
            if self._planned is None or self._planned[:2] != (texts, batch):
                self._planned = list(texts), batch, self._best_depth(texts, batch)
            depth = self._decided(texts, batch, self._planned[2])
        self._cold |= not depth
        return depth

    def _decided(self, texts: Sequence[Text], batch: int, best: int) -> int:
        account = self._account(batch)
        resting = not account.drafts
        cheapest = min(2, self._max_depth)
        plain = self._clock.seconds(batch, 0, drafted=False)
        more = self._clock.seconds(batch, cheapest, drafted=True) - plain
        price = (self._drafting(len(texts), cheapest) + max(more, 0.0)) / plain
        if not account.begin(promising=best > 0, price=price):
            return 0
        if resting:
            for record in (self._all, *self._texts.values()):
                record.doubt()
        return best or cheapest

    def _best_depth(self, texts: Sequence[Text], batch: int) -> int:
        best, self._rate = 0, batch / self._clock.seconds(batch, 0, drafted=False)
        expected = float(batch)
        reaches = [self.reach(text) for text in texts]
        # All of them: where a few nodes cost nearly what many do, a little deeper may not pay and
        # much deeper may. Levels that nobody has seen are thought to be like the one above them.
        for depth in range(1, self._max_depth + 1):
            expected += sum(map(next, reaches))
            nodes = max(round(self._sizes[depth].mean(min(2 * depth, self._max_nodes))), 1)
            seconds = self._clock.seconds(batch, nodes, drafted=True)
            rate = expected / (seconds + self._drafting(len(texts), depth))
            if rate > self._rate:
                best, self._rate = depth, rate
        return best

    def gave(self, batch: int, texts: int, *, tokens: int, nodes: int, seconds: float) -> None:
        """A round of `batch` texts with trees of up to so many nodes took so many seconds, besides
        drafting. Of those for `texts` of them that were drafted for here, so many tokens were
        right."""
        plain = self._clock.seconds(batch, 0, drafted=False)
        usual = self._clock.seconds(batch, nodes, drafted=True)
        total = min(self._spent + seconds, SLOW * (self._usual + usual))
        own = (total - self._spent - plain) * texts / batch  # of verifying: for these texts
        self._account(batch).gained(tokens / batch - (self._spent + own) / plain)

    def _account(self, batch: int) -> Account:
        return self._accounts[(batch - 1).bit_length()]

    def follow(self, texts: int) -> float:
        """How probable a guess must be for the next level of the trees of so many texts to be worth
        its time: what the time of a level gives otherwise, in tokens of one text."""
        known = [count for count, times in self._levels.items() if times]
        if not known:
            return FOLLOW
        near = min(known, key=lambda count: abs(count - texts))
        return min(self._levels[near].usual * self._rate / texts, 1.0)

    def worth(self, text: Text, depth: int) -> tuple[float, ...]:
        """Seconds in which other rounds give what is to be expected of the first level of a tree
        for this text, of the second, …: it does not pay to wait longer for them."""
        if not self._rate:
            return (0.0,) * depth
        return tuple(chance / self._rate for chance in itertools.islice(self.reach(text), depth))

    def reach(self, text: Text) -> Iterator[float]:
        """The chance that a tree for this text is right down to the first level, the second, …"""
        own = self._texts.get(text)
        chance, shared = 1.0, OPTIMISM
        for level in itertools.count(1):
            shared = self._all.steps[level].mean(shared)  # like the level above, if unknown
            chance *= own.steps[level].mean(shared) if own is not None else shared
            yield chance

    def trust(self, text: Text) -> Callable[[float, int], float]:
        """How often a guess for this text is right; see `Record.chance`."""
        shared, own = self._all, self._texts.get(text)

        def chance(step: float, rank: int) -> float:
            known = shared.chance(step, rank)
            return known if own is None else own.chance(step, rank, known)

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
        known = self._seconds[texts, depth]
        self._spent = self._usual = seconds
        if self._cold:  # it had to read what it had missed
            self._cold = False
        else:
            if known:
                self._usual = known.usual
            known.add(seconds)
            self._levels[texts].add(seconds / levels)
        self._sizes[depth].fade()
        self._sizes[depth].add(nodes)

    def rehearsed(self, texts: int, depth: int, seconds: float, *, levels: int) -> None:
        """The same, of texts that nobody reads."""
        self._seconds[texts, depth].add(seconds)
        self._levels[texts].add(seconds / levels)

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
        return self._seconds[near].usual * depth / near[1]
