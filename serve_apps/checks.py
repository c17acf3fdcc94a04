"""What can be told of an app before a replica starts: folders, devices, memory. Knows configs and
tokenizers; loads no weights.

A name that is no folder here may be one of the Hugging Face hub, or a folder of the cluster's
machines: what a replica finds out about it comes later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase

from linearized.errors import ConfigError
from serve_apps.draft.replica import DraftConfig
from serve_apps.memory import Needs
from serve_apps.settings import AppArgs
from serve_apps.target.config import TargetConfig
from serve_apps.tokenizers import tokenizer_in

DRAFT = "draft"


def check_app(args: AppArgs) -> None:
    """
    Raises:
        ConfigError: it would not start, or its draft would be of no use. ModelError: a folder
            holds no model that can be served.
    """
    single = args.target is not None
    named = {"target" if single else f"targets.{name}": at for name, at in args.folders.items()}
    check_folders(named, args.draft)
    for name, folder in named.items():
        check_target(name, folder, args.target_config(folder))
    if args.drafts_apart and args.draft is not None:
        check_draft(args.draft, args.draft_config())


def check_target(name: str, folder: Path, config: TargetConfig) -> None:
    """
    Raises:
        ConfigError: this machine has no such device, or too little memory.
    """
    check_device(name, config.device)
    if folder.exists():
        remedy = "lower max_sessions, or set target_dtype=bfloat16"
        rows, longest = config.max_sessions, config.max_context
        needs = Needs.of(config.path, dtype=config.dtype, rows=rows, max_context=longest)
        if config.draft is not None and Path(config.draft).exists():
            needs += Needs.of(
                config.draft, dtype=config.draft_dtype, rows=rows, max_context=longest
            )
        needs.check(f"{name}={folder}", device=config.device, remedy=remedy)


def check_draft(folder: Path, config: DraftConfig) -> None:
    """
    Raises:
        ConfigError: this machine has no such device, or too little memory.
    """
    check_device(DRAFT, config.device)
    if folder.exists():
        needs = Needs.of(config.path, dtype=config.dtype, rows=1, max_context=0)
        needs.check(f"draft={folder}", device=config.device, remedy="set draft_dtype=bfloat16")


def check_device(name: str, device: str) -> None:
    """Of a cluster, Serve knows which machines have GPUs, and waits for one.

    Raises:
        ConfigError: this is the only machine, and it has no GPU.
    """
    alone = "RAY_ADDRESS" not in os.environ and "RAY_JOB_ID" not in os.environ
    if device == "cuda" and alone and not torch.cuda.is_available():
        kind = name.split(".")[0].rstrip("s")
        raise ConfigError(
            f"{kind}_device=cuda: torch finds no GPU on this machine; set {kind}_device=cpu, or "
            "RAY_ADDRESS if a cluster with GPUs is to run it"
        )


def check_folders(targets: Mapping[str, Path], draft: Path | None) -> None:
    """`targets`: by what they are called in messages.

    Raises:
        ConfigError: the app would not start with them, or its draft would be of no use.
    """
    found = [_look(path, name) for name, path in targets.items()]
    folders = [folder for folder in found if folder is not None]
    drafting = _look(draft, DRAFT) if draft is not None else None
    for folder in (*folders, drafting):
        if folder is not None:
            _check(folder)
    for folder in folders:
        if drafting is not None:
            _compare(folder, drafting)


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
    tokenizer = tokenizer_in(path, name)
    if tokenizer is None and name != DRAFT:  # a draft drafts token ids
        raise ConfigError(
            f"{name}={path} holds no tokenizer; save one there with its save_pretrained"
        )
    if tokenizer is not None:
        ends["the tokenizer"] = _ids(tokenizer.eos_token_id)
    return _Folder(name, path, config.get_text_config().vocab_size, ends, tokenizer)


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
                f"draft={draft.path} has a vocabulary of {draft.vocab_size}, "
                f"{target.name}={target.path} one of {target.vocab_size}; save the tokenizer "
                "beside the draft, too, to show that they share it"
            )
        return
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        token, number = min(ours.items() ^ theirs.items(), key=lambda one: one[1])
        raise ConfigError(
            f"draft={draft.path} has another tokenizer than {target.name}={target.path}: only one "
            f"of them has {token!r} as id {number}; a draft must share the target's"
        )


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
