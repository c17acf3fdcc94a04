"""One forward on top of a decode state, as a pure function of tensors. `step` verifies a tree of
tokens, `read` takes tokens that follow the state in time; both return logits and what the state
would take in, and write nothing. `fold.py` is the one writer.

The loop over layers is transformers' own. B batch, N tree nodes, T tokens, V vocabulary, C hidden
width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from linearized import ops
from linearized.context import Context
from linearized.rows import positions_after
from linearized.state import DecodeState, Fresh
from linearized.tables import reading_at
from linearized.tree import Tree


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward gives."""

    logits: Tensor
    """[B, N or T, V], or of the last columns only."""
    fresh: Fresh | None
    """For `fold`; None: some of the model's layers were left out on purpose."""
    hidden: Tensor | None = None
    """[B, N, C], of the last layer, where it was asked for."""


Stepper = Callable[..., Step]
_STEPPER = "_linearized_stepper"
_PART = "_linearized_part"
PARTS = "_linearized_parts"
"""Under which a model keeps those of itself that have fewer layers."""


def step(model: PreTrainedModel, tree: Tree, state: DecodeState, *, hidden: bool = False) -> Step:
    """Logits at every node, each as decoding along its path would give. Runs eagerly, or as the
    compiled program that `linearized.compile` has put in its place."""
    stepper: Stepper = model.__dict__.get(_STEPPER, step_eagerly)
    return stepper(model, tree, state, hidden=hidden)


def step_eagerly(
    model: PreTrainedModel, tree: Tree, state: DecodeState, *, hidden: bool = False
) -> Step:
    trim = not tree.visible.is_cuda  # on a GPU, looking would wait
    context = Context(state=state, layout=layout_of(tree.visible, state, trim=trim))
    return forward(model, tree.tokens, context, hidden=hidden)


def read(
    model: PreTrainedModel,
    tokens: Tensor,
    state: DecodeState,
    *,
    mask: Tensor | None = None,
    logits_to_keep: int = 0,
) -> Step:
    """Tokens [B, T] that follow the state's, those that `mask` [B, T] keeps."""
    return forward(model, tokens, Context(state=state, mask=mask), logits_to_keep=logits_to_keep)


def layout_of(visible: Tensor, state: DecodeState, *, trim: bool) -> ops.Layout:
    """How the nodes of trees [B, N, N] lie to a state."""
    layers = state.layers
    return ops.Layout.of(visible, state.length, near=layers.near, taps=layers.taps, trim=trim)


def stepper_of(model: PreTrainedModel) -> Stepper | None:
    """Who runs `step` for this model, if somebody has been put in place."""
    stepper: Stepper | None = model.__dict__.get(_STEPPER)
    return stepper


def set_stepper(model: PreTrainedModel, stepper: Stepper | None) -> None:
    if stepper is None:
        model.__dict__.pop(_STEPPER, None)
    else:
        model.__dict__[_STEPPER] = stepper


def mark_part(model: PreTrainedModel) -> None:
    """Some of this model's layers were left out on purpose: what it leaves behind is not whole."""
    model.__dict__[_PART] = True


def forward(
    model: PreTrainedModel,
    tokens: Tensor,
    context: Context,
    *,
    logits_to_keep: int = 0,
    hidden: bool = False,
) -> Step:
    """The model on new tokens [B, T], with a context that says what lies before them."""
    inputs = _inputs(model, tokens, context)
    with _positioned(model, tokens, context):
        output = model(
            **inputs, use_cache=False, linear_context=context, output_hidden_states=hidden,
            **_kept(model, logits_to_keep),
        )  # fmt: skip
    logits = output.logits[:, -logits_to_keep:]
    fresh = None if _PART in model.__dict__ else context.fresh()
    return Step(logits, fresh, output.hidden_states[-1] if hidden else None)


def _inputs(model: PreTrainedModel, tokens: Tensor, context: Context) -> dict[str, Any]:
    """What a model is to be called with for these tokens."""
    if getattr(model.config, "is_encoder_decoder", False):
        # The memory of the encoder's text is in the state: all that is asked of it is a shape.
        nothing = torch.zeros(len(tokens), 1, model.config.hidden_size, device=tokens.device)
        encoded = BaseModelOutput(last_hidden_state=nothing.to(model.dtype))
        return {"encoder_outputs": encoded, "decoder_input_ids": tokens}
    return {"input_ids": tokens, "position_ids": _positions(tokens, context)}


def _positions(tokens: Tensor, context: Context) -> Tensor:
    """[B, T], in each row's text."""
    if context.layout is not None:
        return context.layout.positions
    there = torch.ones_like(tokens) if context.mask is None else context.mask
    return positions_after(context.state.length, there)


def _positioned(
    model: PreTrainedModel, tokens: Tensor, context: Context
) -> contextlib.AbstractContextManager[None]:
    """Decoders of encoder-decoder models take no `position_ids`."""
    if getattr(model.config, "is_encoder_decoder", False):
        return reading_at(model, _positions(tokens, context))
    return contextlib.nullcontext()


def _kept(model: PreTrainedModel, logits_to_keep: int) -> dict[str, int]:
    """Decoders of encoder-decoder models know no `logits_to_keep`."""
    if getattr(model.config, "is_encoder_decoder", False):
        return {}
    return {"logits_to_keep": logits_to_keep}
