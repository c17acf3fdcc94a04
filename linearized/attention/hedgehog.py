"""Hedgehog in groups: exact softmax of what is near, a learned feature map around it, normalised
together. Knows parameters; the mathematics is in `linearized/ops/`.

Source: Zhang et al., "The Hedgehog & the Porcupine", 2024, and "LoLCATs", 2024 (whose window
slides or ends at a chunk: here it is groups). Sinks: Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2024. The bound is this project's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from linearized import ops
from linearized.attention.base import LinearAttention, Place, positions_of, widen
from linearized.attention.kernels import with_ones
from linearized.config import LinearConfig


class HedgehogAttention(LinearAttention):
    """φ(x) = [softmax(xW), softmax(-xW)], W learned, a matrix a head that starts as the identity;
    far pairs have α_h φ(q)·φ(k), α = exp(`log_alpha`), which starts at one as published, at 0.1
    beside a window, sinks or a bound. With a bound b_h = exp(`log_bound`), they weigh min(1, b_h /
    the number of far tokens) times as much."""

    least = 1e-9
    start = 0.1

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        width = place.width
        self.form = ops.Form(
            inside="softmax", features=2 * width, causal=self.causal, **self.near(config)
        )
        identity = torch.eye(width, dtype=place.dtype, device=place.device)
        self.query_map = nn.Parameter(identity.repeat(place.heads, 1, 1))
        self.key_map = nn.Parameter(identity.repeat(place.kv_heads, 1, 1))
        self.log_alpha = self.zeros(place.heads)
        self.log_bound = None
        if self.causal and config.bound is not None:
            self.log_bound = self.zeros(place.heads)
            with torch.no_grad():
                self.log_bound.fill_(math.log(config.bound))
        if self.causal and (config.window or config.sinks or config.bound):
            with torch.no_grad():
                self.log_alpha.fill_(math.log(self.start))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
        """As of every variant. Whole rows under autocast on a CPU, as in training, go a way that
        multiplies in half precision and takes a fraction of the time."""
        if not self._goes_narrow(q, **settings):
            return super().forward(q, k, v, **settings)
        scaling = settings.get("scaling") or self.place.width**-0.5
        with torch.autocast(q.device.type, enabled=False):
            wide_v = widen(v)
            positions = positions_of(k, None, None, None, None)
            queries = self.queries(widen(q), scaling, positions)
            keys, values = self.tokens(widen(k), wide_v, scaling, positions)
            out = ops.attend_narrow(
                queries, keys, values, form=self.form, alpha=self.scale(), least=self.least
            )
            if self.taps is not None:
                out = out + ops.convolve(wide_v, self.taps)
        return out.to(v.dtype), keys, values

    def _goes_narrow(
        self,
        q: Tensor,
        *,
        state: Any = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        layout: Any = None,
        **_: Any,
    ) -> bool:
        apart = state is not None or mask is not None or layout is not None
        if apart or not self.causal or self.backend is not None or q.device.type != "cpu":
            return False
        if not torch.is_autocast_enabled("cpu"):
            return False
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        return segments is None or bool((segments == segments[:, :1]).all())

    def scale(self) -> Tensor:
        return widen(self.log_alpha).exp()

    def far_weight(self) -> tuple[nn.Parameter, float]:
        return self.log_alpha, -math.inf

    def queries(self, q: Tensor, scaling: float, positions: Tensor | None) -> Tensor:
        q = widen(q)
        features = _features(q, self.query_map)
        if self.log_bound is not None and positions is not None:
            features = features * self._share(positions).to(features.dtype)
        return torch.cat([q * scaling, features], dim=-1)

    def _share(self, positions: Tensor) -> Tensor:
        """[B or 1, H, T, 1], what the bound leaves of the far pairs' weights."""
        assert self.log_bound is not None
        near = self.form.near
        far = (near.oldest(positions) - near.sinks).clamp(min=1)[:, None, :, None]
        return (widen(self.log_bound).exp()[:, None, None] / far).clamp(max=1)

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
