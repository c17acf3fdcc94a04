"""A smaller model out of a larger one: whole heads, channels and layers are cut out, those that
matter least. Knows the Llama family's modules; knows nothing of what the smaller one is for.

A part's importance is Taylor's first-order estimate of what the loss would change without it,
Σ |w · ∂loss/∂w| over its weights, on a few batches of text (Ma et al., "LLM-Pruner", NeurIPS 2023).
What is left is an ordinary Hugging Face model, with the same tokenizer and embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearized.config import LinearConfig
from linearized.errors import ConfigError, ModelError
from linearized.models import check_decoder
from linearized.slots import NAME, SUBMODULE, assign_slots
from linearized.training.objective import cross_entropy

QKV, OUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
UP, DOWN = ("gate_proj", "up_proj"), "down_proj"
PER_HEAD = ("global", "grouped", "local")
"""Variants whose parameters have one row per head and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How much of a model is kept."""

    layers: int
    kv_heads: int
    """Number of key/value heads that are kept in each layer, with the query heads that they serve.
    """
    channels: int
    """Number of channels that are kept in each feed-forward layer."""


def prune(model: PreTrainedModel, batches: Iterable[Tensor], cut: Cut) -> PreTrainedModel:
    """The smaller model. The first and the last layer are always kept. Batches are tokens [B, T].

    Raises:
        ModelError: a model of another family. ConfigError: more is to be kept than there is.
    """
    layers = _layers(model)
    _check(model, cut)
    importances = _importances(model, layers, batches)
    smaller = copy.deepcopy(model).requires_grad_(False)
    middle = torch.stack([one.layer for one in importances[1:-1]] or [torch.zeros(())])
    best = middle.topk(max(cut.layers - 2, 0)).indices + 1
    kept = sorted({0, len(layers) - 1, *best.tolist()})[: cut.layers]
    base = cast(Any, smaller.base_model)
    stack = base.layers
    for number in kept:
        heads = importances[number].heads.topk(cut.kv_heads).indices.sort().values
        channels = importances[number].channels.topk(cut.channels).indices.sort().values
        _narrow(stack[number], heads, channels, model.config)
    base.layers = nn.ModuleList(stack[number] for number in kept)
    for config in {id(part.config): part.config for part in (smaller, base)}.values():
        _describe(config, cut, kept)
    assign_slots(smaller)
    return smaller.requires_grad_(True)


@dataclass(frozen=True, slots=True)
class _Importance:
    """Of one layer."""

    layer: Tensor
    """A number."""
    heads: Tensor
    """[K]."""
    channels: Tensor
    """[C]."""


def _layers(model: PreTrainedModel) -> list[Any]:
    check_decoder(model)
    layers = list(getattr(model.base_model, "layers", []))
    for layer in layers:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        parts = [getattr(attention, name, None) for name in (*QKV, OUT)]
        parts += [getattr(mlp, name, None) for name in (*UP, DOWN)]
        if not all(isinstance(part, nn.Linear) for part in parts):
            layers = []
    if not layers:
        raise ModelError(
            f"{type(model).__name__} cannot be pruned: its layers are not the Llama family's "
            f"({', '.join((*QKV, OUT, *UP, DOWN))})"
        )
    settings = getattr(model.config, NAME, None)
    if settings and LinearConfig.from_dict(settings).attention not in PER_HEAD:
        raise ModelError(
            f"models with attention {settings['attention']!r} cannot be pruned; "
            f"those with {', '.join(PER_HEAD)} can"
        )
    return layers


def _check(model: PreTrainedModel, cut: Cut) -> None:
    config = model.config
    there = {
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "channels": config.intermediate_size,
    }
    for name, most in there.items():
        least = min(2, most) if name == "layers" else 1
        if not least <= getattr(cut, name) <= most:
            raise ConfigError(
                f"{name} must lie between {least} and {most}, what the model has, "
                f"got {getattr(cut, name)}"
            )


def _importances(
    model: PreTrainedModel, layers: list[Any], batches: Iterable[Tensor]
) -> list[_Importance]:
    kv_heads = model.config.num_key_value_heads
    modules = [[getattr(layer.self_attn, name) for name in (*QKV, OUT)] for layer in layers]
    feeds = [[getattr(layer.mlp, name) for name in (*UP, DOWN)] for layer in layers]
    sums: dict[nn.Module, Tensor] = {}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        for tokens in batches:
            model.zero_grad()
            tokens = tokens.to(model.device)
            logits = model(input_ids=tokens, use_cache=False).logits
            cross_entropy(logits, tokens).backward()
            for module in (part for parts in (*modules, *feeds) for part in parts):
                change = (module.weight * module.weight.grad).detach().float().abs()
                sums[module] = sums.get(module, 0) + change
    finally:
        model.zero_grad()
        for parameter, was in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(was)
    if not sums:
        raise ConfigError("there is no batch to tell the importance of anything from")
    found = []
    for attention, feed in zip(modules, feeds, strict=True):
        *inward, outward = (sums[part] for part in attention)
        heads = sum(rows.sum(1).view(kv_heads, -1).sum(1) for rows in inward)
        heads = heads + outward.sum(0).view(kv_heads, -1).sum(1)
        *inward, outward = (sums[part] for part in feed)
        channels = sum(rows.sum(1) for rows in inward) + outward.sum(0)
        found.append(_Importance(heads.sum() + channels.sum(), heads, channels))
    return found


def _narrow(layer: Any, heads: Tensor, channels: Tensor, config: Any) -> None:
    """Keep these key/value heads and these channels, in place."""
    attention, mlp = layer.self_attn, layer.mlp
    kv_heads = config.num_key_value_heads
    for name in QKV:
        linear = getattr(attention, name)
        rows = torch.arange(linear.out_features, device=heads.device).view(kv_heads, -1)
        _keep(linear, rows[heads].flatten(), 0)
    columns = torch.arange(attention.o_proj.in_features, device=heads.device).view(kv_heads, -1)
    _keep(attention.o_proj, columns[heads].flatten(), 1)
    for name in UP:
        _keep(getattr(mlp, name), channels, 0)
    _keep(mlp.down_proj, channels, 1)
    linear_attention = getattr(attention, SUBMODULE, None)
    if linear_attention is not None:
        queries = torch.arange(config.num_attention_heads, device=heads.device).view(kv_heads, -1)
        for name, parameter in list(linear_attention.named_parameters()):
            kept = nn.Parameter(parameter[queries[heads].flatten()].detach().clone())
            setattr(linear_attention, name, kept)
        linear_attention.place = replace(
            linear_attention.place, heads=queries[heads].numel(), kv_heads=len(heads)
        )


def _keep(linear: nn.Linear, index: Tensor, dim: int) -> None:
    """Of the rows (0) or columns (1) of a weight."""
    linear.weight = nn.Parameter(linear.weight.index_select(dim, index).detach().clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None and dim == 0:
        linear.bias = nn.Parameter(linear.bias[index].detach().clone())


def _describe(config: Any, cut: Cut, kept: list[int]) -> None:
    config.head_dim = _head_width(config)
    served = config.num_attention_heads // config.num_key_value_heads
    config.num_attention_heads = served * cut.kv_heads
    config.num_key_value_heads = cut.kv_heads
    config.intermediate_size = cut.channels
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    settings = getattr(config, NAME, None)
    if settings and settings.get("layers") is not None:
        layers = [place for place, number in enumerate(kept) if number in settings["layers"]]
        setattr(config, NAME, {**settings, "layers": layers})


def _head_width(config: Any) -> int:
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads
