"""Token ids to text as they come: whole characters only, and nothing of a stop string.

Everything goes token by token, so that a text does not depend on how many tokens a round gave.
Knows a tokenizer's `decode`; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from linearized.errors import ConfigError

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""
MAX_OPEN = 3
"""Bytes that a character may still wait for its last one with."""
CONTEXT = 8
"""Tokens of the prompt that decoding starts with: some decoders drop a space at the beginning."""
MAX_WINDOW = 256
"""Tokens decoded at once at most, in a text that never comes to the end of a character."""


class TextStream:
    """New tokens in, text out. Stops at a stop string, which is cut off."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        prompt: Sequence[int] = (),
        stop: Iterable[str] = (),
        min_tokens: int = 0,
    ) -> None:
        """Stop strings are not looked for in the text of the first `min_tokens` tokens."""
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop = StopStrings(stop)
        self.num_tokens = 0
        """Taken so far, up to the one that completed a stop string."""

    @property
    def stopped(self) -> bool:
        return self._stop.found

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            new = self._detokenizer.push(token)
            text += new if self.num_tokens <= self._min_tokens else self._stop.push(new)
        return text

    def flush(self) -> str:
        """What was held back; no more tokens come."""
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()


class Detokenizer:
    """Token by token; an incomplete character is held back until it is complete or at its end."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt[-CONTEXT:])
        """Tokens from a boundary between characters on: `_context` that are out, then new ones."""
        self._context = len(self._window)
        self._prompt: str | None = decode(self._window) if self._window else ""
        """The window's text until something new is out: the prompt may end in half a character."""
        self._sent = 0
        """Characters of the window's text that are out."""

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        certain = _certain(text)
        full = len(self._window) - self._context >= MAX_WINDOW
        if full:
            certain = text
        new = self._take(certain)
        if full or (new and len(certain) == len(text)):
            self._slide()
        return new

    def flush(self) -> str:
        return self._take(self._decode(self._window)) if self._window else ""

    def _take(self, text: str) -> str:
        if self._prompt is not None:
            self._sent = _common(self._prompt, text)
        new = text[self._sent :]
        if new:
            self._sent = len(text)
            self._prompt = None
        return new

    def _slide(self) -> None:
        """All is out: what is new becomes the context."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._sent = len(self._decode(self._window))
        self._prompt = None


class StopStrings:
    """Lets text through up to the first stop string. Text that may be the beginning of one is held
    back."""

    def __init__(self, stop: Iterable[str]) -> None:
        """
        Raises:
            ConfigError: one of them is empty.
        """
        self._stop = tuple(stop)
        if "" in self._stop:
            raise ConfigError("a stop string must not be empty; it would stop before any text")
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        text = self._held + text
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.found, self._held = True, ""
            return text[: min(cuts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def _certain(text: str) -> str:
    """Without the end that a further token may change."""
    stripped = text.rstrip(REPLACEMENT)
    return text[: max(len(stripped), len(text) - MAX_OPEN)]


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
