"""The flagship and its two halves: exact relu² attention to what is near, a linear memory of the
groups around it. Knows parameters; the mathematics is in `linearized/ops/`.

Source: You et al., "When Linear Attention Meets Autoregressive Decoding", ICML 2024 (FLASH-style
local and global parts, masked depthwise convolution).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearized import ops
from linearized.attention.base import LinearAttention, Place, outside_autocast
from linearized.config import LinearConfig

FORMS = {"local": "relu2", "grouped": "relu2", "global": "none"}
"""Weights of pairs in one group."""


class GroupedAttention(LinearAttention):
    """`local`: relu(q̂·k̂)² of near tokens alone. `global`: q̂·k̂ across groups alone (in both
    directions: of all tokens). `grouped`: both, α_h of far ones. α and taps start at zero."""

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        inside = FORMS[config.attention]
        features = 0 if config.attention == "local" else place.width
        near = {"group": config.group} if config.attention == "global" else self.near(config)
        if place.kind == "cross":  # nothing is near: all is read by way of the memory
            features = place.width
        elif config.attention == "global" and not self.causal:
            inside, near = "linear", {"group": 1}
        self.form = ops.Form(inside=inside, features=features, causal=self.causal, **near)
        if place.kind == "cross":
            self.alpha = self.zeros(place.heads)
            with torch.no_grad():
                self.alpha.fill_(1)
        elif config.attention == "grouped":
            self.alpha = self.zeros(place.heads)

    def queries(self, q: Tensor, scaling: float, positions: Tensor | None) -> Tensor:
        return ops.unit(q)

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ops.unit(k), v

    @outside_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Any:
        if where.get("state") is not None:
            return super().forward(q, k, v, **where)
        # Nothing is folded in, so the operator may normalise on its way, which spares two copies.
        out = ops.linear_attention(
            q,
            k,
            v,
            form=self.form,
            alpha=self.alpha,
            taps=self.taps,
            unit_norm=True,
            mask=where.get("mask"),
            segments=where.get("segments"),
            backend=self.backend,
        )
        return out, k, v
