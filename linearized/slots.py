"""Which modules of a model attend, and where in a decode state each of them finds its part. Knows
Hugging Face's modules; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from linearized.attention import CrossAttention, LinearAttention
from linearized.config import LinearConfig
from linearized.errors import ModelError
from linearized.identity import forget

NAME = "linearized"
"""Of the attention implementation, and of the entry in a model's config."""
SUBMODULE = "linear_attention"
"""Of an attention module that is linearized."""
_SLOT = "linear_slot"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the part of one attention module lies in a decode state."""

    kind: str
    """`linear`, `softmax` or `cross`: which of the state's tensors."""
    index: int
    """Along their first dimension."""


def assign_slots(model: nn.Module) -> None:
    """Give every attention module that reads a state its slot, first layer first. Call it again
    when layers are gone: what was worked out of the model is let go of, and its states are of
    another shape from then on."""
    forget(model)
    counts = {"linear": 0, "softmax": 0, "cross": 0}
    for module in attention_modules(model):
        kind = _kind(module)
        slot = None
        if kind is not None:
            slot = Slot(kind, counts[kind])
            counts[kind] += 1
        setattr(module, _SLOT, slot)


def forget_slots(model: nn.Module) -> None:
    """Undo `assign_slots`."""
    for module in attention_modules(model):
        module.__dict__.pop(_SLOT, None)


def slot_of(module: nn.Module) -> Slot | None:
    """None: the module reads no state, as it attends in both directions."""
    slot: Slot | None = getattr(module, _SLOT, None)
    return slot


def modules_by_kind(model: nn.Module, kind: str) -> list[nn.Module]:
    """The attention modules with slots of this kind, in the order of their slots."""
    found = [(slot.index, m) for m in attention_modules(model) if (slot := slot_of(m)) is not None
             and slot.kind == kind]  # fmt: skip
    return [module for _, module in sorted(found, key=lambda pair: pair[0])]


def is_hybrid(model: nn.Module) -> bool:
    """Do some layers keep softmax, and a history that grows?"""
    return bool(modules_by_kind(model, "softmax"))


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a Hugging Face model, first layer first."""
    return [module for _, module in named_attention_modules(model)]


def named_attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            yield name, module


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that are linearized, by name, first layer first."""
    return {n: m for n, m in named_attention_modules(model) if hasattr(m, SUBMODULE)}


def layer_number(name: str) -> int:
    """Of a module such as `model.layers.3.self_attn`: 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def variant_of(module: nn.Module) -> LinearAttention | CrossAttention | None:
    """The linear attention of an attention module, out of whatever it is wrapped in, as PEFT does
    with `modules_to_save`. None: it keeps softmax. Whoever computes calls the wrapper."""
    found = getattr(module, SUBMODULE, None)
    while found is not None and not isinstance(found, LinearAttention | CrossAttention):
        found = _inside(found)
    return found


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that linearizing added. They need a learning rate of their own."""
    added = [getattr(module, SUBMODULE) for module in linear_modules(model).values()]
    return [p for attention in added for p in attention.parameters()]


def linear_config(model: PreTrainedModel) -> LinearConfig:
    """How this model was linearized.

    Raises:
        ModelError: it was not.
    """
    settings = getattr(model.config, NAME, None)
    if not settings:
        raise ModelError(
            f"this {type(model).__name__} is not linearized; call "
            "linearized.linearize(model, config) first"
        )
    return LinearConfig.from_dict(settings)


def heads_of(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of an attention module."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        if getattr(module, name, None):
            return heads, kv_heads, getattr(module, name)
    return heads, kv_heads, config.hidden_size // heads


def _inside(wrapper: nn.Module) -> nn.Module | None:
    """The module that a wrapper calls now: the copy of its active adapter, if it has any."""
    copies = getattr(wrapper, "modules_to_save", {})
    active: Any = getattr(wrapper, "active_adapters", ()) or getattr(wrapper, "active_adapter", ())
    if not getattr(wrapper, "disable_adapters", False):
        for name in [active] if isinstance(active, str) else active:
            if name in copies:
                chosen: nn.Module = copies[name]
                return chosen
    return next(wrapper.children(), None)


def _kind(module: nn.Module) -> str | None:
    attention = variant_of(module)
    if isinstance(attention, CrossAttention):
        return "cross"
    if isinstance(attention, LinearAttention):
        return "linear" if attention.causal else None
    return "softmax" if getattr(module, "is_causal", True) else None
