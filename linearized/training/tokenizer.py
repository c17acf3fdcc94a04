"""Tokenizers: train one, open one, encode many texts, hold one against a model. Knows text and
token ids; knows nothing of blocks or of where texts come from.

The one door to the tokenizers library. What they turn text into is a transformers tokenizer folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
# The same, no piece longer than some hundred characters. A tokenizer is trained with these: time
# grows with the square of a piece's length, and one line of a megabyte would not end.
# (huggingface/tokenizers#86)
_SHORT_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}{1,256}"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,256}(?:\r?\n){0,128}[ \t]{0,256}"
    r"|\s{0,256}[\r\n]{1,256}[ \t]{0,256}"
    r"|\s{1,256}(?!\S)|\s{1,256}"
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""Folders with any of these have a tokenizer."""
_TRIED = (
    "Hello, world!",
    "def f(x):\n    return x",
    "größer, 日本語 🙂",
    "1234567",
    "  two spaces",
)
"""Texts by which a difference between two tokenizers is shown."""


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
    backend.pre_tokenizer = _cut(_SHORT_PIECES)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_some(texts), trainer)
    backend.pre_tokenizer = _cut(_PIECES)
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


class Edges(NamedTuple):
    """Ids before and after those of a document's text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def edges(tokenizer: PreTrainedTokenizerFast, end: str | None = None) -> Edges:
    """What the tokenizer puts around every text, such as a beginning of text, and one end of text:
    the token `end`, or else the tokenizer's own.

    Raises:
        ConfigError: `end` is no token of its.
    """
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    before, after = whole[:at], whole[at + len(text) :]
    last = tokenizer.eos_token_id if end is None else tokenizer.get_vocab().get(end)
    if last is None:
        special = ", ".join(sorted(map(str, tokenizer.all_special_tokens)))
        raise ConfigError(
            f"end={end!r} is no token of this tokenizer; choose one, such as its special ones: "
            f"{special}"
        )
    if end is not None and after[-1:] == [tokenizer.eos_token_id]:
        after = after[:-1]
    return Edges(tuple(before), (*after, *([] if after[-1:] == [last] else [last])))


def fingerprint(folder: Path | str) -> str:
    """A hash that is equal for folders that turn the same text into the same ids."""
    return _hash(_backend(folder))


def check_tokenizer(data: Path | str, model: Path | str) -> None:
    """Make sure that token blocks mean to a model what its own tokenizer says.

    Args:
        data: folder that jobs.data wrote, or one of a tokenizer.
        model: folder of a model, or its name on the Hugging Face Hub. If it has no tokenizer, only
            its vocabulary is looked at.

    Raises:
        DataError: the data were made with another tokenizer, or one that has ids beyond the
            model's vocabulary.
    """
    folder = Path(data) / "tokenizer"
    ours = load(folder if folder.is_dir() else data)
    theirs = _own(model)
    if theirs is not None:
        here, there = ours.backend_tokenizer, theirs.backend_tokenizer
        if _hash(here) != _hash(there) and not _agree(here, there):
            raise DataError(
                f"the tokenizer of {data} is not that of {model}: {_difference(here, there)}; make "
                f"data with jobs.data tokenizer={model}, or name the model that these are for"
            )
    largest = max(ours.get_vocab().values())
    size = _vocab_size(model)
    if size is not None and largest >= size:
        raise DataError(
            f"the tokenizer of {data} has ids up to {largest}, {model} a vocabulary of {size}; "
            f"make data with jobs.data tokenizer={model}, or name the model that these are for"
        )


class Encoder:
    """Turns texts into ids as a tokenizer folder does. It reads special tokens as plain text."""

    def __init__(self, folder: Path | str) -> None:
        self._backend = _backend(folder)
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


def _cut(pattern: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _backend(folder: Path | str) -> tokenizers.Tokenizer:
    file = Path(folder) / "tokenizer.json"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"there is no tokenizer in {folder}: {error.strerror}") from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises no class of its own
        raise DataError(f"{file} is no tokenizer that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _rules(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """All that turns text into ids, as JSON."""
    found = json.loads(backend.to_str())
    return {name: found[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


def _hash(backend: tokenizers.Tokenizer) -> str:
    rules = json.dumps(_rules(backend), sort_keys=True).encode()
    return hashlib.blake2b(rules, digest_size=16).hexdigest()


def _agree(ours: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer) -> bool:
    """Do they cut text alike, and do all ids of ours mean the same to the other, which may have
    added tokens that ours does not know?"""
    ours_rules, theirs_rules = _rules(ours), _rules(theirs)
    if any(ours_rules[n] != theirs_rules[n] for n in ("normalizer", "pre_tokenizer", "model")):
        return False
    return ours.get_vocab().items() <= theirs.get_vocab().items()


def _difference(ours: tokenizers.Tokenizer, theirs: tokenizers.Tokenizer) -> str:
    sizes = [backend.get_vocab_size() for backend in (ours, theirs)]
    if sizes[0] != sizes[1]:
        return f"it has {sizes[0]} entries, and the model's {sizes[1]}"
    for text in _TRIED:
        ids = [backend.encode(text, add_special_tokens=False).ids for backend in (ours, theirs)]
        if ids[0] != ids[1]:
            return f"{text!r} is {ids[0]} there, and to the model {ids[1]}"
    return "they cut text by other rules"


def _own(model: Path | str) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model. None: it has none."""
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in _FILES):
        return None
    return load(model)


def _vocab_size(model: Path | str) -> int | None:
    """Of the model's embedding."""
    try:
        if Path(model).is_dir():
            config = json.loads((Path(model) / "config.json").read_text())
        else:
            from transformers import PreTrainedConfig

            config = PreTrainedConfig.get_config_dict(model)[0]
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if size is None else int(size)
