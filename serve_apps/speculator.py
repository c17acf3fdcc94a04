"""Where one text's trees come from: the draft replica while it is in time, n-grams, or nowhere.

Knows deadlines; knows neither sockets nor models.
"""

from __future__ import annotations

from collections.abc import Sequence

from linearized.speculative import NgramDrafter, TokenTree
from serve_apps.link import LinkSession

MISSES = 3
"""Deadlines missed in a row after which the draft is no longer waited for …"""
RETRY = 8
"""… but in every so many rounds. It is used whenever it is there by itself."""


class Speculator:
    """Tell it how the text goes on, ask it for a tree, close it."""

    def __init__(
        self,
        *,
        session: LinkSession | None = None,
        ngram: NgramDrafter | None = None,
        deadline_s: float = 0.0,
    ) -> None:
        self.ngram = ngram
        """To be asked, in the model's thread, when `tree` has none."""
        self._session = session
        self._deadline_s = deadline_s
        self._misses = 0
        self._rounds = 0

    def advance(self, tokens: Sequence[int]) -> None:
        if self._session is not None:
            self._session.advance(tokens)

    async def tree(self) -> TokenTree | None:
        """At once, or within the deadline."""
        if self._session is None:
            return None
        self._rounds += 1
        patient = self._misses < MISSES or self._rounds % RETRY == 0
        tree = await self._session.tree(self._deadline_s if patient else 0.0)
        self._misses = self._misses + 1 if tree is None else 0
        return tree

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
