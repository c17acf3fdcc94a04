"""Tokenizers: train one, open one, encode many texts. Knows text and token ids; knows nothing of
blocks or of where texts come from.

The one door to the tokenizers library. What they turn text into is a transformers tokenizer folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from linearized.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""The token between documents. Generation stops at it, and texts begin after it."""
PAD = "<|pad|>"
"""The padding token. It is not END: masking the loss at padding would then mask every end of text,
and no model would learn to stop."""
SMALLEST = 256 + 2
"""Number of entries of a byte-level vocabulary without any merges."""

# Words with the one character before them, numbers in threes, and, unlike GPT-2's pattern, runs of
# line ends together with the punctuation before and the indentation after them: `):\n        ` is
# one token. On the standard library at 2,048 entries that makes 3.68M tokens of 3.93M (GPT-2's) and
# 3.99M (Llama 3's). Whatever no alternative takes is kept as a piece too, so nothing is lost.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+(?:\r?\n)*[ \t]*"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)|\s+"
)


def train(texts: Iterable[str], vocab_size: int, folder: Path | str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries, specials included, saved to a folder that
    `AutoTokenizer.from_pretrained` opens.

    decode(encode(x)) == x for any text. The same texts make the same tokenizer, in any order and
    with any number of threads.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"vocab_size must be at least {SMALLEST} (every byte, and two special tokens), "
            f"got {vocab_size}"
        )
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_some(texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        # No model_max_length: how long a text may be is the model's to say, and a linearized
        # model's state does not grow with it.
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def load(name: Path | str) -> PreTrainedTokenizerFast:
    """A tokenizer folder or one on the Hugging Face Hub. DataError if it cannot be opened, has no
    end of text to put between documents, or is none of the tokenizers library's."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"tokenizer {str(name)!r} cannot be opened ({reason}); name a folder that holds a "
            "tokenizer.json, or leave it out to train one"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer {str(name)!r} has no tokenizer.json; convert it to a fast one")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {str(name)!r} has no eos_token to put between documents; set one and save "
            "it again"
        )
    return tokenizer


def fingerprint(folder: Path | str) -> str:
    """A hash that is equal for folders that turn the same text into the same ids."""
    return hashlib.blake2b(_json(folder), digest_size=16).hexdigest()


class Encoder:
    """Turns texts into ids as a tokenizer folder does. It reads special tokens as plain text."""

    def __init__(self, folder: Path | str) -> None:
        self._backend = tokenizers.Tokenizer.from_buffer(_json(folder))
        self._backend.no_truncation()
        self._backend.no_padding()
        # A text that spells out a special token does not end a document by that.
        self._backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any token before or after it."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _some(texts: Iterable[str]) -> Iterable[str]:
    """The texts, of which there must be one."""
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise DataError("there is no text to train a tokenizer on")


def _json(folder: Path | str) -> bytes:
    file = Path(folder) / "tokenizer.json"
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"there is no tokenizer in {folder}: {error.strerror}") from error
