"""How tokens lie in the rows of a batch: padding, several documents in one row, and the positions
that follow from both. Knows the ways in which transformers' users say so; knows nothing of
attention.

B batch, T tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearized import documents
from linearized.errors import ModelError
from linearized.slots import attention_modules, slot_of

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
_COLLATED = (*_BOUNDS, "max_length_q", "max_length_k", "seq_idx")
"""What transformers' collators hand to models whose kernels know several documents in a row."""


def lay_out(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward without a state, where `segment_ids` [B, T] tell documents apart,
    and `position_ids` count tokens from 0 in each of them, padding left out. Documents are also
    known by `cu_seq_lens_q`, by `seq_idx`, or, where no attention mask is given, by `position_ids`
    that do not go on."""
    segments = _segments(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _COLLATED}
    if segments is not None:
        kwargs["segment_ids"] = segments
    if kwargs.get("position_ids") is None and takes_positions(module):
        mask = kwargs.get("attention_mask")
        if segments is not None:
            kwargs["position_ids"] = documents.positions(segments, None)
        elif mask is not None and is_padded(mask) and any(map(slot_of, attention_modules(module))):
            kwargs["position_ids"] = positions_after(None, mask)
    return kwargs


def is_padded(mask: Tensor) -> bool:
    """Does it say which tokens are padding, and are any?"""
    return mask.ndim == 2 and not bool(mask.all())


def positions_after(length: Tensor | None, mask: Tensor) -> Tensor:
    """[B, T], of the tokens that `mask` [B, T] keeps, after `length` [B] others."""
    counted = mask.long().cumsum(1) - 1
    return (counted if length is None else counted + length[:, None]).clamp(min=0)


def takes_positions(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(type(module).forward).parameters


def refuse_documents(kwargs: dict[str, Any]) -> None:
    """
    Raises:
        ModelError: several documents are to go into one state.
    """
    given = [name for name in ("segment_ids", *_COLLATED) if kwargs.get(name) is not None]
    if given:
        raise ModelError(
            f"{given[0]} puts several documents in a row, and a decode state holds one: decode "
            "them in rows of their own, or call the model with use_cache=False"
        )


def _segments(kwargs: dict[str, Any]) -> Tensor | None:
    """[B, T], or None: one document a row."""
    if kwargs.get("segment_ids") is not None:
        segments: Tensor = kwargs["segment_ids"]
        return segments
    rows, num_tokens, device = _shape(kwargs)
    bounds = [kwargs[name] for name in _BOUNDS if kwargs.get(name) is not None]
    if bounds:
        if rows != 1:
            raise ModelError(f"cu_seq_lens_q cuts one row into documents, got {rows} rows")
        columns = torch.arange(num_tokens, device=device)
        return torch.bucketize(columns, bounds[0][1:].to(device), right=True)[None]
    if kwargs.get("seq_idx") is not None:
        return kwargs["seq_idx"].expand(rows, -1)
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or kwargs.get("attention_mask") is not None:
        return None
    breaks = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
    if torch.compiler.is_compiling() or bool(breaks.any()):
        return breaks.long().cumsum(1).expand(rows, -1)
    return None


def _shape(kwargs: dict[str, Any]) -> tuple[int, int, torch.device]:
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    if given is None:  # an encoder-decoder model, whose stacks are asked in their turn
        return 1, 0, torch.device("cpu")
    return given.shape[0], given.shape[1], given.device
