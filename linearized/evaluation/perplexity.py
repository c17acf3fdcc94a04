"""How well a model predicts held-out text. Knows models and token blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@torch.no_grad()
def negative_log_likelihood(model: PreTrainedModel, batches: Iterable[Tensor]) -> tuple[float, int]:
    """The negative log-likelihood of all predicted tokens, summed, in nats, and the number of these
    tokens. Batches are [B, T]; the first token of a row is context only. The sums of several
    workers may be added."""
    found = [token_losses(model, tokens) for tokens in batches]
    return sum(float(x.sum()) for x in found), sum(x.numel() for x in found)


@torch.no_grad()
def token_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The negative log-likelihood of each token of [B, T] but the first, in nats: [B, T-1]."""
    was_training = model.training
    model.eval()
    tokens = tokens.to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    model.train(was_training)
    return losses.view(len(tokens), -1)


def perplexity(model: PreTrainedModel, batches: Iterable[Tensor]) -> float:
    """The exponential of the mean negative log-likelihood per token. Batches are [B, T]."""
    total, count = negative_log_likelihood(model, batches)
    return math.exp(total / count)
