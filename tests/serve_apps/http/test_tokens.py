"""The ingress' tokenizer: how tokens are named, and that texts do not wait for each other."""

from __future__ import annotations

import asyncio
import threading

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from linearized.errors import ConfigError
from serve_apps.http.tokens import Tokenizer


@pytest.fixture
def tokens(folder):
    found = Tokenizer(folder)
    yield found
    found.close()


def test_tokens_are_named_by_text_or_bytes(tokens, tokenizer):
    text = "the größe 日本🙂"
    ids = tokenizer(text)["input_ids"]
    named = [tokens.name(token) for token in ids]
    assert b"".join(spelt for _, spelt in named).decode() == text
    assert any(name.startswith("bytes:\\x") for name, _ in named)
    assert tokens.name(0) == ("<|endoftext|>", b"<|endoftext|>")
    assert tokens.hidden(0) and not tokens.hidden(5)


def test_words_keep_their_space_and_bytes_their_value(tmp_path):
    """As in the vocabularies of Llama 2 and Mistral."""
    words = ["<unk>", "<0xE2>", "<0x82>", "<0xAC>", "▁the", "▁a", "▁", "t", "a"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokens = Tokenizer(str(tmp_path))
    assert tokens.name(4) == (" the", b" the")
    assert [tokens.name(i) for i in (1, 2)] == [("bytes:\\xe2", b"\xe2"), ("bytes:\\x82", b"\x82")]
    tokens.close()


async def test_a_long_text_does_not_keep_others_waiting(tokens, monkeypatch):
    """vllm#24910: one thread tokenizes, and texts wait for each other."""
    free = threading.Event()
    ids = Tokenizer._ids

    def slowly(self, text, *, special):
        if text == "long":
            assert free.wait(60)
        return ids(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "_ids", slowly)
    long = asyncio.create_task(tokens.encode("long"))
    assert await tokens.encode("short")
    free.set()
    assert await long


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        Tokenizer(str(tmp_path))
