"""A tokenizer's `decode`, and what a stream has to know about it: which tokens it leaves out, and
which it decodes together with their neighbours.

Tokenizers of the Llama-2, Mistral and Gemma kind have a token for each byte. They decode a run of
such tokens as a whole: one byte that fits no character turns the run, however long it is, into
replacement characters. So no text of a run is certain before a token of another kind ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""
MAX_BYTES = 4
"""Of a character."""
CONTEXT = 8
"""Tokens before the new ones that are decoded with them. Decoders treat the first token of all in
a way of its own, and some compare a token with the one before it."""


class Decoder:
    """Token ids to text. Call it as you would call `decode`."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        run: Sequence[int] | None = None,
        hidden: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            decode: token ids to text.
            run: two or more tokens, a byte each, that spell one character together; empty if the
                vocabulary has no such tokens. None: not known. A stream then learns it from the
                first such character, and may send a letter that a byte token spells too early.
            hidden: the names of tokens that `decode` leaves out of the text.
        """
        self._decode = decode
        self.hidden = dict(hidden or {})
        self.joint: bool | None = None if run is None else False
        """Are runs of byte tokens decoded as a whole? None: not known yet."""
        self._run: list[int] = []
        self._joins: dict[int, bool] = {}
        if run:
            self.learn(run)

    def __call__(self, tokens: list[int]) -> str:
        return self._decode(tokens)

    def learn(self, run: Sequence[int]) -> None:
        """Find out how bytes are decoded, from tokens whose last ones may spell a character."""
        for size in range(2, MAX_BYTES + 1):
            self._run = list(run[-size:])
            text = self(self._run)
            incomplete = self(self._run[:-1]).endswith(REPLACEMENT)
            if incomplete and REPLACEMENT not in text:
                self.joint = not self([*self._run, self._run[0]]).startswith(text)
                break

    def joins(self, token: int) -> bool:
        """May a later token change the text of this one, although it looks complete?"""
        if not self.joint:
            return False
        if token not in self._joins:
            whole = self(self._run)
            longer = self([*self._run, token])
            broken = self([*self._run, token, self._run[0]])
            self._joins[token] = not (longer.startswith(whole) and broken.startswith(longer))
        return self._joins[token]

    def context(self, prompt: Sequence[int]) -> list[int]:
        """The end of a prompt, so long that new tokens decode after it as after all of it."""
        size = CONTEXT
        while True:
            start = max(len(prompt) - size, 0)
            for _ in range(MAX_BYTES):  # one of so many tokens begins a character, but in garbage
                start = self.reach(prompt, start)
                found = [token for token in prompt[start:] if token not in self.hidden]
                text = self(found) if found else ""
                if not start or (text and not text.startswith(REPLACEMENT)):
                    return found
                start -= 1
            size = 2 * (len(prompt) - start)

    def reach(self, tokens: Sequence[int], start: int) -> int:
        """Where the last token up to `start` is that is not decoded together with those before
        it; 0 if there is none."""
        while start and (tokens[start] in self.hidden or self.joins(tokens[start])):
            start -= 1
        return start
