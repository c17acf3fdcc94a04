"""Rounds of an engine without a model: a clock that is set, texts that say 1 for ever, and drafters
that are right as often, and take as long, as they are told."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from linearized.speculative import Ask, Drafter, Sampling, Text, TokenTree
from linearized.speculative.costs import Clock, Costs
from linearized.speculative.drafting import Drafting
from linearized.speculative.planner import Planner

TABLE = Costs((1, 8), (1, 32), ((1.0, 2.0), (2.0, 6.0)))
RIGHT, WRONG = 1, 2


class FakeDrafter(Drafter):
    def __init__(
        self, world: World, right: Callable[[int], float], *, level: float, depth: int = 8
    ) -> None:
        """`right(tokens of the text)`: how often a guess is; `level`: seconds of one."""
        self.world, self.right, self.level, self.depth = world, right, level, depth
        self.read: dict[Text, int] = {}

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        world = self.world
        world.pass_(self.level * max(ask.depth for ask in asks))
        for ask in asks:  # what it has missed
            missed = len(ask.text.tokens) - self.read.get(ask.text, 0)
            world.pass_(0.002 * missed)
            self.read[ask.text] = len(ask.text.tokens)
        return [self._chain(ask) for ask in asks]

    def _chain(self, ask: Ask) -> TokenTree:
        chance = self.right(len(ask.text.tokens))
        guesses = [
            RIGHT if self.world.draw.random() < chance else WRONG for _ in range(ask.depth)
        ]
        scores = [0.8**level for level in range(1, ask.depth + 1)]
        return TokenTree.chain(guesses, scores)


class World:
    """Time, chance, and what passed in them."""

    def __init__(
        self, *, seed: int = 0, noise: float = 0.0, told: Costs = TABLE, hidden: float = 0.0
    ) -> None:
        """`noise`: of each time; one in fifty takes five times as long. `told`: what was measured
        before; rounds really take what `TABLE` says, and those with drafts `hidden` more."""
        self.draw = random.Random(seed)
        self.noise, self.hidden = noise, hidden
        self.clock = Clock(told)
        self.seconds = 0.0
        self.tokens = 0
        self.plain = 0.0
        """Seconds that the same tokens would have taken without drafts."""
        self.rounds: list[int] = []
        """How deep each was drafted."""

    def now(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        if self.noise:
            slow = 5.0 if self.draw.random() < 0.02 else 1.0
            seconds *= slow * self.draw.uniform(1 - self.noise, 1 + self.noise)
        self.seconds += seconds

    def drafting(self, drafter: FakeDrafter) -> Drafting:
        found = Drafting(drafter, 16, now=self.now)
        found.planner = Planner(self.clock, max_depth=drafter.depth, max_nodes=16)
        found.rehearses = True
        for _ in range(3):
            found.draft([self.text(64)], 1)
        found.rehearses = False
        self.seconds = 0.0
        return found

    def text(self, tokens: int) -> Text:
        return Text([1], sampling=Sampling(), max_new_tokens=tokens)

    def generate(self, drafting: Drafting, *, texts: int, tokens: int, batch: int = 1) -> None:
        for _ in range(texts // batch):
            group = [self.text(tokens) for _ in range(batch)]
            while group:
                self._round(drafting, group)
                for text in group:
                    if not text.num_left:
                        drafting.forget(text)
                group = [text for text in group if text.num_left]

    def _round(self, drafting: Drafting, texts: list[Text]) -> None:
        drafts = drafting.draft(texts, len(texts))
        began = self.seconds
        nodes = max(len(draft.tree) for draft in drafts)
        drafted = any(draft.depth for draft in drafts)
        self.pass_(TABLE.verify(len(texts), 1 + nodes) + (self.hidden if drafted else 0.0))
        for text, draft in zip(texts, drafts, strict=True):
            path = draft.tree.follow([RIGHT] * 99)
            new = [RIGHT] * (len(path) + 1)
            drafting.observe(text, draft, new)
            new = new[: text.num_left]
            text.tokens += new
            self.tokens += len(new)
            self.plain += len(new) * TABLE.verify(len(texts), 1) / len(texts)
        self.rounds.append(max(draft.depth for draft in drafts))
        seconds = self.seconds - began
        self.clock.took(len(texts), nodes, seconds, drafted=drafted)
        drafting.settle(len(texts), nodes, seconds)


def best_rate(right: float, level: float, depth: int = 8) -> float:
    """Tokens a second of the best fixed depth, of one text; 0 is a depth, too."""
    return max(
        sum(right**i for i in range(d + 1)) / (level * d + TABLE.verify(1, 1 + d))
        for d in range(depth + 1)
    )
