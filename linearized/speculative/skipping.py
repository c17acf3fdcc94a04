"""Which layers of a target to keep, so that what is left drafts for it. Knows models and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.models import attention_modules, check_decoder, extend, new_state, sketch, verify
from linearized.state import DecodeState

CHAIN = 8
"""Tokens that are guessed from one state."""
PATIENCE = 3
"""Layers that may be left out one after the other without any gain until the search ends."""


@dataclass(frozen=True, slots=True)
class Found:
    layers: tuple[int, ...]
    agreement: float
    """How often its best token is the whole model's, on the text it was searched on."""
    speed: float
    """Tokens a second in a chain of the best length, over plain decoding; an estimate that counts
    layers only."""


def search(
    model: PreTrainedModel, tokens: Tensor, *, progress: Callable[[Found], None] | None = None
) -> Found:
    """The layers that promise the most tokens a second: one layer after the other is left out,
    always the one whose loss costs the least agreement. `tokens` [B, T] are text of the kind that
    is to be generated, T at least 2·8.

    Raises:
        ConfigError: they are too few.
    """
    check_decoder(model)
    if len(tokens) == 0 or tokens.shape[1] < 2 * CHAIN:
        raise ConfigError(
            f"a search needs texts of at least {2 * CHAIN} tokens, got {list(tokens.shape)}"
        )
    calibration = _Calibration(model, tokens)
    kept = tuple(range(len(attention_modules(model))))
    best = Found(kept, 1.0, 1.0)
    idle, total = 0, len(kept)
    while len(kept) > 1 and idle < PATIENCE:
        trials = [tuple(other for other in kept if other != layer) for layer in kept]
        agreements = [calibration.agreement(trial) for trial in trials]
        agreement = max(agreements)
        kept = trials[agreements.index(agreement)]
        found = Found(kept, agreement, speed(agreement, len(kept) / total))
        idle = 0 if found.speed > best.speed else idle + 1
        best = max(best, found, key=lambda one: one.speed)
        if progress is not None:
            progress(found)
    return best


def agreement(model: PreTrainedModel, tokens: Tensor, layers: Sequence[int]) -> float:
    """How often the best token of the model with these layers only is the whole model's, in short
    chains on the whole model's state, on text [B, T]."""
    return _Calibration(model, tokens).agreement(tuple(layers))


def speed(agreement: float, cost: float, *, longest: int = CHAIN) -> float:
    """Tokens a second over plain decoding, with chains of the best length: a guess costs `cost` of
    a step and is right with probability `agreement`, a verification costs a step."""
    rates = [1.0]
    tokens, right = 1.0, 1.0
    for length in range(1, longest + 1):
        right *= agreement
        tokens += right
        rates.append(tokens / (1 + length * cost))
    return max(rates)


class _Calibration:
    """Where the whole model was, and what it said next."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self._model = model
        self._places: list[tuple[DecodeState, Tensor, Tensor]] = []
        state = new_state(model, len(tokens))
        third = max((tokens.shape[1] - CHAIN) // 2, CHAIN)
        for start in range(0, tokens.shape[1] - third - CHAIN + 1, third):
            extend(model, tokens[:, start : start + third], state, logits_to_keep=1)
            chain = tokens[:, start + third : start + third + CHAIN]
            said = verify(model, chain, _chain(chain), state)[0].argmax(-1)
            self._places.append((state.clone(), chain, said))

    def agreement(self, layers: tuple[int, ...]) -> float:
        right = count = 0
        for state, chain, said in self._places:
            logits = sketch(self._model, chain, _chain(chain), state, layers=layers)
            right += int((logits.argmax(-1) == said).sum())
            count += said.numel()
        return right / count


def _chain(tokens: Tensor) -> Tensor:
    return torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
