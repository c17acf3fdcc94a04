"""Where the trees of a target's texts come from: draft replicas or a model beside the target, the
text itself (n-grams), or nowhere.

Knows which text may be drafted for by whom. `open`, `advance` and `close` are called on the event
loop; the engine asks the drafters in its own thread.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakSet

from transformers import PreTrainedModel

from linearized.speculative import Ask, Drafter, NgramDrafter, Text, TokenTree
from linearized.speculative.pool import Pool
from serve_apps.link.draft_session import DraftSession
from serve_apps.link.drafts import DraftLinks

FIRST_DEPTH = 4
"""Levels that are asked for before it is known what pays."""
REST_S = 600.0
"""Seconds after which drafts that did not pay, and have been stopped since, are tried again."""


LOOK_S = 0.05
"""Seconds after which whoever waits looks whether there is still something to wait for."""


class Speculator:
    """Tell it which texts there are and how they go on; its `drafters` are for the engine."""

    def __init__(
        self, *, links: DraftLinks | None = None, model: Drafter | None = None, depth: int = 8
    ) -> None:
        """`links` lead to draft replicas, whose trees have up to `depth` levels; `model` drafts
        beside the target."""
        self._remote = RemoteDrafter(links, depth=depth) if links is not None else None
        self._local = _Optional(model) if model is not None else None
        self._ngrams = _Optional(NgramDrafter())

    @property
    def drafters(self) -> list[Drafter]:
        found = (self._remote, self._local, self._ngrams)
        return [drafter for drafter in found if drafter is not None]

    @property
    def has_model(self) -> bool:
        """Is there, or may there be, a model that drafts?"""
        return self._remote is not None or self._local is not None

    def open(self, text: Text, speculate: str | None) -> None:
        """`speculate` is one of generation.SPECULATE."""
        mode = speculate or "model"
        if mode == "none":
            self._ngrams.without.add(text)
        if mode != "model" and self._local is not None:
            self._local.without.add(text)
        if mode == "model" and self._remote is not None:
            self._remote.open(text)

    def advance(self, text: Text) -> None:
        """A round has gone by, in which this text went on."""
        if self._remote is not None:
            self._remote.advance(text)

    def close(self, text: Text) -> None:
        if self._remote is not None:
            self._remote.close(text)


class RemoteDrafter(Drafter):
    """Draft replicas, as a drafter that is planned like any other: what it takes is how long the
    engine waits for a tree. That is at most as long as what is missing of the trees is worth, by
    how far those before them were right, so a late one holds up nobody for long.

    Trees are ordered when a round ends, as deep as was asked for in it, and come while the next one
    is prepared, or have come before. For a text that was not drafted for in a round nothing is
    ordered: then neither it nor its draft does any work for the other."""

    steady = False

    def __init__(
        self, links: DraftLinks, *, depth: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.depth = depth
        self._links = links
        self._now = now
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sessions: dict[Text, DraftSession] = {}
        self._asked: dict[Text, int] = {}
        """Levels, in the last round."""
        self._usual = min(FIRST_DEPTH, depth)
        """Levels that are asked for; 0: drafts are at rest."""
        self._rested = 0.0
        """Since when they are."""

    def open(self, text: Text) -> None:
        """The draft reads the prompt while the target does, if drafts are in use."""
        self._loop = asyncio.get_running_loop()
        session = self._sessions[text] = self._links.session(text)
        if not self._usual and not session.open and self._now() - self._rested > REST_S:
            self._usual = min(FIRST_DEPTH, self.depth)
        if self._usual:
            session.order(self._usual)

    def advance(self, text: Text) -> None:
        session = self._sessions.get(text)
        depth = self._asked.pop(text, 0)
        if session is None:
            return
        if depth:
            session.order(depth)
        elif session.open and text.num_left > 1:  # otherwise a tree would have been of no use
            self._usual, self._rested = 0, self._now()

    def close(self, text: Text) -> None:
        self._asked.pop(text, None)
        session = self._sessions.pop(text, None)
        if session is not None:
            session.close()

    def serves(self, text: Text) -> bool:
        session = self._sessions.get(text)
        return session is not None and session.open

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        mine = [(ask, self._sessions.get(ask.text)) for ask in asks]
        known = [(ask, session) for ask, session in mine if session is not None]
        began = self._now()
        self._usual = max(ask.depth for ask in asks)
        for ask, _ in known:
            self._asked[ask.text] = ask.depth
        self._order(known)
        with self._links.arrived:
            while (left := self._worth(known) - (self._now() - began)) > 0:
                self._links.arrived.wait(min(left, LOOK_S))
                self._order(known)  # again where a replica has gone in the meantime
        return [
            session.tree.top(ask.depth) if session is not None else TokenTree.empty
            for ask, session in mine
        ]

    def _order(self, known: Sequence[tuple[Ask, DraftSession]]) -> None:
        """Have trees ordered where none are, and somebody can be asked."""
        for ask, session in known:
            if not session.ordered and session.open and self._loop is not None:
                self._loop.call_soon_threadsafe(session.order, ask.depth)

    def _worth(self, known: Sequence[tuple[Ask, DraftSession]]) -> float:
        """Seconds, of all that is missing of the trees and may come yet."""
        now = self._now()
        worth = 0.0
        for ask, session in known:
            ordered = session.ordered
            if not (session.awaited(now) if ordered else session.open):
                continue
            wanted = min(ask.depth, ordered or ask.depth)
            there = max(session.tree.depths, default=0)
            if there < wanted and ask.worth is None:
                return math.inf
            worth += sum(itertools.islice(ask.worth or (), there, wanted))
        return worth


class _Optional(Drafter):
    """A drafter for all texts but some."""

    def __init__(self, drafter: Drafter) -> None:
        self.depth = drafter.depth
        self.without: WeakSet[Text] = WeakSet()
        self._drafter = drafter

    @property
    def identity(self) -> Hashable:
        return type(self), self._drafter.identity

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        return self._drafter.propose(asks)

    def serves(self, text: Text) -> bool:
        return text not in self.without

    def join(self, model: PreTrainedModel, pool: Pool[Text]) -> None:
        self._drafter.join(model, pool)

    def forget(self, text: Text) -> None:
        self._drafter.forget(text)
