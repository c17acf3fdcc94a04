"""What transformers calls in a linearized model, and what that leaves behind.

A linearized model is the same `PreTrainedModel` with

- an attention function and a mask function registered under the name "linearized",
- a `linear_attention` submodule in every linearized attention module, which that function calls,
- `config.linearized`, the `LinearConfig` as a dict, from which `from_pretrained` rebuilds it.

During decoding one `Pass` travels down to every layer as the keyword argument `linear_pass`: the
state is read there, and each layer leaves its keys and values. Only `Pass.fold` writes the state,
after the last layer, so a forward that fails leaves it whole. Several documents in a row travel
as `segment_ids`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from linearized import ops
from linearized.attention import (
    VARIANTS,
    CrossAttention,
    LinearAttention,
    Place,
    softmax_attention,
)
from linearized.config import LinearConfig
from linearized.errors import ModelError, StateError
from linearized.state import DecodeState, GroupState, History, Pending

NAME = "linearized"
SUBMODULE = "linear_attention"
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
"""What transformers calls it: `past_key_values` before 5.24, where that name still works."""


def attach(model: PreTrainedModel, config: LinearConfig) -> None:
    """Give the attention modules that `config` names their linear attention, and the model its
    config entry."""
    for name, module in named_attention_modules(model):
        number = layer_number(name)
        if config.layers is None or number in config.layers:
            variant = VARIANTS[config.attention](config, _place(name, module, model.config))
            cross = variant.place.kind == "cross"
            module.add_module(SUBMODULE, CrossAttention(variant) if cross else variant)
            module.register_forward_pre_hook(_no_position_bias, with_kwargs=True)
    for part in model.modules():  # which of them a head calls differs from model to model
        if not isinstance(part, PreTrainedModel):
            continue
        if not _has_decoder(part):  # which then has them
            let_generate(part)
        setattr(part.config, NAME, config.to_dict())
        # Saved in config.json, so that transformers refuses the folder where nobody has imported
        # linearized, instead of running it as the softmax model that it no longer is.
        part.config.attn_implementation = NAME


def let_generate(model: PreTrainedModel) -> None:
    """Make `generate()` of transformers decode with a state."""
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a Hugging Face model, first layer first."""
    return [module for _, module in named_attention_modules(model)]


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that are linearized, by name, first layer first."""
    return {n: m for n, m in named_attention_modules(model) if hasattr(m, SUBMODULE)}


def layer_number(name: str) -> int:
    """Of a module such as `model.layers.3.self_attn`: 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


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


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the config and of a sample of every weight: equal for equal models, on any
    machine. Worked out anew only when a weight was written."""
    known: _Fingerprint | None = model.__dict__.get("_linearized_fingerprint")
    if known is None or known.stamp != known.now():
        known = _Fingerprint.of(model)
        model.__dict__["_linearized_fingerprint"] = known
    return known.value


@dataclass(slots=True)
class _Fingerprint:
    """One that was worked out, and how to tell that it still holds without walking over modules."""

    value: str
    weights: list[Tensor]
    stamp: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Fingerprint:
        config = model.config.to_dict()
        for transient in ("_name_or_path", "transformers_version", "dtype", "architectures"):
            config.pop(transient, None)
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
        weights = dict(model.base_model.named_parameters())
        for name, parameter in weights.items():
            sample = parameter.detach().flatten()[:16].double().cpu().numpy().tobytes()
            digest.update(name.encode() + str(tuple(parameter.shape)).encode() + sample)
        found = cls(digest.hexdigest()[:16], list(weights.values()))
        found.stamp = found.now()
        return found

    def now(self) -> tuple[int, int]:
        """Changes when a weight is written or moved."""
        return sum(weight._version for weight in self.weights), self.weights[0].data_ptr()


def forget(model: PreTrainedModel) -> None:
    """What was worked out of the model and kept with it: its layers have changed."""
    for name in [name for name in model.__dict__ if name.startswith("_linearized_")]:
        del model.__dict__[name]


def check_state(model: PreTrainedModel, state: DecodeState) -> None:
    """
    Raises:
        StateError: the state is not one of this model.
    """
    state.check(fingerprint(model))
    wanted = model.__dict__.get("_linearized_shapes")
    if wanted is None:
        wanted = model.__dict__["_linearized_shapes"] = new_state(model).shapes()
    if state.shapes() != wanted:
        raise StateError(f"damaged decode state: its tensors are {state.shapes()}, not {wanted}")


@torch.inference_mode(False)
def new_state(model: PreTrainedModel, batch_size: int = 1) -> DecodeState:
    """An empty decode state for this many sequences: `state.nbytes` bytes, now and forever, unless
    some layers keep softmax.

    Raises:
        ModelError: a model that reads in both directions and so has none.
    """
    linear_config(model)
    if batch_size < 1:
        raise StateError(f"batch_size must be at least 1, got {batch_size}")
    causal, cross, softmax = [], [], []
    for module in attention_modules(model):
        attention = getattr(module, SUBMODULE, None)
        if isinstance(attention, CrossAttention):
            cross.append(attention)
        elif isinstance(attention, LinearAttention):
            if attention.causal:
                causal.append(attention)
        elif getattr(module, "is_causal", True):
            softmax.append(module)
    if not causal and not softmax:
        raise ModelError(
            f"{type(model).__name__} reads its text in both directions: call it as a whole, it has "
            "no decode state"
        )
    where: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    layers = GroupState.none(batch_size, **where)
    if causal:
        layers = causal[0].empty_state(len(causal), batch_size, **where)
    history = memory = shift = None
    if softmax:
        _, kv_heads, width = _heads(softmax[0], model.config)
        shape = (len(softmax), batch_size, kv_heads, 0, width)
        history = History(torch.zeros(shape, **where), torch.zeros(shape, **where))
    if cross:
        memory = cross[0].empty_memory(len(cross), batch_size, **where)
    shifted = getattr(attention_modules(model)[0], "shifted", 0)
    if shifted:
        shift = torch.zeros(len(causal), batch_size, shifted, **where)
    return DecodeState(layers, fingerprint(model), history, memory, shift)


Order = tuple[tuple[int, ...], ...]
"""Where in a state the layers of a model are: the linear ones, those that keep softmax."""
_ORDER = "_linearized_order"


def order(model: PreTrainedModel) -> Order | None:
    """Of a model some of whose layers were left out; None: all, one after the other."""
    found: Order | None = model.__dict__.get(_ORDER)
    return found


def set_order(model: PreTrainedModel, linear: tuple[int, ...], softmax: tuple[int, ...]) -> None:
    model.__dict__[_ORDER] = linear, softmax


@dataclass(slots=True)
class Pass:
    """One forward over the model: what it reads, and what its layers leave behind. Layers come in
    their order."""

    state: DecodeState
    nodes: ops.Nodes | None = None
    mask: Tensor | None = None
    owner: nn.Module | None = None
    """The module whose hook made this pass and folds it; None: `models` does."""
    order: Order | None = None
    encoding: bool = False
    """The encoder's text is read: cross attention leaves its memories."""
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Keys and values of the linearized layers so far."""
    stacked: tuple[Tensor, Tensor] | None = None
    """Those of all of them, [L, …], from a compiled program."""
    history: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of the layers that keep softmax."""
    memories: list[Tensor] = field(default_factory=list)
    keeps_hidden: bool = False
    hidden: Tensor | None = None
    """[B, T, C], of the last layer, if it is to be kept."""
    shifts: list[Tensor] = field(default_factory=list)
    """[B, T, C], what each token hands to the next one, where a model shifts channels."""

    def attend(
        self, attention: LinearAttention, q: Tensor, k: Tensor, v: Tensor, scaling: float | None
    ) -> Tensor:
        index = len(self.layers)
        layer = self.state.layer(index if self.order is None else self.order[0][index])
        out, keys, values = attention(
            q, k, v, scaling=scaling, state=layer, mask=self.mask, nodes=self.nodes
        )
        self.layers.append((keys, values))
        return out

    def cross(
        self,
        attention: CrossAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float | None,
        mask: Tensor | None,
    ) -> Tensor:
        assert self.state.cross is not None
        memory = None if self.encoding else self.state.cross[len(self.memories)]
        out, memory = attention(q, k, v, scaling=scaling, mask=mask, memory=memory)
        self.memories.append(memory)
        return out

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        history = self.state.history
        assert history is not None
        index = len(self.history)
        index = index if self.order is None else self.order[1][index]
        self.history.append((k, v))
        size = int(self.state.length.max())
        return softmax_attention(
            q,
            k,
            v,
            mask=self.mask,
            nodes=self.nodes,
            history=(history.keys[index, :, :, :size], history.values[index, :, :, :size]),
            length=self.state.length,
            **settings,
        )

    def pending(self, parents: list[list[int]]) -> Pending:
        return Pending(
            layers=self._tokens(),
            history=_stack(self.history) if self.history else None,
            parents=parents,
            length=self.state.length.clone(),
            shift=torch.stack(self.shifts) if self.shifts else None,
            hidden=self.hidden,
        )

    def fold(self) -> None:
        history = _stack(self.history) if self.history else None
        shift = torch.stack(self.shifts) if self.shifts else None
        fold(self.state, self._tokens(), history, self.mask, shift)

    def _tokens(self) -> tuple[Tensor, Tensor]:
        return self.stacked or _stack(self.layers, like=self.state.layers)

    def remember(self) -> None:
        """Keep what cross attention has read."""
        assert self.state.cross is not None
        self.state.cross.copy_(torch.stack(self.memories))


def _stack(
    pairs: list[tuple[Tensor, Tensor]], like: GroupState | None = None
) -> tuple[Tensor, Tensor]:
    if not pairs and like is not None:  # no layer is linear
        return like.keys, like.values
    keys, values = zip(*pairs, strict=True)
    return torch.stack(keys), torch.stack(values)


def fold(
    state: DecodeState,
    layers: tuple[Tensor, Tensor],
    history: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    shift: Tensor | None = None,
) -> None:
    """Take [L, B, K, T, ·] keys and values of all layers, and what tokens hand on, [L, B, T, C],
    into the state, in place."""
    if state.history is not None and history is not None:
        state.history.append(*history, state.length, mask)
    if state.shift is not None and shift is not None:
        state.shift.copy_(_newest(state.shift, shift, mask))
    if state.num_layers:
        ops.fold_(state.layers, *layers, None if mask is None else mask.bool())
    elif history is not None:
        state.length.add_(history[0].shape[3] if mask is None else mask.sum(1))


def _newest(last: Tensor, new: Tensor, mask: Tensor | None) -> Tensor:
    """[L, B, C] of each row's last token: of [L, B, T, C] the last that `mask` [B, T] keeps, and
    `last` [L, B, C] where it keeps none."""
    if mask is None:
        return new[:, :, -1]
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    newest = (mask.long() * columns).amax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return torch.cat([last[:, :, None], new], dim=2)[:, rows, newest]


def _attention(
    module: nn.Module,
    q: Tensor,  # [B, H, T, D]
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    linear_pass: Pass | None = None,
    segment_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer of a linearized model.
    Attention dropout is dropped."""
    attention = getattr(module, SUBMODULE, None)
    if isinstance(attention, CrossAttention):
        if linear_pass is not None:
            out = linear_pass.cross(attention, q, k, v, scaling, attention_mask)
        else:
            out, _memory = attention(q, k, v, scaling=scaling, mask=attention_mask)
        return out.transpose(1, 2).contiguous(), None
    softmax: dict[str, Any] = {
        "causal": getattr(module, "is_causal", True),
        "scaling": scaling,
        "softcap": softcap,
        "window": sliding_window,
    }
    if linear_pass is not None and attention is None:
        out = linear_pass.softmax(q, k, v, **softmax)
    elif linear_pass is not None and attention is not None:
        out = linear_pass.attend(attention, q, k, v, scaling)
    elif q.shape[2] != k.shape[2]:
        raise ModelError(
            "a linearized model keeps a state, not a key/value cache: decode with "
            "linearized.generate, with extend / verify / commit, or with model.generate"
        )
    else:
        mask = _last(attention_mask, q.shape[2])
        if attention is None:
            out = softmax_attention(q, k, v, mask=mask, segments=segment_ids, **softmax)
        else:
            out, _, _ = attention(q, k, v, scaling=scaling, mask=mask, segments=segment_ids)
    return out.transpose(1, 2).contiguous(), None


def _mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask function that goes with `_attention`: causality is the operator's own, so only
    padding is handed down, [B, columns], and only if there is any."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def _last(mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """Of the last `num_tokens` columns."""
    return None if mask is None else mask[:, -num_tokens:]


def _no_position_bias(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """T5 works out a bias for every pair of tokens, which nobody reads: hand it an empty one."""
    if "position_bias" not in kwargs or kwargs["position_bias"] is not None:
        return None
    return args, {**kwargs, "position_bias": next(module.parameters()).new_zeros(1, 1, 1, 1)}


class _StateCache(Cache):
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
    """Give `generate()` of transformers a state instead of its key/value cache, and packed
    documents their positions."""
    segments = kwargs.get("segment_ids")
    if segments is not None:
        if kwargs.get("position_ids") is None and _takes_positions(module):
            return args, {**kwargs, "position_ids": _document_positions(segments)}
        return None
    name, cache = _cache(kwargs)
    if torch.is_grad_enabled() or cache is None or "linear_pass" in kwargs:
        return None
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs["inputs_embeds"] if inputs is None else inputs
    rows, num_tokens = inputs.shape[:2]
    if not isinstance(cache, _StateCache):
        if cache.get_seq_length() > 0:
            raise ModelError("a key/value cache that holds tokens cannot go on in a linear state")
        cache = _StateCache(new_state(module, rows))
    mask = _last(_mask(attention_mask=kwargs.get("attention_mask")), num_tokens)
    changed: dict[str, Any] = {name: cache}
    encoding = cache.state.cross is not None and not cache.encoded
    if cache.encoded:  # cross attention has its memory, and needs no more than the shape
        changed["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :1]
        changed["encoder_attention_mask"] = None
    step = Pass(state=cache.state, mask=mask, owner=module, encoding=encoding)
    return args, {**kwargs, **changed, "linear_pass": step}


def _after_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    step: Pass | None = kwargs.get("linear_pass")
    if step is None or step.owner is not module:
        return
    cache: _StateCache = _cache(kwargs)[1]
    cache.seen += step.layers[0][0].shape[2]
    step.fold()
    if step.encoding:
        step.remember()
        cache.encoded = True


def _cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """And the name under which it is handed down, the older one or the newer."""
    for name in ("cache", "past_key_values"):
        if kwargs.get(name) is not None:
            return name, kwargs[name]
    return CACHE, None


def _has_decoder(model: PreTrainedModel) -> bool:
    """Is it an encoder-decoder model, rather than one of its two stacks?"""
    stacks = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    return bool(getattr(model.config, "is_encoder_decoder", False) and stacks)


def _takes_positions(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def _document_positions(segments: Tensor) -> Tensor:
    """[B, T], from 0 in each document."""
    columns = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return columns - torch.where(new, columns, 0).cummax(1).values


def named_attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            yield name, module


def _place(name: str, module: nn.Module, config: Any) -> Place:
    heads, kv_heads, width = _heads(module, config)
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


def _heads(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of an attention module."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        if getattr(module, name, None):
            return heads, kv_heads, getattr(module, name)
    return heads, kv_heads, config.hidden_size // heads


def _register() -> None:
    """Make `import linearized` enough for transformers to open a linearized folder: modules are
    attached while the model is built, before its weights are read."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    post_init = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def attach_first(self: PreTrainedModel) -> None:
        settings = getattr(self.config, NAME, None)
        if settings and attention_modules(self) and not linear_modules(self):
            attach(self, LinearConfig.from_dict(settings))
            self.config._attn_implementation = NAME
        post_init(self)

    PreTrainedModel.post_init = attach_first  # type: ignore[method-assign]


_register()
