"""What each token of a vocabulary spells, in bytes. Knows a tokenizer; knows nothing of grammars.

A decoder that joins tokens by a rule of its own, as WordPiece does, gives no token a spelling of
its own, so such a tokenizer is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearized.errors import ConfigError

_SPACE = "\u2581"
"""Stands for a space in vocabularies of the SentencePiece kind."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_HARMLESS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Strip"}
"""Decoders that leave each token its spelling; Strip takes a space off the beginning of all."""


def spellings(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, silent: Iterable[int] = ()
) -> list[bytes]:
    """The bytes of each of `vocab_size` tokens. Special tokens, those in `silent`, and ids that the
    tokenizer does not have spell nothing. A token for one byte that another token spells as well
    spells nothing either: decoders turn a run of such tokens into replacement characters as a whole
    if one of them fits no character.

    Raises:
        ConfigError: a tokenizer whose tokens have no spelling of their own.
    """
    kinds = _decoders(tokenizer)
    by_byte, spaced = "ByteLevel" in kinds, _SPACE in kinds
    found = [b""] * vocab_size
    single: dict[int, bytes] = {}
    for token, number in tokenizer.get_vocab().items():
        if not 0 <= number < vocab_size:
            continue
        byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
        if by_byte:
            found[number] = _of_byte_level(token)
        elif byte:
            single[number] = bytes.fromhex(byte[1])
        else:
            found[number] = (token.replace(_SPACE, " ") if spaced else token).encode()
    added = tokenizer.added_tokens_decoder.items()
    for number, one in added:
        if 0 <= number < vocab_size and number not in single:
            found[number] = b"" if one.special else one.content.encode()
    for number in {*tokenizer.all_special_ids, *silent}:
        if 0 <= number < vocab_size:
            found[number] = b""
            single.pop(number, None)
    spelled = set(found)
    for number, letter in single.items():
        if letter not in spelled:
            found[number] = letter
    return found


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The kinds of decoders that the tokenizer has, and `_SPACE` if one of them turns that into a
    space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        raise ConfigError(
            f"guided decoding needs a tokenizer of the tokenizers library with a decoder, "
            f"{type(tokenizer).__name__} has none"
        )
    top = json.loads(decoder.__getstate__())
    parts: list[dict[str, Any]] = top["decoders"] if top["type"] == "Sequence" else [top]
    kinds: set[str] = set()
    for part in parts:
        kind = part["type"]
        if kind == "Replace" and part["pattern"] == {"String": _SPACE} and part["content"] == " ":
            kind = _SPACE
        elif kind == "Metaspace" and part["replacement"] == _SPACE:
            kinds.add(_SPACE)
        elif kind not in _HARMLESS:
            raise ConfigError(
                f"guided decoding cannot tell what single tokens spell where a tokenizer has the "
                f"decoder {kind}; it takes byte-level and SentencePiece vocabularies"
            )
        kinds.add(kind)
    return kinds


def _of_byte_level(token: str) -> bytes:
    """Of a token whose every letter stands for a byte; one with other letters spells itself."""
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError:
        return token.encode()


def _bytes_by_letter() -> dict[str, int]:
    """The letters for bytes in byte-level vocabularies (Radford et al., GPT-2, 2019)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    return letters | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _bytes_by_letter()
