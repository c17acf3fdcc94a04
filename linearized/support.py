"""What can be linearized, and why something cannot: what is known from a model's config and
modules. `probe.py` tries the rest."""

from __future__ import annotations

import warnings
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from linearized.config import FLASH, LinearConfig
from linearized.errors import ModelError
from linearized.slots import NAME, layer_number, named_attention_modules

KEPT = ("full_attention", "sliding_attention")
"""Kinds of layers that may stay as they are beside linear ones."""


def refuse_unsupported(model: PreTrainedModel, config: LinearConfig) -> None:
    """
    Raises:
        ModelError: this model cannot be linearized so; says why.
    """
    name = type(model).__name__
    if getattr(model.config, NAME, None):
        raise ModelError(f"this {name} is linearized already")
    if config.attention == FLASH:
        raise ModelError(
            f"{name} cannot become FLASH, which is a model of its own: train a "
            "FlashForCausalLM(FlashConfig(…)), or choose attention='grouped'"
        )
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{name} cannot be linearized: its attention does not go through transformers' "
            "AttentionInterface"
        )
    modules = dict(named_attention_modules(model))
    if not modules:
        raise ModelError(f"{name} cannot be linearized: no self-attention module found in it")
    if not hasattr(model.config, "num_attention_heads"):
        raise ModelError(
            f"{name} cannot be linearized: it is a model of several parts, each with a config of "
            "its own; linearize the language model alone"
        )
    numbers = {layer_number(module) for module in modules}
    chosen = numbers if config.layers is None else set(config.layers)
    if chosen - numbers:
        raise ModelError(
            f"{name} has layers 0 to {max(numbers)}, there is no layer "
            f"{', '.join(map(str, sorted(chosen - numbers)))} to linearize"
        )
    if chosen != numbers and getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model: linearize all of its layers")
    windowed = [number for number in sorted(chosen) if _is_windowed(model.config, number)]
    if windowed:
        whole = sorted(chosen - set(windowed))
        remedy = f"keep them: LinearConfig(layers={whole})" if whole else "it has no other layers"
        raise ModelError(
            f"layers {', '.join(map(str, windowed))} of {name} attend within a sliding window or "
            f"chunk, which has no linear counterpart here; {remedy}"
        )
    strange = sorted(set(getattr(model.config, "layer_types", None) or ()) - set(KEPT))
    if strange:
        raise ModelError(
            f"{name} cannot be linearized: it has layers of kind {', '.join(strange)}, and what "
            "they keep from token to token has no place in a decode state"
        )


def warn_of_losses(model: PreTrainedModel) -> None:
    """Of what a softmax model does with its scores, linear layers having none."""
    name, config = type(model).__name__, model.config
    if getattr(config, "attn_logit_softcapping", None):
        warnings.warn(
            f"{name} caps its attention scores at {config.attn_logit_softcapping}; linearized "
            "layers have no scores to cap, the setting is ignored there",
            stacklevel=3,
        )
    if any("relative_attention_bias" in part for part, _ in model.named_parameters()):
        warnings.warn(
            f"{name} adds a relative position bias to its attention scores; linearized layers "
            "ignore it, their convolution knows relative positions",
            stacklevel=3,
        )


def _is_windowed(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return bool(kinds[layer] != "full_attention")
    uses = getattr(config, "use_sliding_window", True)
    return bool(uses and getattr(config, "sliding_window", None))
