"""Attention variants: parameters and one class each. `LinearConfig.attention` names one; formulas
and sources are in `docs/variants.md`."""

from __future__ import annotations

from linearized.attention.base import CrossAttention, LinearAttention, Place
from linearized.attention.grouped import GroupedAttention
from linearized.attention.hedgehog import HedgehogAttention
from linearized.attention.kernels import (
    PerformerAttention,
    RandomFourierAttention,
    ReluAttention,
    TransNormerAttention,
)
from linearized.attention.linformer import LinformerAttention
from linearized.attention.softmax import softmax_attention
from linearized.attention.yoso import YosoAttention

__all__ = ["VARIANTS", "CrossAttention", "LinearAttention", "Place", "softmax_attention"]

VARIANTS: dict[str, type[LinearAttention]] = {
    "global": GroupedAttention,
    "grouped": GroupedAttention,
    "hedgehog": HedgehogAttention,
    "linformer": LinformerAttention,
    "local": GroupedAttention,
    "performer": PerformerAttention,
    "relu": ReluAttention,
    "rfa": RandomFourierAttention,
    "transnormer": TransNormerAttention,
    "yoso": YosoAttention,
}
