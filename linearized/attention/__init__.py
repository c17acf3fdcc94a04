"""Attention variants: parameters and one class each. `LinearConfig.attention` names one."""

from __future__ import annotations

from linearized.attention.grouped import GroupedAttention

__all__ = ["VARIANTS", "GroupedAttention"]

VARIANTS = {"grouped": GroupedAttention, "local": GroupedAttention}
