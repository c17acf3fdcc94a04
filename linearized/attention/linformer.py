"""Linformer, causal: keys and values projected along time onto a few rows. Knows the projection;
the mathematics is in `linearized/ops/`.

Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, whose projection of
a whole sequence sees the future. Here K'_t = Σ_{j≤t} E_{:,j} k_j and V'_t likewise are sums so
far, and a learned E of one period repeats, so that any length has columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearized import ops
from linearized.attention.base import LinearAttention, Place, widen
from linearized.config import LinearConfig


class LinformerAttention(LinearAttention):
    """o_t = softmax(scaling · q_t K'_tᵀ) V'_t. E starts as normal numbers of variance 1/period,
    drawn from the config's seed."""

    projection: nn.Parameter
    """E, [rows, period]."""

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        self.form = ops.Form(group=1, inside="slots", features=config.features, causal=self.causal)
        numbers = self.drawn(config.seed, config.features, config.period)
        self.projection = nn.Parameter(self.placed(numbers * config.period**-0.5).to(place.dtype))

    def queries(self, q: Tensor, scaling: float, positions: Tensor | None) -> Tensor:
        return widen(q) * scaling

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        columns = widen(self.projection).t()[positions % self.projection.shape[1]]
        keys = columns[:, None].expand(len(k), k.shape[1], -1, -1)
        return keys, torch.cat([widen(k), widen(v)], dim=-1)
