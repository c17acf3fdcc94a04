"""The ingress' tokenizer: texts and chats to token ids and back, off the event loop, several at a
time. Knows the tokenizer of the target's folder, and no model.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import ParamSpec, TypeVar

import jinja2
import transformers

from linearized.errors import ConfigError
from linearized.speculative.decoder import REPLACEMENT
from linearized.speculative.generate import decoding
from serve_apps.http.errors import invalid, unsupported

CHARACTERS = 16
"""No text has more characters a token on average."""
THREADS = 4
"""Texts that are tokenized at a time."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")

P = ParamSpec("P")
T = TypeVar("T")


class Tokenizer:
    def __init__(self, path: str) -> None:
        """`path`: a Hugging Face folder.

        Raises:
            ConfigError: it holds no tokenizer.
        """
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} holds no tokenizer that can be loaded: {error}") from error
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        self._decode = decoding(self._tokenizer)
        # A first call settles the tokenizer's padding and truncation, which later ones, side by
        # side, then only read.
        before = list(self._ids("a", special=False)[-1:])
        self._before = (before, self._plain(before))
        """A token, and its text: what follows it is decoded as in the middle of a text."""
        self.name = lru_cache(2**14)(self._name)
        self.longest = min(max(map(len, self._tokenizer.get_vocab())), CHARACTERS)
        """Characters of a token at most, on average over a text."""

    @property
    def chats(self) -> bool:
        """Does it have a chat template?"""
        return self._tokenizer.chat_template is not None

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do some other work in one of the threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))

    async def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """`special`: with the special tokens that the tokenizer puts around texts."""
        return await self.run(self._ids, text, special=special)

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """The chat up to where the assistant begins to speak.

        Raises:
            ApiError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.chats:
            raise unsupported(
                "messages", "the model has no chat template; use /v1/completions with a prompt"
            )
        return await self.run(self._chat, messages)

    async def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """`special`: with the names of special tokens."""
        return await self.run(self._plain if special else self._decode, list(tokens))

    def hidden(self, token: int) -> bool:
        """Is it a special token, which no text shows?"""
        return token in self._decode.hidden

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _plain(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            message = f"the model's chat template does not take these messages: {said}"
            raise invalid("messages", message) from None
        return self._ids(str(text), special=False)

    def _name(self, token: int) -> tuple[str, bytes]:
        """How a token is shown, and the bytes that it stands for. A token that is part of a
        character is shown by its bytes, as OpenAI does."""
        before, start = self._before
        text = self._plain([*before, token])
        text = text[len(start) :] if text.startswith(start) else self._plain([token])
        if REPLACEMENT not in text:
            return text, text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        found = _bytes(piece) if isinstance(piece, str) else None
        if found is None:
            return text, text.encode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found


def _bytes(piece: str) -> bytes | None:
    """What a piece of a vocabulary of bytes stands for: `<0xE2>`, or letters that stand for
    bytes each, as in GPT-2's vocabulary."""
    byte = _BYTE.fullmatch(piece)
    if byte is not None:
        return bytes([int(byte.group(1), 16)])
    letters = _letters()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return None


@lru_cache(1)
def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones for themselves, the others from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): one for i, one in enumerate(others)}
