"""Tokenizers in folders, and whether two of them are the same. Knows no model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase

from linearized.errors import ConfigError


def tokenizer_in(path: Path, name: str) -> PreTrainedTokenizerBase | None:
    """That of a model's folder, if it holds one. `name` is that of the folder in messages.

    Raises:
        ConfigError: it cannot be read.
    """
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever transformers raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(f"{name}={path}: its tokenizer cannot be read: {reason}") from error
    return found


def hash_in(path: Path) -> str:
    """The hash of the tokenizer in a folder; empty if there is none in it."""
    found = tokenizer_in(path, "draft") if path.is_dir() else None
    return "" if found is None else tokenizer_hash(found)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same ids for the same tokens."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()
