"""How well a model predicts held-out text. Knows models and tokens.

B batch, T tokens of a row, N tokens of a text. Sums are in nats. Over 2 and over bytes (`bits`),
they can be compared between models whose tokenizers differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.evaluation.logits import Reading


def negative_log_likelihood(model: PreTrainedModel, batches: Iterable[Tensor]) -> tuple[float, int]:
    """The negative log-likelihood of all predicted tokens, summed, in nats, and the number of these
    tokens. Batches are [B, T]; the first token of a row is context only. The sums of several
    workers may be added."""
    found = [token_losses(model, tokens) for tokens in batches]
    return sum(float(x.double().sum()) for x in found), sum(x.numel() for x in found)


@torch.no_grad()
def token_losses(model: PreTrainedModel, tokens: Tensor, **inputs: Any) -> Tensor:
    """The negative log-likelihood of each token of [B, T] but the first, in nats: [B, T-1].
    `inputs` are further arguments of the model, such as `segment_ids`."""
    tokens = tokens.to(model.device)
    reading = Reading(model, tokens, **inputs)
    rows, length = tokens.shape
    places = torch.arange(rows * length, device=tokens.device).view(rows, length)
    return _losses(reading, places[:, :-1].flatten(), tokens[:, 1:].flatten()).view(rows, -1)


def perplexity(model: PreTrainedModel, batches: Iterable[Tensor]) -> float:
    """The exponential of the mean negative log-likelihood per token. Batches are [B, T]."""
    total, count = negative_log_likelihood(model, batches)
    return math.exp(total / count)


def strided(
    model: PreTrainedModel, text: Tensor, *, length: int, stride: int
) -> Iterator[tuple[float, int]]:
    """Sums of the negative log-likelihood of the tokens of one text [N], and their numbers, window
    by window. Windows of `length` tokens begin `stride` tokens apart, and each scores what those
    before it have not: every token but the first of the text, with at least length - stride tokens
    before it, where there are so many. A stride of `length` cuts the text into rows that do not
    overlap, of which the first tokens are not scored.

    So does Hugging Face (transformers' page "Perplexity of fixed-length models"), whose mean weighs
    the windows slightly otherwise: it takes one token too few for each but the first.
    """
    if length < 2 or not 1 <= stride <= length:
        raise ConfigError(
            f"stride must be from 1 to the length of a window, and that at least 2; got stride="
            f"{stride}, length={length}"
        )
    scored = 1  # the first token has nothing before it
    for first in range(0, len(text), stride):
        last = min(first + length, len(text))
        new = last - max(scored, first + 1)
        if new > 0:
            yield _window(model, text[first:last], new), new
        scored = last
        if last == len(text):
            return


def bits(nats: float, num_bytes: int) -> float:
    """Bits a byte of a text of so many bytes."""
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def _window(model: PreTrainedModel, tokens: Tensor, new: int) -> float:
    """Nats of the last `new` tokens of a window."""
    tokens = tokens.to(model.device)
    asked = torch.arange(len(tokens) - new - 1, len(tokens) - 1, device=tokens.device)
    losses = _losses(Reading(model, tokens[None]), asked, tokens[-new:])
    return float(losses.double().sum())


def _losses(reading: Reading, asked: Tensor, wanted: Tensor) -> Tensor:
    """Of the tokens `wanted` [N] that follow those at `asked` [N], [N]."""
    found = [
        F.cross_entropy(logits, wanted[part], reduction="none")
        for part, logits in reading.chunks(asked)
    ]
    return torch.cat(found)
