"""`generate()` of transformers on a linearized model: a decode state in the place of its key/value
cache. Knows transformers' loop; knows nothing of attention.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from linearized import documents
from linearized.allocation import new_state
from linearized.callbacks import last, make_mask
from linearized.context import Context
from linearized.errors import ModelError
from linearized.fold import fold
from linearized.state import DecodeState

CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
"""What transformers calls it: `past_key_values` before 5.24, where that name still works."""


def let_generate(model: PreTrainedModel) -> None:
    """Make `generate()` of transformers decode with a state."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True)


class StateCache(Cache):
    """A decode state in the place where `generate()` of transformers keeps its cache."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen = 0
        """Columns so far, padding included: what transformers calls the sequence length."""
        self.encoded = False
        """Has cross attention read the encoder's text?"""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = self.state.select(beam_idx.tolist())


def _before_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give `generate()` of transformers a state instead of its key/value cache, and several
    documents their positions."""
    segments = kwargs.get("segment_ids")
    if segments is not None:
        if kwargs.get("position_ids") is None and _takes_positions(module):
            return args, {**kwargs, "position_ids": documents.positions(segments, None)}
        return None
    name, cache = _cache(kwargs)
    if torch.is_grad_enabled() or cache is None or "linear_context" in kwargs:
        return None
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs["inputs_embeds"] if inputs is None else inputs
    rows, num_tokens = inputs.shape[:2]
    if not isinstance(cache, StateCache):
        if cache.get_seq_length() > 0:
            raise ModelError("a key/value cache that holds tokens cannot go on in a linear state")
        cache = StateCache(new_state(module, rows))
    mask = last(make_mask(attention_mask=kwargs.get("attention_mask")), num_tokens)
    changed: dict[str, Any] = {name: cache}
    encoding = cache.state.cross is not None and not cache.encoded
    if cache.encoded:  # cross attention has its memory, and needs no more than the shape
        changed["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :1]
        changed["encoder_attention_mask"] = None
    context = Context(
        state=cache.state, mask=mask, owner=module, encoding=encoding, num_tokens=num_tokens
    )
    return args, {**kwargs, **changed, "linear_context": context}


def _after_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    context: Context | None = kwargs.get("linear_context")
    if context is None or context.owner is not module:
        return
    cache: StateCache = _cache(kwargs)[1]
    cache.seen += context.num_tokens
    fold(context.state, context.fresh(), context.mask)
    if context.encoding:
        context.remember()
        cache.encoded = True


def _cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """And the name under which it is handed down, the older one or the newer."""
    for name in ("cache", "past_key_values"):
        if kwargs.get(name) is not None:
            return name, kwargs[name]
    return CACHE, None


def _takes_positions(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters
