"""What can be told of an app's folders before a replica starts. Knows configs and tokenizers; loads
no weights.

A name that is no folder here may be one of the Hugging Face hub, or a folder of the cluster's
machines: what a replica finds out about it comes later.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from linearized.errors import ConfigError


def check_folders(target: Path, draft: Path | None) -> None:
    """
    Raises:
        ConfigError: the app would not start with them, or its draft would be of no use.
    """
    found = [_look(path, name) for path, name in ((target, "target"), (draft, "draft")) if path]
    folders = [folder for folder in found if folder is not None]
    for folder in folders:
        _check(folder)
    if len(folders) == 2:
        _compare(*folders)


@dataclass(frozen=True, slots=True)
class _Folder:
    name: str
    path: Path
    vocab_size: int
    ends: dict[str, list[int]]
    """End-of-text ids, by where they are named."""
    tokenizer: PreTrainedTokenizerBase | None


def _look(path: Path, name: str) -> _Folder | None:
    if not path.exists():
        if path.is_absolute() or len(path.parts) > 2:
            raise ConfigError(f"{name}={path}: there is no such folder; give a Hugging Face folder")
        return None
    if not (path / "config.json").is_file():
        raise ConfigError(f"{name}={path} holds no config.json; give a Hugging Face folder")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever transformers raises
        raise ConfigError(f"{name}={path}: its config.json is of no use: {_line(error)}") from error
    ends = {"config.json": _ids(config.eos_token_id)}
    if (path / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(path)
        ends["generation_config.json"] = _ids(own.eos_token_id)
    tokenizer = _tokenizer(path, name)
    if tokenizer is not None:
        ends["the tokenizer"] = _ids(tokenizer.eos_token_id)
    return _Folder(name, path, config.get_text_config().vocab_size, ends, tokenizer)


def _tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase | None:
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        if name == "draft":
            return None  # it drafts token ids
        raise ConfigError(
            f"{name}={path} holds no tokenizer; save one there with its save_pretrained"
        )
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever transformers raises
        raise ConfigError(f"{name}={path}: its tokenizer cannot be read: {_line(error)}") from error
    return found


def _check(folder: _Folder) -> None:
    size = folder.vocab_size
    for place, ids in folder.ends.items():
        for token in ids:
            if not 0 <= token < size:
                raise ConfigError(
                    f"{folder.name}={folder.path}: {place} names the end-of-text id {token}, "
                    f"outside the model's vocabulary of {size}; correct eos_token_id there"
                )
    if folder.tokenizer is not None:
        largest = max(folder.tokenizer.get_vocab().values(), default=0)
        if largest >= size:
            raise ConfigError(
                f"{folder.name}={folder.path}: its tokenizer has the id {largest}, outside the "
                f"model's vocabulary of {size}; they do not belong together"
            )


def _compare(target: _Folder, draft: _Folder) -> None:
    if target.tokenizer is None or draft.tokenizer is None:
        if target.vocab_size != draft.vocab_size:
            raise ConfigError(
                f"draft={draft.path} has a vocabulary of {draft.vocab_size}, target={target.path} "
                f"one of {target.vocab_size}; save the tokenizer beside the draft, too, to show "
                "that they share it"
            )
        return
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        token, number = min(ours.items() ^ theirs.items(), key=lambda one: one[1])
        raise ConfigError(
            f"draft={draft.path} has another tokenizer than target={target.path}: only one of them "
            f"has {token!r} as id {number}; a draft must share the target's"
        )


def hash_in(path: Path) -> str:
    """The hash of the tokenizer in a folder; empty if there is none in it."""
    found = _tokenizer(path, "draft") if path.is_dir() else None
    return "" if found is None else tokenizer_hash(found)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers with the same ids for the same tokens."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
