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

from linearized.attention import CrossAttention, softmax_attention
from linearized.context import Context
from linearized.errors import ModelError
from linearized.slots import NAME, SUBMODULE, slot_of


def attend(
    module: nn.Module,
    q: Tensor,  # [B, H, T, D]
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    linear_context: Context | None = None,
    segment_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer of a linearized model.
    Attention dropout is dropped."""
    attention = getattr(module, SUBMODULE, None)
    slot = slot_of(module)
    if isinstance(attention, CrossAttention):
        if linear_context is not None and slot is not None:
            out = linear_context.attend_across(
                slot.index, attention, q, k, v, scaling, attention_mask
            )
        else:
            out, _memory = attention(q, k, v, scaling=scaling, mask=attention_mask)
        return out.transpose(1, 2).contiguous(), None
    softmax: dict[str, Any] = {
        "causal": getattr(module, "is_causal", True),
        "scaling": scaling,
        "softcap": softcap,
        "window": sliding_window,
    }
    if linear_context is not None and slot is not None:
        if attention is None:
            out = linear_context.attend_softmax(slot.index, q, k, v, **softmax)
        else:
            out = linear_context.attend(slot.index, attention, q, k, v, scaling)
    elif q.shape[2] != k.shape[2]:
        raise ModelError(
            "a linearized model keeps a state, not a key/value cache: decode with "
            "linearized.generate, with extend / verify / commit, or with model.generate"
        )
    else:
        mask = last(attention_mask, q.shape[2])
        if attention is None:
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


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
