"""Does a linearized model decode as it reads? A few random tokens tell, before anybody trains it.
Knows models as they are called; knows no family of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from linearized.errors import LinearizedError, ModelError
from linearized.slots import NAME, attention_modules, linear_modules, slot_of, variant_of
from linearized.tables import context_limit

NUM_TOKENS = 12
SPLIT = 7
"""Tokens that are read before the others."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Of all logits, as a relative norm; 0.2 in other types, where rounding sends tokens to other
experts. Angles of positions are float32 in every model."""

Decode = Callable[[PreTrainedModel, list[Tensor]], Tensor]


def can_probe(model: PreTrainedModel) -> bool:
    """Weights that are not there, or that are spread over processes, give no logits."""
    there = all(not weight.is_meta and weight.numel() > 0 for weight in model.parameters())
    return there and model.main_input_name == "input_ids"


@torch.no_grad()
def probe_softmax(model: PreTrainedModel) -> None:
    """Give a model that has no linear layers yet our attention function: its logits must stay.

    Raises:
        ModelError: its layers do more than our softmax attention does.
    """
    if not can_probe(model):
        model.set_attn_implementation(NAME)
        return
    tokens = _tokens(model)
    with _aside(model):
        model.set_attn_implementation("eager")  # the one that honours whatever a model asks for
        wanted = _logits(model, tokens)
        model.set_attn_implementation(NAME)
        found = _logits(model, tokens)
        if wanted is not None and found is not None:
            _compare(model, found, wanted, "its softmax layers do not attend as transformers' do")


@torch.no_grad()
def probe(model: PreTrainedModel, decode: Decode) -> None:
    """Let a linearized model read a text as a whole and, by `decode`, in two parts.

    Raises:
        ModelError: the logits differ, or it cannot do so at all.
    """
    if not can_probe(model):
        return
    tokens = _tokens(model)
    with _aside(model):
        with _all_reached(model):
            wanted = _logits(model, tokens)
        if wanted is not None and any(slot_of(m) is not None for m in attention_modules(model)):
            parts = [part for part in (tokens[:, :SPLIT], tokens[:, SPLIT:]) if part.shape[1]]
            _compare(
                model, decode(model, parts), wanted,
                "it does not decode as it reads, so that it keeps more from token to token than "
                "attention does, or counts positions from elsewhere",
            )  # fmt: skip


def _tokens(model: PreTrainedModel) -> Tensor:
    """[1, T], the same for every model of this vocabulary; no padding."""
    config = model.config
    num_tokens = min(NUM_TOKENS, context_limit(model) or NUM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (1, num_tokens), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int):
        tokens = torch.where(tokens == padding, (padding + 1) % config.vocab_size, tokens)
    return tokens.to(model.device)


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor | None:
    """[1, T, V]; None: this model has none."""
    inputs = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    output: Any = model(**inputs, use_cache=False) if _decodes(model) else model(**inputs)
    logits: Tensor | None = output.get("logits")
    if logits is None or logits.ndim != 3 or logits.shape[1] != tokens.shape[1]:
        return None
    return logits


def _decodes(model: PreTrainedModel) -> bool:
    return any(getattr(module, "is_causal", True) for module in attention_modules(model))


def _compare(model: PreTrainedModel, found: Tensor, wanted: Tensor, reason: str) -> None:
    if not wanted.isfinite().all():
        return  # weights that are not those of a model yet
    error = float((found - wanted).float().norm() / wanted.float().norm().clamp(min=1e-6))
    dtype = model.dtype
    if torch.is_autocast_enabled(found.device.type):
        dtype = torch.get_autocast_dtype(found.device.type)
    if not error < _TOLERANCE.get(dtype, 0.2):
        raise ModelError(f"{reason} (logits differ by {error:.2g}, as a relative norm)")


@contextlib.contextmanager
def _aside(model: PreTrainedModel) -> Iterator[None]:
    """Errors become reasons why the model cannot be linearized; modes and random numbers are as
    they were afterwards."""
    name = type(model).__name__
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            for module in training:
                module.training = False
            yield
    except LinearizedError as error:
        raise ModelError(f"{name} cannot be linearized: {error}") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{name} cannot be linearized: reading {NUM_TOKENS} tokens ended with "
            f"{type(error).__name__}: {reason}"
        ) from error
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _all_reached(model: PreTrainedModel) -> Iterator[None]:
    """Raises ModelError unless every linear attention is called."""
    linear = {name: variant_of(module) for name, module in linear_modules(model).items()}
    reached: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, variant in linear.items():
            assert variant is not None
            hook = variant.register_forward_hook(lambda *_, name=name: reached.add(name))
            hooks.callback(hook.remove)
        yield
    missed = [name for name in linear if name not in reached]
    if missed:
        raise ModelError(
            f"{len(missed)} of {len(linear)} attention modules do not attend through transformers' "
            f"AttentionInterface, among them {', '.join(missed[:3])}"
        )
