"""`generate()` of transformers on a linearized model: a decode state in the place of its key/value
cache. Knows transformers' loop; knows nothing of attention.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from linearized.allocation import check_state, new_state
from linearized.callbacks import last, make_mask
from linearized.context import Context
from linearized.errors import ModelError
from linearized.fold import fold
from linearized.rows import lay_out, positions_after, refuse_documents, takes_positions
from linearized.state import DecodeState, Fresh
from linearized.tables import check_length

CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
"""What transformers calls it: `past_key_values` before 5.24, where that name still works."""
HELD = 256
"""Columns at most that are not folded in before the next forward, so that they can be taken back:
more than anybody drafts."""


def let_generate(model: PreTrainedModel) -> list[RemovableHandle]:
    """Make `generate()` of transformers decode with a state. Returns the hooks that do it."""
    return [
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True),
    ]


class StateCache(Cache):
    """A decode state in the place where `generate()` of transformers keeps its cache. The last
    forward's tokens are folded in when the next one begins; until then `crop` can take them back,
    as assisted generation does with drafts that were wrong."""

    is_croppable = True
    is_linear = [False]  # noqa: RUF012, as transformers has it
    """transformers leaves out of its input what a cache has seen, unless all layers are `linear`,
    its word for those that cannot go back."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__(layers=[])
        self._state = state
        self._held: tuple[Fresh, Tensor | None, int] | None = None
        """What the last forward left, its mask, and its number of columns."""
        self.seen = 0
        """Columns so far, padding included: what transformers calls the sequence length."""
        self.encoded = False
        """Has cross attention read the encoder's text?"""

    @property
    def state(self) -> DecodeState:
        """Of all columns so far."""
        if self._held is not None:
            fresh, mask, _ = self._held
            fold(self._state, fresh, mask)
            self._held = None
        return self._state

    def take(self, fresh: Fresh, mask: Tensor | None, num_tokens: int) -> None:
        """Add what a forward on top of `state` has left, for columns that `mask` [B, T] keeps."""
        assert self._held is None
        early = max(num_tokens - HELD, 0)
        if early:
            fold(self._state, fresh.first(early), None if mask is None else mask[:, :early])
            late = torch.arange(early, num_tokens, device=self._state.length.device)
            fresh = fresh.at(late.expand(self.batch_size, -1))
            mask = None if mask is None else mask[:, early:]
        self._held = fresh, mask, num_tokens - early
        self.seen += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns, as many as the number is below 0. A positive number, which
        transformers used before 5.24, is that of the columns to be kept.

        Raises:
            ModelError: they are not all of the last forward.
        """
        removed = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if removed <= 0:
            return
        fresh, mask, held = self._held if self._held is not None else (None, None, 0)
        if fresh is None or removed > held:
            raise ModelError(
                f"cannot take back {removed} tokens: a decode state remembers how it was before "
                f"the last {held} of them; to draft with a linearized model, call "
                "linearized.generate(target, prompt, drafter=model)"
            )
        kept = held - removed
        self.seen -= removed
        self._held = None
        if kept:
            self._held = fresh.first(kept), None if mask is None else mask[:, :kept], kept

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    @property
    def batch_size(self) -> int:
        return self._state.batch_size

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._state = self.state.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = range(self.batch_size)
        self._state = self.state.select([row for row in rows for _ in range(repeats)])

    def reset(self) -> None:
        raise ModelError("a decode state is not emptied: make a new one with linearized.new_state")


def _before_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give `generate()` of transformers a state instead of its key/value cache, and several
    documents in a row their segments and positions."""
    if kwargs.get("linear_context") is not None:
        return None
    kwargs = _named(module, args, kwargs)
    name, cache = _cache(kwargs)
    going_on = isinstance(cache, StateCache)
    if torch.is_grad_enabled() and going_on:
        raise ModelError("decoding from a state has no gradient: use torch.no_grad()")
    if torch.is_grad_enabled() or cache is None:
        return (), lay_out(module, kwargs)
    refuse_documents(kwargs)
    inputs = kwargs.get("input_ids")
    inputs = kwargs["inputs_embeds"] if inputs is None else inputs
    rows, num_tokens = inputs.shape[:2]
    if not going_on:
        if cache.get_seq_length() > 0:
            raise ModelError("a key/value cache that holds tokens cannot go on in a linear state")
        cache = StateCache(new_state(module, rows))
    state = cache.state
    _check(cache, module, rows, num_tokens, kwargs.get("attention_mask"))
    mask = last(make_mask(attention_mask=kwargs.get("attention_mask")), num_tokens)
    changed: dict[str, Any] = {name: cache}
    encoding = state.cross is not None and not cache.encoded
    if cache.encoded:  # cross attention has its memory, and needs no more than the shape
        changed["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :1]
        changed["encoder_attention_mask"] = None
    if kwargs.get("position_ids") is None and takes_positions(module):
        there = mask if mask is not None else inputs.new_ones(rows, num_tokens, dtype=torch.bool)
        changed["position_ids"] = positions_after(state.length, there)
    context = Context(state=state, mask=mask, owner=module, encoding=encoding,
                      num_tokens=num_tokens)  # fmt: skip
    return (), {**kwargs, **changed, "linear_context": context}


def _after_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    context: Context | None = kwargs.get("linear_context")
    if context is None or context.owner is not module:
        return
    cache: StateCache = _cache(kwargs)[1]
    cache.take(context.fresh(), context.mask, context.num_tokens)
    if context.encoding:
        context.remember()
        cache.encoded = True


def _check(
    cache: StateCache, module: PreTrainedModel, rows: int, num_tokens: int, mask: Tensor | None
) -> None:
    """
    Raises:
        StateError: another model's state, or a text longer than the model's positions.
        ModelError: the input does not follow what the cache has seen.
    """
    check_state(module, cache.state)
    check_length(module, cache.state, num_tokens)
    if rows != cache.batch_size:
        raise ModelError(f"the cache holds {cache.batch_size} rows, the input has {rows}")
    wanted = cache.seen + num_tokens
    if num_tokens == 0 or (mask is not None and mask.ndim == 2 and mask.shape[1] < wanted):
        columns = num_tokens if mask is None else mask.shape[1]
        raise ModelError(
            f"the cache has seen {cache.seen} tokens, and {num_tokens} of {columns} were to "
            "follow: give the whole text again with what is new at its end, or what is new and an "
            "attention_mask of the whole"
        )


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names."""
    if not args:
        return kwargs
    _self, *names = inspect.signature(type(module).forward).parameters
    return {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}


def _cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """And the name under which it is handed down, the older one or the newer."""
    for name in ("cache", "past_key_values"):
        if kwargs.get(name) is not None:
            return name, kwargs[name]
    return CACHE, None
