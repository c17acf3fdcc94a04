"""A drafter at work: what it is asked for, what of it is worth verifying, and who learns from what
became of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from linearized.speculative.costs import Now
from linearized.speculative.drafters.base import Ask, Drafter
from linearized.speculative.planner import Planner
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Draft:
    """For one text in one round."""

    tree: TokenTree = TokenTree.empty
    """What is to be verified."""
    whole: TokenTree = TokenTree.empty
    """What it was cut out of: all that may come true."""
    depth: int = 0
    """How deep it was asked for; 0: it was not."""


class Drafting:
    """A drafter, and what is known of it. One that raises is not asked again: texts go on without
    it."""

    def __init__(
        self,
        drafter: Drafter,
        max_nodes: int,
        *,
        vocab_size: int,
        now: Now = time.perf_counter,
    ) -> None:
        """`vocab_size`: the target's; a drafter may have more tokens, of which none is verified."""
        self.drafter = drafter
        self.planner: Planner | None = None
        """Says what pays; None: all that is drafted."""
        self.rehearses = False
        """All is drafted, only times are learnt."""
        self._max_nodes = max_nodes
        self._vocab_size = vocab_size
        self._now = now
        self._works = True
        self._drafted, self._right = 0, 0
        """Texts drafted for in this round, and guesses for them that were right."""

    def draft(self, texts: Sequence[Text], batch: int) -> list[Draft]:
        """For these texts, in a round of `batch` of them."""
        self._drafted = self._right = 0
        asks = self._asks(texts, batch)
        if not asks:
            return [Draft()] * len(texts)
        try:
            found = self._ask(asks, batch)
        except Exception:
            self._fail("could not draft")
            return [Draft()] * len(texts)
        self._drafted = len(found)
        return [found.get(text, Draft()) for text in texts]

    def observe(self, text: Text, draft: Draft, new: Sequence[int]) -> None:
        """The text that this was drafted for went on by `new`."""
        if self.planner is not None and draft.depth and not self.rehearses:
            self.planner.observe(text, draft.whole, new, draft.depth)
            if draft.tree:
                self._right += len(new) - 1

    def settle(self, batch: int, nodes: int, seconds: float) -> None:
        """The round with what was drafted took so long, besides drafting."""
        if self.planner is not None and self._drafted and not self.rehearses:
            self.planner.gave(
                batch, self._drafted, tokens=self._right, nodes=nodes, seconds=seconds
            )

    def forget(self, text: Text) -> None:
        if self.planner is not None:
            self.planner.forget(text)
        try:
            self.drafter.forget(text)
        except Exception:
            self._fail("could not let go of a text")

    def _asks(self, texts: Sequence[Text], batch: int) -> list[Ask]:
        texts = [text for text in texts if self.drafter.serves(text)] if self._works else []
        if not any(_guessable(text) for text in texts):
            return []  # a try without a text would tell nothing
        planner = None if self.rehearses else self.planner
        depth = self.drafter.depth if planner is None else planner.depth(texts, batch)
        ends = ((text, min(depth, _guessable(text))) for text in texts)
        asks = [Ask(text, end, self._max_nodes) for text, end in ends if end]
        if planner is None or not asks:
            return asks
        follow = planner.follow(len(asks))
        return [
            replace(
                ask,
                follow=follow,
                trust=planner.trust(ask.text),
                worth=planner.worth(ask.text, ask.depth),
            )
            for ask in asks
        ]

    def _ask(self, asks: Sequence[Ask], batch: int) -> dict[Text, Draft]:
        planner, depth = self.planner, max(ask.depth for ask in asks)
        began = self._now() if planner is not None else 0.0
        wholes = trees = [
            ask.text.possible(tree, self._vocab_size, ask.nodes)
            for ask, tree in zip(asks, self.drafter.propose(asks), strict=True)
        ]
        if planner is not None:
            seconds = self._now() - began
            levels = max(max(tree.depths, default=1) for tree in trees)
            if self.rehearses:
                planner.rehearsed(len(asks), depth, seconds, levels=levels)
            else:
                trees = planner.trim([ask.text for ask in asks], trees, batch, seconds)
                nodes = sum(map(len, trees)) / len(trees)
                planner.took(len(asks), depth, seconds, levels=levels, nodes=nodes)
        return {
            ask.text: Draft(tree, whole, ask.depth)
            for ask, tree, whole in zip(asks, trees, wholes, strict=True)
        }

    def _fail(self, what: str) -> None:
        if self._works:
            name = type(self.drafter).__name__
            log.exception("%s %s; texts go on without it, at another speed", name, what)
        self._works = False


def _guessable(text: Text) -> int:
    """Tokens that a tree can still give: every round adds one by itself."""
    return text.num_left - 1
