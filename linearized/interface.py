"""What transformers calls in a linearized model, and what that leaves behind.

A linearized model is the same `PreTrainedModel` with

- an attention function and a mask function registered under the name "linearized",
- a `linear_attention` submodule in every attention module, which that function calls,
- `config.linearized`, the `LinearConfig` as a dict, from which `from_pretrained` rebuilds it.

During decoding one `Pass` travels down to every layer as the keyword argument `linear_pass`: the
state is read there, and each layer leaves its keys and values. Only `Pass.fold` writes the state,
after the last layer, so a forward that fails leaves it whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from linearized import ops
from linearized.attention import VARIANTS
from linearized.config import LinearConfig
from linearized.errors import ModelError, StateError
from linearized.state import DecodeState, GroupState

NAME = "linearized"
SUBMODULE = "linear_attention"


def attach(model: PreTrainedModel, config: LinearConfig) -> None:
    """Give every attention module its linear attention, and the model its config entry."""
    for module in attention_modules(model):
        heads, _, _ = _heads(module, model.config)
        weight = next(module.parameters())
        variant = VARIANTS[config.attention](
            config, heads=heads, dtype=weight.dtype, device=weight.device
        )
        module.add_module(SUBMODULE, variant)
    for module in model.modules():  # which of them a head calls differs from model to model
        if isinstance(module, PreTrainedModel):
            module.register_forward_pre_hook(_before_forward, with_kwargs=True)
            module.register_forward_hook(_after_forward, with_kwargs=True)
    setattr(model.config, NAME, config.to_dict())
    # Saved in config.json, so that transformers refuses the folder where nobody has imported
    # linearized, instead of running it as the softmax model that it no longer is.
    model.config.attn_implementation = NAME


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a Hugging Face model, first layer first."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
    ]


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that linearizing added. They start at zero and need a learning rate of their own."""
    marked = [m for m in attention_modules(model) if hasattr(m, SUBMODULE)]
    return [p for module in marked for p in getattr(module, SUBMODULE).parameters()]


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
    machine."""
    config = model.config.to_dict()
    for transient in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(transient, None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.base_model.named_parameters():
        sample = parameter.detach().flatten()[:16].double().cpu().numpy().tobytes()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + sample)
    return digest.hexdigest()[:16]


def new_state(model: PreTrainedModel, batch_size: int = 1) -> DecodeState:
    """An empty decode state for this many sequences: `state.nbytes` bytes, now and forever."""
    config = linear_config(model)
    if batch_size < 1:
        raise StateError(f"batch_size must be at least 1, got {batch_size}")
    modules = attention_modules(model)
    _, kv_heads, width = _heads(modules[0], model.config)
    layers = GroupState.empty(
        len(modules),
        batch_size,
        heads=kv_heads,
        key_width=width,
        value_width=width,
        group=config.group,
        taps=config.taps if config.augment else 1,
        dtype=model.dtype,
        device=model.device,
    )
    return DecodeState(layers=layers, fingerprint=fingerprint(model))


@dataclass(slots=True)
class Pass:
    """One forward over the model: what it reads, and what its layers leave behind."""

    state: DecodeState
    nodes: ops.Nodes | None = None
    mask: Tensor | None = None
    owner: nn.Module | None = None
    """The module whose hook made this pass and folds it; None: `models` does."""
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def attend(self, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The next layer's attention; layers come in their order."""
        layer = self.state.layer(len(self.keys))
        self.keys.append(k)
        self.values.append(v)
        return attention(q, k, v, state=layer, mask=self.mask, nodes=self.nodes)

    def pending(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self.keys), torch.stack(self.values)

    def fold(self) -> None:
        fold(self.state, *self.pending(), self.mask)


def fold(state: DecodeState, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """Fold [L, B, K, T, X] keys and values into every layer at once, in place."""
    if mask is not None:
        mask = mask.bool().repeat(state.num_layers, 1)
    state.write(ops.fold(state.flat(), keys.flatten(0, 1), values.flatten(0, 1), mask))


def _attention(
    module: nn.Module,
    q: Tensor,  # [B, H, T, D]
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    linear_pass: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer of a linearized model.
    Scaling is dropped (queries and keys are normalised); so is attention dropout."""
    attention = getattr(module, SUBMODULE)
    if linear_pass is not None:
        out = linear_pass.attend(attention, q, k, v)
    elif q.shape[2] != k.shape[2]:
        raise ModelError(
            "a linearized model keeps a state, not a key/value cache: decode with "
            "linearized.generate, with extend / verify / commit, or with model.generate"
        )
    else:
        out = attention(q, k, v, mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *_: Any,
    attention_mask: Tensor | None = None,
    **__: Any,
) -> Tensor | None:
    """The mask function that goes with `_attention`: causality is the operator's own, so only
    padding is handed down, [B, T], and only if there is any."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, -q_length:].bool()
    return None if bool(padding.all()) else padding


class _StateCache(Cache):
    """A decode state in the place where `generate()` of transformers keeps its cache."""

    def __init__(self, state: DecodeState) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen = 0
        """Columns so far, padding included: what transformers calls the sequence length."""

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
    """Give `generate()` of transformers a state instead of its key/value cache."""
    cache = kwargs.get("past_key_values")
    if torch.is_grad_enabled() or cache is None or "linear_pass" in kwargs:
        return None
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs["inputs_embeds"] if inputs is None else inputs
    rows, num_tokens = inputs.shape[:2]
    if not isinstance(cache, _StateCache):
        if cache.get_seq_length() > 0:
            raise ModelError("a key/value cache that holds tokens cannot go on in a linear state")
        cache = _StateCache(new_state(module, rows))
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = _mask(rows, num_tokens, num_tokens, attention_mask=mask)
    step = Pass(state=cache.state, mask=mask, owner=module)
    return args, {**kwargs, "past_key_values": cache, "linear_pass": step}


def _after_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    step: Pass | None = kwargs.get("linear_pass")
    if step is not None and step.owner is module:
        kwargs["past_key_values"].seen += step.keys[0].shape[2]
        step.fold()


def _heads(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of an attention module."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(module, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, width


def _register() -> None:
    """Make `import linearized` enough for transformers to open a linearized folder: modules are
    attached while the model is built, before its weights are read."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    post_init = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def attach_first(self: PreTrainedModel) -> None:
        settings = getattr(self.config, NAME, None)
        modules = attention_modules(self)
        if settings and modules and not hasattr(modules[0], SUBMODULE):
            attach(self, LinearConfig.from_dict(settings))
            self.config._attn_implementation = NAME
        post_init(self)

    PreTrainedModel.post_init = attach_first  # type: ignore[method-assign]


_register()
