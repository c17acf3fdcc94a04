"""Which token follows, given logits: filters, temperature, noise. One rule for target and draft.

The token at position p is argmax(filtered logits / temperature + noise(seed, p)); temperature 0
has no noise. So a text depends on model, prompt, parameters and seed only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linearized.errors import ConfigError
from linearized.speculative.noise import gumbel


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    temperature: float = 0.0
    """0: the most probable token. 1: the model's own distribution."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie between 0 and 1, got {self.min_p}")

    def scores(self, logits: Tensor, positions: Tensor) -> Tensor:
        """What the next token is the argmax of. Logits [N, V] at N places whose next token takes
        `positions` [N]; scores [N, V]."""
        if self.temperature == 0:
            return logits
        # Relative to the best, so that no temperature, however small, makes them infinite above.
        relative = logits.double() - logits.amax(1, keepdim=True)
        filtered = self.filter(relative / self.temperature)
        return filtered + gumbel(self.seed, positions, logits.shape[1])

    def filter(self, logits: Tensor) -> Tensor:
        """-inf for every token that top_k, top_p and min_p leave out; applied in that order, to
        logits [N, V] that temperature has scaled."""
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=1, descending=True, stable=True)
            probabilities = ordered.softmax(1)
            before = probabilities.cumsum(1) - probabilities
            dropped = torch.zeros_like(before, dtype=torch.bool)
            logits = logits.masked_fill(dropped.scatter(1, order, before >= self.top_p), -math.inf)
        if self.min_p > 0:
            best = logits.amax(1, keepdim=True)
            logits = logits.masked_fill(logits < best + math.log(self.min_p), -math.inf)
        return logits
