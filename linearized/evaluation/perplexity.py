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
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for tokens in batches:
        tokens = tokens.to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        wanted = tokens[:, 1:].flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
        count += wanted.numel()
    model.train(was_training)
    return total, count


def perplexity(model: PreTrainedModel, batches: Iterable[Tensor]) -> float:
    """The exponential of the mean negative log-likelihood per token. Batches are [B, T]."""
    total, count = negative_log_likelihood(model, batches)
    return math.exp(total / count)
