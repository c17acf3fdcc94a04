"""Decode states for a model: allocated, and checked to be its own. Knows modules and shapes; knows
nothing of what is folded in.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.modeling_utils import PreTrainedModel

from linearized.attention import CrossAttention, LinearAttention
from linearized.errors import ModelError, StateError
from linearized.identity import fingerprint
from linearized.slots import (
    attention_modules,
    heads_of,
    linear_config,
    modules_by_kind,
    variant_of,
)
from linearized.state import DecodeState, GroupState, History, new_stamps

_SHAPES = "_linearized_shapes"


def new_state(model: PreTrainedModel, batch_size: int = 1) -> DecodeState:
    """An empty decode state for this many sequences. It takes `state.nbytes` bytes, now and
    forever, unless some layers keep softmax.

    Raises:
        ModelError: a model that reads in both directions and so has none.
    """
    return _allocate(model, batch_size, fingerprint(model, fresh=True))


def state_bytes(model: PreTrainedModel, num_tokens: int = 0) -> int:
    """What the state of one sequence of so many tokens takes. The model may be one without weights,
    on torch's meta device.

    Raises:
        ModelError: a model that reads in both directions and so has none.
    """
    state = _allocate(model, 1, "")
    if state.history is None:
        return state.nbytes
    return state.nbytes - state.history.nbytes + state.history.bytes_at(num_tokens)


@torch.inference_mode(False)
def _allocate(model: PreTrainedModel, batch_size: int, fingerprint: str) -> DecodeState:
    linear_config(model)
    if batch_size < 1:
        raise StateError(f"batch_size must be at least 1, got {batch_size}")
    kinds = {kind: modules_by_kind(model, kind) for kind in ("linear", "softmax", "cross")}
    if not kinds["linear"] and not kinds["softmax"]:
        raise ModelError(
            f"{type(model).__name__} reads its text in both directions: call it as a whole, it has "
            "no decode state"
        )
    where: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    layers = GroupState.none(batch_size, **where)
    history = memory = shift = None
    if linear := kinds["linear"]:
        first = cast(LinearAttention, variant_of(linear[0]))
        layers = first.empty_state(len(linear), batch_size, **where)
    if softmax := kinds["softmax"]:
        _, kv_heads, width = heads_of(softmax[0], model.config)
        history = History.empty(len(softmax), batch_size, kv_heads, width, width, **where)
    if crossed := kinds["cross"]:
        cross = cast(CrossAttention, variant_of(crossed[0]))
        memory = cross.empty_memory(len(crossed), batch_size, **where)
    shifted = getattr(attention_modules(model)[0], "shifted", 0)
    if shifted:
        shift = torch.zeros(len(linear), batch_size, shifted, **where)
    stamp = new_stamps(batch_size)
    return DecodeState(layers, fingerprint, history, memory, shift, stamp)


def check_state(model: PreTrainedModel, state: DecodeState) -> None:
    """
    Raises:
        StateError: the state is not one of this model.
    """
    state.check(fingerprint(model))
    wanted = model.__dict__.get(_SHAPES)
    if wanted is None:
        wanted = model.__dict__[_SHAPES] = new_state(model).shapes()
    if state.shapes() != wanted:
        raise StateError(f"damaged decode state: its tensors are {state.shapes()}, not {wanted}")
