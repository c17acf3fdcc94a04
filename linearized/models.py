"""Hugging Face models in and out, and the three verbs of decoding: extend, verify, commit.

Knows what users call; `linearized.interface` knows what transformers calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging as hf_logging

from linearized import ops
from linearized.config import LinearConfig
from linearized.errors import ModelError, StateError
from linearized.interface import (
    NAME,
    Pass,
    attach,
    attention_modules,
    fingerprint,
    fold,
    linear_config,
    new_parameters,
    new_state,
)
from linearized.state import DecodeState, Pending

__all__ = [
    "attention_modules",
    "commit",
    "extend",
    "fingerprint",
    "linear_config",
    "linearize",
    "load",
    "new_parameters",
    "new_state",
    "verify",
]

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
    attach(cast(PreTrainedModel, model.base_model), config)
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
    step = Pass(state=state, nodes=nodes, mask=mask)
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
    step = Pass(state=state, nodes=nodes)
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

    fold(state, accepted(pending.keys), accepted(pending.values), mask)


def _forward(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, step: Pass, logits_to_keep: int
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
