"""Tokens spell what the tokenizer's own decoder makes of them."""

from __future__ import annotations

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models

from linearized.errors import ConfigError
from linearized.speculative.vocabulary import spellings


def made(names: list[str], decoder, **special) -> transformers.PreTrainedTokenizerFast:
    vocab = {name: number for number, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    if decoder is not None:
        backend.decoder = decoder
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_byte_level(tokenizer):
    """A text's tokens spell the text's bytes, wherever a character is split."""
    found = spellings(tokenizer, len(tokenizer) + 3)
    text = "größere Wörter,\n 日本語 🙂🚀\x00\x7f"
    assert b"".join(found[one] for one in tokenizer(text)["input_ids"]) == text.encode()
    assert found[tokenizer.eos_token_id] == b"" and found[-3:] == [b""] * 3
    assert sorted(one for one in found if len(one) == 1) == [bytes([n]) for n in range(256)]


def test_byte_fallback():
    """A byte that another token spells has that token only: decoders see no run of bytes there."""
    names = ["<unk>", "<s>", "</s>", "<0x41>", "<0x0A>", "<0xC3>", "A", "▁A", "▁", "é", "a▁b"]
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = made(names, decoder, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    want = [b"", b"", b"", b"", b"\n", b"\xc3", b"A", b" A", b" ", "é".encode(), b"a b"]
    assert spellings(tokenizer, len(names)) == want


def test_metaspace():
    tokenizer = made(["▁a", "b", "<0x41>"], decoders.Metaspace())
    assert spellings(tokenizer, 3) == [b" a", b"b", b"<0x41>"]


def test_added_tokens_are_written_out():
    """Their content is text as it is, not in the letters for bytes."""
    tokenizer = made(["a", "Ġ"], decoders.ByteLevel())
    tokenizer.add_tokens(["<tool>", "  é"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    assert spellings(tokenizer, 5) == [b"a", b" ", b"<tool>", "  é".encode(), b""]
    assert spellings(tokenizer, 3, silent=[0, 7]) == [b"", b" ", b"<tool>"]


@pytest.mark.parametrize(
    "decoder,name",
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (None, "has none"),
    ],
)
def test_tokens_without_a_spelling_of_their_own_are_refused(decoder, name):
    with pytest.raises(ConfigError, match=name):
        spellings(made(["a", "b"], decoder), 2)
