"""What transformers calls in a linearized model: its attention function and its mask function.

Both are registered under the name "linearized". While a text is decoded, one `Context` travels down
to every layer as the keyword argument `linear_context`; several documents in a row travel as
`segment_ids`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from linearized.attention import CrossAttention, LinearAttention, softmax_attention
from linearized.context import Context
from linearized.errors import ModelError
from linearized.slots import NAME, SUBMODULE, slot_of, variant_of

NO_CONCERN = {
    "cache", "cache_position", "cache_params", "deterministic", "logits_to_keep",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "past_key_value", "past_key_values", "position_embeddings", "position_ids", "return_dict",
    "token_type_ids", "use_cache",
}  # fmt: skip
"""Arguments that travel through a model and do not change what attention computes."""


def attend(
    module: nn.Module,
    q: Tensor,  # [B, H, T, D]
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    linear_context: Context | None = None,
    segment_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer of a linearized model. Layers
    that keep softmax honour dropout and soft caps; linear ones have no scores to apply them to.

    Raises:
        ModelError: the model asks for something else.
    """
    _refuse(module, others)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ModelError(
            f"{type(module).__name__} got an attention mask of {attention_mask.ndim} dimensions; a "
            "linearized model takes [rows, tokens], which says what is padding, and segment_ids"
        )
    attention: Any = getattr(module, SUBMODULE, None)
    slot = slot_of(module)
    variant = variant_of(module)
    if isinstance(variant, CrossAttention):
        if linear_context is not None and slot is not None:
            out = linear_context.attend_across(
                slot.index, attention, q, k, v, scaling, attention_mask
            )
        else:
            out, _memory = attention(q, k, v, scaling=scaling, mask=attention_mask)
        return out.transpose(1, 2).contiguous(), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if variant is None:
        _refuse(module, {"position_bias": position_bias})
    else:
        _refuse(module, {"sliding_window": sliding_window})
        _check(module, variant, q, k, v, causal)
    softmax: dict[str, Any] = {
        "causal": causal,
        "scaling": scaling,
        "softcap": softcap,
        "dropout": dropout,
        "window": sliding_window,
    }
    if linear_context is not None and slot is not None:
        if variant is None:
            out = linear_context.attend_softmax(slot.index, q, k, v, **softmax)
        else:
            out = linear_context.attend(slot.index, attention, q, k, v, scaling, variant.backend)
    elif q.shape[2] != k.shape[2]:
        raise ModelError(
            "a linearized model keeps a state, not a key/value cache: decode with "
            "linearized.generate, with extend / verify / commit, or with model.generate"
        )
    else:
        mask = last(attention_mask, q.shape[2])
        if variant is None:
            out = softmax_attention(q, k, v, mask=mask, segments=segment_ids, **softmax)
        else:
            out, _, _ = attention(q, k, v, scaling=scaling, mask=mask, segments=segment_ids)
    return out.transpose(1, 2).contiguous(), None


def make_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask function that goes with `attend`. Causality is the operator's own, so only padding
    is handed down, [B, columns], and only if there is any."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def last(mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """Of the last `num_tokens` columns."""
    return None if mask is None else mask[:, -num_tokens:]


def no_position_bias(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """T5 works out a bias for every pair of tokens, which nobody reads: hand it an empty one."""
    if "position_bias" not in kwargs or kwargs["position_bias"] is not None:
        return None
    return args, {**kwargs, "position_bias": next(module.parameters()).new_zeros(1, 1, 1, 1)}


def _check(
    module: nn.Module, variant: LinearAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> None:
    """Raises ModelError if a module calls its linear attention as another than it was made for."""
    name, place = type(module).__name__, variant.place
    found = q.shape[1], k.shape[1], k.shape[3], v.shape[3]
    made = place.heads, place.kv_heads, place.width, place.value_width
    if found != made:
        raise ModelError(
            "{} has {} query heads and {} of keys and values, of widths {} and {}; ".format(
                name, *found
            )
            + "its config promises {}, {}, {} and {}".format(*made)
        )
    if causal != variant.causal:
        raise ModelError(
            f"{name} was linearized with is_causal={variant.causal} and is called with "
            f"is_causal={causal}"
        )


def _refuse(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raises ModelError if one of these is set."""
    for name, value in arguments.items():
        if name in NO_CONCERN or value is None:
            continue
        if isinstance(value, Tensor) or value not in (0, False):
            raise ModelError(
                f"{type(module).__name__} asks its attention for `{name}`, which has no "
                "counterpart in a linearized model"
            )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
