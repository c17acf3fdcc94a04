"""How well a model predicts the documents of token blocks. Knows models and batches."""

from __future__ import annotations

from typing import Any

from linearized.evaluation.perplexity import token_losses
from linearized.training.batch import IGNORED, Batch


def negative_log_likelihood(model: Any, batch: Batch) -> tuple[float, int]:
    """Of the tokens whose prediction training would learn, summed, in nats, and their number. The
    documents of a row do not see each other."""
    batch = batch.to(model.device)
    inputs = {name: x for name, x in batch.inputs(model).items() if name != "use_cache"}
    losses = token_losses(model, inputs.pop("input_ids"), **inputs)
    asked = losses[batch.labels()[:, 1:] != IGNORED]
    return float(asked.double().sum()), asked.numel()
