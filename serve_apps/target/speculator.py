"""Where the trees of a target's texts come from: the draft replica while it is in time, n-grams, or
nowhere.

Knows deadlines; knows neither sockets nor models. `advance`, `gather` and `close` are called on the
event loop; the engine asks the drafters in its own thread, between two of those calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from weakref import WeakSet

from linearized.speculative import Ask, Drafter, NgramDrafter, Text, TokenTree
from serve_apps.link.drafts import LinkSession
from serve_apps.link.protocol import MAX_NODES

MISSES = 3
"""Deadlines missed in a row after which the draft is no longer waited for …"""
RETRY = 8
"""… but in every so many rounds. It is used whenever it is there by itself."""


class Speculator:
    """Tell it which texts there are and how they go on; its `drafters` are for the engine."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._remote = _Remote()
        self._ngrams = _Ngrams()
        self._sessions: dict[Text, _Session] = {}

    @property
    def drafters(self) -> list[Drafter]:
        return [self._remote, self._ngrams]

    def open(self, text: Text, session: LinkSession | None, *, ngrams: bool) -> None:
        if ngrams:
            self._ngrams.texts.add(text)
        if session is not None:
            self._sessions[text] = _Session(session)
            session.advance(text.tokens)

    def advance(self, text: Text) -> None:
        if text in self._sessions:
            self._sessions[text].link.advance(text.tokens)

    async def gather(self, texts: Sequence[Text]) -> None:
        """The draft replica's trees for these texts: at once, or within one deadline for all."""
        sessions = [(text, self._sessions[text]) for text in texts if text in self._sessions]
        trees = await asyncio.gather(*(one.tree(self._deadline_s) for _, one in sessions))
        self._remote.trees = {
            text: tree for (text, _), tree in zip(sessions, trees, strict=True) if tree is not None
        }

    def close(self, text: Text) -> None:
        session = self._sessions.pop(text, None)
        if session is not None:
            session.link.close()


class _Session:
    def __init__(self, link: LinkSession) -> None:
        self.link = link
        self._misses = 0
        self._rounds = 0

    async def tree(self, deadline_s: float) -> TokenTree | None:
        self._rounds += 1
        patient = self._misses < MISSES or self._rounds % RETRY == 0
        tree = await self.link.tree(deadline_s if patient else 0.0)
        self._misses = self._misses + 1 if tree is None else 0
        return tree


class _Remote(Drafter):
    """What the draft replica has sent."""

    depth = MAX_NODES

    def __init__(self) -> None:
        self.trees: dict[Text, TokenTree] = {}

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        return [self.trees.pop(ask.text, TokenTree.empty) for ask in asks]


class _Ngrams(NgramDrafter):
    """For some texts."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: WeakSet[Text] = WeakSet()

    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        mine = [ask for ask in asks if ask.text in self.texts]
        trees = dict(zip((ask.text for ask in mine), super().propose(mine), strict=True))
        return [trees.get(ask.text, TokenTree.empty) for ask in asks]
