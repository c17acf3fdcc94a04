"""Token ids to text as they come: only what no later token can change, and nothing of a stop
string.

Everything goes token by token, so that a text does not depend on how many tokens a round gave.
Knows a tokenizer's `decode`; knows nothing of models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from linearized.errors import ConfigError
from linearized.speculative.decoder import CONTEXT, REPLACEMENT, Decoder

MAX_OPEN = 3
"""Bytes that a character may still wait for its last one with."""
MAX_WINDOW = 256
"""Tokens that are decoded at once at most in text that never comes to the end of a character."""
_MARKS = range(0xD800, 0xDC00)
"""Surrogates, which no decoded text has: they stand for special tokens where stop strings are
looked for."""


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
        """
        Args:
            decode: token ids to text; a `Decoder`, if more is known about it.
            prompt: the tokens before the first one.
            stop: the text ends before the first of these. They may name special tokens, which
                `decode` leaves out of the text.
            min_tokens: stop strings are not looked for in what is certain after so many tokens.
        """
        decoder = decode if isinstance(decode, Decoder) else Decoder(decode)
        self._min_tokens = min_tokens
        self._hidden = decoder.hidden
        self._detokenizer = Detokenizer(decoder, prompt)
        self._stop = StopStrings(stop, special=decoder.hidden.values())
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
            name = self._hidden.get(token)
            if name is None:
                text += self._search(self._detokenizer.push(token))
            else:
                text += self._search_special(name)
        return text

    def flush(self) -> str:
        """What was held back; no more tokens come."""
        return self._search(self._detokenizer.flush()) + self._stop.flush()

    def _search(self, text: str) -> str:
        return self._stop.push(text) if self.num_tokens > self._min_tokens else text

    def _search_special(self, name: str) -> str:
        """Text that is still held back stands before the special token, if that is the end."""
        mark = self._stop.mark(name)
        if not mark or self.num_tokens <= self._min_tokens:
            return ""
        ending = copy.copy(self._stop)
        text = ending.push(self._detokenizer.held() + mark)
        if ending.found:
            self._stop = ending
            return text
        return self._stop.push(mark)


class Detokenizer:
    """Tokens in, text out, one by one. What has come out, and what `flush` gives at the end, make
    the text that decoding all tokens at once gives.

    Text is held back as long as a later token could change it: the bytes of an incomplete
    character, and a run of byte tokens that is decoded as a whole. What a decoder does beyond
    that, such as replacing a word in the text of several tokens, is not foreseen.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        """After a prompt, the text is what decoding both adds to decoding the prompt: a character
        that the prompt begins belongs to it."""
        self._decode = decode if isinstance(decode, Decoder) else Decoder(decode)
        self._window = self._decode.context(prompt)
        """The last tokens, as far as the text of further ones may depend on them."""
        self._prompt = self._decode(self._window) if self._window else ""
        """The window's text before there were new tokens, until any of theirs is out."""
        self._sent = 0
        """Characters of the window's text that are out."""
        self._run: int | None = None
        """Where in the window the first incomplete character of all began."""
        self._limit = 2 * CONTEXT
        """The number of tokens from which on the window is shortened."""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if token in self._decode.hidden:
            return ""
        self._window.append(token)
        if self._decode.joins(token):
            return ""
        text = self._decode(self._window)
        new = self._take(text[: self._certain(text)])
        if len(self._window) >= self._limit:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """What is held back; no more tokens come."""
        return self._take(self._decode(self._window)) if self._window else ""

    def held(self) -> str:
        """What `flush` would give; it stays held back."""
        return copy.copy(self).flush()

    def _certain(self, text: str) -> int:
        """How many characters of the window's text no later token can change."""
        incomplete = text.endswith(REPLACEMENT)
        if self._decode.joint is None and (incomplete or self._run is not None):
            if self._run is None:
                self._run = len(self._window) - 1
            run = self._window[self._run :]
            if not incomplete:
                self._decode.learn(run)
                self._run = None
            elif len(run) < MAX_WINDOW:
                return 0
            else:  # garbage, whatever decodes it
                self._decode.joint, self._run = False, None
        if self._decode.joint:
            return 0 if self._decode.joins(self._window[-1]) else len(text)
        return max(len(text.rstrip(REPLACEMENT)), len(text) - MAX_OPEN)

    def _take(self, text: str) -> str:
        if self._prompt:
            self._sent = _common(self._prompt, text)
        new = text[self._sent :]
        if new:
            self._sent = len(text)
            self._prompt = ""
        return new

    def _shorten(self, text: str) -> None:
        """Forget tokens at the beginning of the window if the rest decodes alike: to the last
        character that is out, and all after it."""
        size = len(self._window)
        self._limit = size + CONTEXT
        if self._run is not None:
            return
        if 0 < self._sent <= len(text) and not self._prompt:
            end, pending = text[self._sent - 1 :], len(text) - self._sent
            near = [
                n for n in range(size - CONTEXT, size) if not self._decode.joins(self._window[n])
            ]
            before = self._decode.reach(self._window, size - CONTEXT)
            for start in [*near, *[before] * (before > 0)]:
                rest = self._decode(self._window[start:])
                if rest.endswith(end):
                    del self._window[:start]
                    self._sent = len(rest) - pending
                    self._limit = 2 * CONTEXT
                    return
        if size >= MAX_WINDOW:  # tokens without text
            shorter = self._window[: 2 * CONTEXT] + self._window[-CONTEXT:]
            if self._decode(shorter) == text:
                self._window = shorter
                self._limit = MAX_WINDOW


class StopStrings:
    """Lets text through up to the first stop string. Text that may be the beginning of one is held
    back."""

    def __init__(self, stop: Iterable[str], *, special: Iterable[str] = ()) -> None:
        """`special`: names of tokens that the text does not show. A stop string that has such a
        name is found in the text as it reads, and where the token, as its `mark`, stands for it.

        Raises:
            ConfigError: one of them is empty.
        """
        self._stop = tuple(stop)
        if "" in self._stop:
            raise ConfigError("a stop string must not be empty; it would stop before any text")
        named = {name for name in special if any(name in one for one in self._stop)}
        longest_first = sorted(named, key=lambda name: (-len(name), name))
        self._marks = {name: chr(code) for name, code in zip(longest_first, _MARKS, strict=False)}
        marked = self._stop
        for name, mark in self._marks.items():
            marked = tuple(one.replace(name, mark) for one in marked)
        self._stop += tuple(one for one in marked if one not in self._stop)
        self._held = ""
        self.found = False

    def mark(self, name: str) -> str:
        """What to push for a special token; empty if no stop string names it."""
        return self._marks.get(name, "")

    def push(self, text: str) -> str:
        if self.found:
            return ""
        text = self._held + text
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.found, self._held = True, ""
            return self._shown(text[: min(cuts)])
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return self._shown(text[: len(text) - keep])

    def flush(self) -> str:
        text, self._held = self._held, ""
        return self._shown(text)

    def _shown(self, text: str) -> str:
        for mark in self._marks.values():
            text = text.replace(mark, "")
        return text


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
