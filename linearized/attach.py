"""Linear attention put into a Hugging Face model, in place.

A linearized model is the same `PreTrainedModel` with

- a `linear_attention` submodule in every linearized attention module, which the attention function
  in `callbacks.py` calls,
- a slot in the decode state for every attention module,
- `config.linearized`, the `LinearConfig` as a dict, from which `from_pretrained` rebuilds it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from linearized.attention import VARIANTS, CrossAttention, Place
from linearized.cache import let_generate
from linearized.callbacks import no_position_bias
from linearized.config import LinearConfig
from linearized.head import widen_head
from linearized.rope import fix_rope
from linearized.slots import (
    NAME,
    SUBMODULE,
    assign_slots,
    attention_modules,
    forget_slots,
    heads_of,
    layer_number,
    linear_modules,
    named_attention_modules,
)


def attach(model: PreTrainedModel, config: LinearConfig) -> contextlib.ExitStack:
    """Give the attention modules that `config` names their linear attention, all of them their
    slots, and the model its config entry. Whoever closes what is returned undoes the changes to
    modules."""
    undo = contextlib.ExitStack()
    for name, module in named_attention_modules(model):
        number = layer_number(name)
        if config.layers is None or number in config.layers:
            variant = VARIANTS[config.attention](config, _place(name, module, model.config))
            cross = variant.place.kind == "cross"
            module.add_module(SUBMODULE, CrossAttention(variant) if cross else variant)
            undo.callback(delattr, module, SUBMODULE)
            hook = module.register_forward_pre_hook(no_position_bias, with_kwargs=True)
            undo.callback(hook.remove)
    assign_slots(model)
    undo.callback(forget_slots, model)
    for part in model.modules():  # which of them a head calls differs from model to model
        if not isinstance(part, PreTrainedModel):
            continue
        if not _has_decoder(part):  # which then has them
            for hook in let_generate(part):
                undo.callback(hook.remove)
        setattr(part.config, NAME, config.to_dict())
        # Saved in config.json, so that transformers refuses the folder where nobody has imported
        # linearized, instead of running it as the softmax model that it no longer is.
        part.config.attn_implementation = NAME
    return undo


def own_config(model: nn.Module) -> contextlib.ExitStack:
    """Give a model a copy of its config, and of all that hang on it, so that writing to it reaches
    no other model. Whoever closes what is returned gives back what was there."""
    undo = contextlib.ExitStack()
    copies: dict[int, Any] = {}
    for module in model.modules():
        shared = module.__dict__.get("config")
        if isinstance(shared, PreTrainedConfig):
            undo.callback(setattr, module, "config", shared)
            module.config = copy.deepcopy(shared, copies)  # type: ignore[assignment]
    return undo


def _has_decoder(model: PreTrainedModel) -> bool:
    """Is it an encoder-decoder model, rather than one of its two stacks?"""
    stacks = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return bool(getattr(model.config, "is_encoder_decoder", False) and stacks)


def _place(name: str, module: nn.Module, config: Any) -> Place:
    heads, kv_heads, width = heads_of(module, config)
    weight = next(module.parameters())
    return Place(
        layer=layer_number(name),
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        value_width=width,
        kind=_kind(name, module),
        dtype=weight.dtype,
        device=weight.device,
    )


def _kind(name: str, module: nn.Module) -> str:
    called = (name.rsplit(".", 1)[-1] + type(module).__name__).lower()
    crosses = getattr(module, "is_cross_attention", False)
    if crosses or "cross" in called or "encdec" in called or "encoder_attn" in called:
        return "cross"
    return "causal" if getattr(module, "is_causal", True) else "bidirectional"


def _attach_first() -> None:
    """Make `import linearized` enough for transformers to open a linearized folder: modules are
    attached while the model is built, before its weights are read."""
    post_init = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def attach_first(self: PreTrainedModel) -> None:
        settings = getattr(self.config, NAME, None)
        if settings and attention_modules(self) and not linear_modules(self):
            fix_rope(self)  # saved before that was done when linearizing
            attach(self, LinearConfig.from_dict(settings))
            self.config._attn_implementation = NAME
        if settings:
            widen_head(self)
        post_init(self)

    PreTrainedModel.post_init = attach_first  # type: ignore[method-assign]


_attach_first()
