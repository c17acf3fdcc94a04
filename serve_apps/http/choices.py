"""One choice of an answer in the making: from a target's events to the parts that are shown.

Log-probabilities are shown with the text of their tokens, never before it: what is held back of a
text, because a stop string may begin there, is held back of them, too. Knows nothing of how
answers are written.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from linearized.speculative import Alternatives, TokenTree
from serve_apps.generation import Delta, Finished, Generation, Started
from serve_apps.http.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Entry:
    """A token with its log-probabilities."""

    token: int
    found: Alternatives | None
    """None for the first token of a prompt."""
    offset: int
    """Characters of prompt, if that is shown, and text before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """A verification, as whoever asked for rounds is told of it."""

    entries: tuple[Entry, ...]
    """Of its tokens, also of those whose text is held back."""
    accepted: int
    """How many of them, from the first on, were drafted."""
    tree: TokenTree
    """What was drafted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of a choice's text."""

    index: int
    text: str = ""
    entries: tuple[Entry, ...] = ()
    reason: str | None = None
    """Why the text ends with it, if it does."""
    round: Round | None = None
    """What gave it, if rounds were asked for."""
    read: tuple[int, int] | None = None
    """Tokens of the prompt, and those that did not have to be read, when it has just been read and
    rounds were asked for."""

    @classmethod
    def join(cls, parts: Sequence[Part]) -> Part:
        """All of a choice as one part."""
        return cls(
            index=parts[-1].index,
            text="".join(part.text for part in parts),
            entries=tuple(entry for part in parts for entry in part.entries),
            reason=parts[-1].reason,
        )


class Choice:
    def __init__(
        self, index: int, job: Generation, tokenizer: Tokenizer, *, echo: str = ""
    ) -> None:
        """`echo`: the prompt's text, if it is shown."""
        self._index = index
        self._job = job
        self._tokenizer = tokenizer
        self._echo = echo
        self._shown = 0
        """Characters that are out."""
        self._offset = 0
        """Characters of the tokens so far. At half a character it stays before it."""
        self._half = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[Entry] = []

    def start(self, started: Started) -> Part:
        """The prompt, if it is shown."""
        entries: list[Entry] = []
        if started.prompt_logprobs:
            entries = self._entries(zip(self._job.prompt, started.prompt_logprobs, strict=True))
        self._shown = self._offset = len(self._echo)
        self._half.reset()
        read = (len(self._job.prompt), started.cached_tokens) if self._job.trees else None
        return Part(index=self._index, text=self._echo, entries=tuple(entries), read=read)

    def add(self, delta: Delta) -> Part:
        self._shown += len(delta.text)
        if not delta.logprobs and not self._job.trees:
            return Part(index=self._index, text=delta.text)
        found = delta.logprobs or [None] * len(delta.tokens)
        new = self._entries(zip(delta.tokens, found, strict=True))
        gave = Round(entries=tuple(new), accepted=delta.accepted, tree=delta.tree)
        shown = gave if self._job.trees and new else None
        if not delta.logprobs:
            return Part(index=self._index, text=delta.text, round=shown)
        self._held += new
        ready = next(
            (i for i, entry in enumerate(self._held) if entry.offset >= self._shown),
            len(self._held),
        )
        entries, self._held = self._held[:ready], self._held[ready:]
        return Part(index=self._index, text=delta.text, entries=tuple(entries), round=shown)

    def finish(self, finished: Finished) -> Part:
        held = [entry for entry in self._held if self._belongs(entry, finished.reason)]
        return Part(index=self._index, entries=tuple(held), reason=finished.reason)

    def _belongs(self, entry: Entry, reason: str) -> bool:
        """Whether a token without text is shown: not if it is of a stop string."""
        if reason != "stop" or not self._job.stop:
            return True
        if entry is not self._held[-1]:
            return entry.offset < self._shown
        if entry.token in self._job.sampling.stop_ids:
            return True
        name, _ = self._tokenizer.name(entry.token)
        named = any(name in stop for stop in self._job.stop)
        return self._tokenizer.hidden(entry.token) and not named

    def _entries(self, found: Iterable[tuple[int, Alternatives | None]]) -> list[Entry]:
        entries = []
        for token, alternatives in found:
            entries.append(Entry(token, alternatives, self._offset))
            if not self._tokenizer.hidden(token):
                _, spelt = self._tokenizer.name(token)
                self._offset += len(self._half.decode(spelt))
        return entries
