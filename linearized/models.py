"""Hugging Face models in and out, and the three verbs of decoding: extend, verify, commit.

The one door to transformers. A linearized model is the same `PreTrainedModel` with

- an attention function and a mask function registered under the name "linearized",
- a `linear_attention` submodule in every attention module, which that function calls,
- `config.linearized`, the `LinearConfig` as a dict, from which `from_pretrained` rebuilds it.

During decoding one `_Pass` travels down to every layer as the keyword argument `linear_pass`: the
state is read there, and each layer leaves its keys and values. Only `commit` and the end of
`extend` write the state, so a forward that fails leaves it whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.utils import logging as hf_logging

from linearized import ops
from linearized.attention import VARIANTS
from linearized.config import LinearConfig
from linearized.errors import ModelError, StateError
from linearized.state import DecodeState, GroupState, Pending

NAME = "linearized"
SUBMODULE = "linear_attention"
SMALL = 32
"""Up to this many tokens `extend` goes the tree's way, which has less to set up."""


def linearize(model: PreTrainedModel | str | Path, config: LinearConfig) -> PreTrainedModel:
    """Replace softmax attention in every layer of a causal language model, in place. The new
    parameters start at zero; all others are kept.

    Raises:
        ModelError: it cannot be linearized; says why.
    """
    if isinstance(model, str | Path):
        model = load(model)
    _refuse_unsupported(model)
    _attach(cast(PreTrainedModel, model.base_model), config)
    model.set_attn_implementation(NAME)
    return model


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model, linearized or not, from a Hugging Face folder or name, in eval
    mode.

    Raises:
        ModelError: there is none, or its weights do not fit its config.
    """
    show = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"cannot load a causal language model from {path}: {reason}") from error
    finally:
        if show:
            hf_logging.enable_progress_bar()
    model, info = opened
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the weights its config asks for, among them "
            f"{', '.join(missing[:3])}"
        )
    return cast(PreTrainedModel, model.eval())


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


@torch.no_grad()
def extend(
    model: PreTrainedModel,
    tokens: Tensor,
    state: DecodeState,
    *,
    logits_to_keep: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Read `tokens` [B, T] and fold them into `state`, in place. Logits [B, T, V], of the last
    `logits_to_keep` columns only if that is above 0. `mask` [B, T] is False where a row has no
    token."""
    _check_rows(tokens, state)
    rows, num_tokens = tokens.shape
    nodes = None
    if mask is None and num_tokens <= SMALL:
        chain = torch.arange(-1, num_tokens - 1, device=tokens.device).expand(rows, -1)
        nodes = _nodes(chain, state)
    step = _Pass(state=state, nodes=nodes, mask=mask)
    valid = torch.ones_like(tokens) if mask is None else mask.long()
    positions = (state.length[:, None] + valid.cumsum(1) - 1).clamp(min=0)
    logits = _forward(model, tokens, positions, step, logits_to_keep)
    step.fold()
    return logits


@torch.no_grad()
def verify(
    model: PreTrainedModel, tokens: Tensor, parents: Tensor, state: DecodeState
) -> tuple[Tensor, Pending]:
    """Logits [B, N, V] at every node of one token tree per row, each as decoding along its path
    would give. `parents` [B, N]: -1 for a child of the last committed token, else a smaller index.
    The state is untouched; hand `Pending` to `commit`."""
    _check_rows(tokens, state)
    ops.check_parents(parents, *tokens.shape)
    nodes = _nodes(parents, state)
    step = _Pass(state=state, nodes=nodes)
    logits = _forward(model, tokens, nodes.positions, step, 0)
    keys, values = step.pending()
    pending = Pending(
        keys=keys, values=values, parents=parents.tolist(), length=state.length.clone()
    )
    return logits, pending


@torch.no_grad()
def commit(state: DecodeState, pending: Pending, path: Sequence[Sequence[int]]) -> None:
    """Fold the accepted nodes into the state: for each row a path from a child of the last
    committed token downwards (it may be empty).

    Raises:
        StateError: not a path of that tree, or the state has moved on since.
    """
    pending.check(path, state)
    longest = max(map(len, path))
    if longest == 0:
        return
    device = state.length.device
    index = torch.tensor([[*p, *[0] * (longest - len(p))] for p in path], device=device)
    mask = None
    if min(map(len, path)) < longest:
        counts = torch.tensor([len(p) for p in path], device=device)
        mask = torch.arange(longest, device=device) < counts[:, None]

    def accepted(nodes: Tensor) -> Tensor:  # [L, B, K, N, X] -> [L, B, K, P, X]
        picked = index[None, :, None, :, None].expand(*nodes.shape[:3], -1, nodes.shape[4])
        return nodes.gather(3, picked)

    _fold(state, accepted(pending.keys), accepted(pending.values), mask)


@dataclass(slots=True)
class _Pass:
    """One forward over the model: what it reads, and what its layers leave behind."""

    state: DecodeState
    nodes: ops.Nodes | None = None
    mask: Tensor | None = None
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
        _fold(self.state, *self.pending(), self.mask)


def _fold(state: DecodeState, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """Fold [L, B, K, T, X] keys and values into every layer at once, in place."""
    if mask is not None:
        mask = mask.bool().repeat(state.num_layers, 1)
    state.write(ops.fold(state.flat(), keys.flatten(0, 1), values.flatten(0, 1), mask))


def _forward(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, step: _Pass, logits_to_keep: int
) -> Tensor:
    output = model(
        input_ids=tokens,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=logits_to_keep,
        linear_pass=step,
    )
    if len(step.keys) != step.state.num_layers:
        raise ModelError(
            f"{len(step.keys)} of {step.state.num_layers} layers of {type(model).__name__} reached "
            "linear attention; was its attention implementation changed after linearizing?"
        )
    return output.logits


def _nodes(parents: Tensor, state: DecodeState) -> ops.Nodes:
    return ops.Nodes.of(parents, state.length, group=state.layers.group, taps=state.layers.taps)


def _check_rows(tokens: Tensor, state: DecodeState) -> None:
    if tokens.ndim != 2 or tokens.shape[0] != state.batch_size or tokens.shape[1] == 0:
        raise StateError(
            f"tokens must be [{state.batch_size} rows, at least 1 token] for this state, got "
            f"{list(tokens.shape)}"
        )


def _attention(
    module: nn.Module,
    q: Tensor,  # [B, H, T, D]
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    linear_pass: _Pass | None = None,
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
    if not isinstance(cache, _StateCache):
        if cache.get_seq_length() > 0:
            raise ModelError("a key/value cache that holds tokens cannot go on in a linear state")
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        cache = _StateCache(new_state(module, inputs.shape[0]))
    mask = kwargs.get("attention_mask")
    inputs = kwargs.get("input_ids")
    num_tokens = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[1]
    if mask is not None:
        mask = _mask(mask.shape[0], num_tokens, num_tokens, attention_mask=mask)
    step = _Pass(state=cache.state, mask=mask)
    return args, {**kwargs, "past_key_values": cache, "linear_pass": step}


def _after_forward(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, _StateCache):
        step: _Pass = kwargs["linear_pass"]
        cache.seen += step.keys[0].shape[2]
        step.fold()


def _attach(model: PreTrainedModel, config: LinearConfig) -> None:
    """Give every attention module its linear attention, and the model its config entry."""
    for module in attention_modules(model):
        heads, _, _ = _heads(module, model.config)
        weight = next(module.parameters())
        variant = VARIANTS[config.attention](
            config, heads=heads, dtype=weight.dtype, device=weight.device
        )
        module.add_module(SUBMODULE, variant)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True)
    setattr(model.config, NAME, config.to_dict())
    # Saved in config.json, so that transformers refuses the folder where nobody has imported
    # linearized, instead of running it as the softmax model that it no longer is.
    model.config.attn_implementation = NAME


def _heads(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of an attention module."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(module, "head_dim", None) or config.hidden_size // heads
    return heads, kv_heads, width


def _refuse_unsupported(model: PreTrainedModel) -> None:
    name = type(model).__name__
    config = model.config
    if getattr(config, NAME, None):
        raise ModelError(f"this {name} is linearized already")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"{name} cannot be linearized: its attention does not go through transformers' "
            "AttentionInterface"
        )
    modules = attention_modules(model)
    if not modules:
        raise ModelError(f"{name} cannot be linearized: no self-attention module found in it")
    if not all(getattr(module, "is_causal", False) for module in modules):
        raise ModelError(f"{name} cannot be linearized: only causal attention is supported")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"{name} cannot be linearized: it has layers of type {', '.join(sorted(kinds))}; a "
            "sliding window has no linear counterpart here"
        )


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
            _attach(self, LinearConfig.from_dict(settings))
            self.config._attn_implementation = NAME
        post_init(self)

    PreTrainedModel.post_init = attach_first  # type: ignore[method-assign]


_register()
