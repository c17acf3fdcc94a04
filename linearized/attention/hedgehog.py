"""Hedgehog in groups: exact softmax in the group, a learned feature map around it, normalised
together. Knows parameters; the mathematics is in `linearized/ops/`.

Source: Zhang et al., "The Hedgehog & the Porcupine", 2024, and "LoLCATs", 2024 (whose window
slides or ends at a chunk: here it is the group).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearized import ops
from linearized.attention.base import LinearAttention, Place, widen
from linearized.attention.kernels import with_ones
from linearized.config import LinearConfig


class HedgehogAttention(LinearAttention):
    """φ(x) = [softmax(xW), softmax(-xW)], W learned, a matrix a head that starts as the identity;
    pairs across groups have α_h φ(q)·φ(k), α = exp(`log_alpha`), which starts at one."""

    least = 1e-9

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        width = place.width
        self.form = ops.Form(
            group=config.group, inside="softmax", features=2 * width, causal=self.causal
        )
        identity = torch.eye(width, dtype=place.dtype, device=place.device)
        self.query_map = nn.Parameter(identity.repeat(place.heads, 1, 1))
        self.key_map = nn.Parameter(identity.repeat(place.kv_heads, 1, 1))
        self.log_alpha = self.zeros(place.heads)

    def scale(self) -> Tensor:
        return widen(self.log_alpha).exp()

    def queries(self, q: Tensor, scaling: float) -> Tensor:
        q = widen(q)
        return torch.cat([q * scaling, _features(q, self.query_map)], dim=-1)

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        k = widen(k)
        return torch.cat([k, _features(k, self.key_map)], dim=-1), with_ones(widen(v))

    def leave(self, sums: Tensor) -> Tensor:
        return sums[..., 1:] / sums[..., :1].clamp(min=self.least)


def _features(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, T, D] with [H, D, D]: [B, H, T, 2D]."""
    mapped = x @ weight.to(x.dtype)
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], dim=-1)
