"""Models out of Hugging Face folders, or the reason why a folder holds none. Knows files; knows
nothing of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch.nn import Module, ModuleList
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as hf_logging

from linearized.errors import LinearizedError, ModelError

LFS = b"version https://git-lfs"
"""How a file begins that Git has not fetched."""


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model, linearized or not, from a Hugging Face folder or name, in eval mode: of the class
    that it was saved from, a causal language model if its config names none.

    Raises:
        ModelError: there is none, or its weights do not fit its config.
    """
    show = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        kind = _architecture(transformers.AutoConfig.from_pretrained(path))
        opened: Any = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except LinearizedError:
        raise
    except (
        Exception
    ) as error:  # of any kind: readers of weights, quantizers, configs have their own
        raise ModelError(f"cannot load a model from {path}: {_reason(path, error)}") from error
    finally:
        if show:
            hf_logging.enable_progress_bar()
    model, info = opened
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the weights its config asks for, among them "
            f"{', '.join(missing[:3])}"
        )
    beyond = sorted(name for name in info["unexpected_keys"] if _is_of_a_layer_beyond(model, name))
    if beyond:
        raise ModelError(
            f"{path} holds {len(beyond)} weights of layers that its config does not have, among "
            f"them {', '.join(beyond[:3])}: is config.json of another model?"
        )
    return cast(PreTrainedModel, model.eval())


def outline(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that `load` would give, without its weights: on torch's meta device, where it takes
    next to no memory.

    Raises:
        ModelError: the folder's config makes no model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = _architecture(config)
        make = getattr(kind, "_from_config", None) or kind.from_config
        with torch.device("meta"):
            return cast(PreTrainedModel, make(config, dtype=dtype).eval())
    except LinearizedError:
        raise
    except Exception as error:  # of any kind, as above
        raise ModelError(f"cannot make a model of {path}: {_reason(path, error)}") from error


def _reason(path: str | Path, error: Exception) -> str:
    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for file in weights:
        with file.open("rb") as opened:
            if opened.read(len(LFS)) == LFS:
                return f"{file.name} is a Git LFS pointer, not weights: run `git lfs pull`"
    said = str(error).strip().split("\n")[0]
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut short ({said})"
    return said or type(error).__name__


def _is_of_a_layer_beyond(model: PreTrainedModel, name: str) -> bool:
    """Is a weight that the model has no place for one of its layers', had it more of them?"""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit():
            stacks = [model, model.base_model]  # saved with the head, or without
            found = [stack.get_submodule(".".join(parts[:depth])) for stack in stacks
                     if _has(stack, parts[:depth])]  # fmt: skip
            return any(isinstance(f, ModuleList) and int(part) >= len(f) for f in found)
    return False


def _has(module: Module, parts: Sequence[str]) -> bool:
    try:
        module.get_submodule(".".join(parts))
    except AttributeError:
        return False
    return True


def _architecture(config: Any) -> Any:
    """The class of transformers that a config names."""
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    return transformers.AutoModelForCausalLM
