"""A memory of a whole text that is read by another one: sums over all its tokens, no groups. Knows
products of features; knows nothing of time.

B batch, H query heads, K key/value heads, T tokens, F features, U width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def remember(features: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ φ(k) vᵀ over all T tokens that `mask` [B, T] keeps: features [B, K, T, F], v [B, K, T, U]
    to [B, K, F, U], float32 at least."""
    wide = torch.promote_types(v.dtype, torch.float32)
    if mask is not None:
        features = features * mask.bool()[:, None, :, None]
    return features.to(wide).transpose(-1, -2) @ v.to(wide)


def recall(features: Tensor, memory: Tensor, alpha: Tensor | None = None) -> Tensor:
    """α φ(q)ᵀ memory: features [B, H, T, F], memory [B, K, F, U] to [B, H, T, U]."""
    batch, heads, num_tokens, width = features.shape
    if alpha is not None:
        features = features * alpha[:, None, None]
    rows = features.reshape(batch, memory.shape[1], -1, width).to(memory.dtype) @ memory
    return rows.view(batch, heads, num_tokens, -1).to(features.dtype)


def pick(q: Tensor, memory: Tensor) -> Tensor:
    """Linformer's answer of a whole memory: q [B, H, T, D], memory [B, K, F, D+E] to [B, H, T, E],
    softmax over the F rows."""
    batch, heads, num_tokens, width = q.shape
    rows = q.reshape(batch, memory.shape[1], -1, width).to(memory.dtype)
    picks = (rows @ memory[..., :width].transpose(-1, -2)).softmax(-1)
    return (picks @ memory[..., width:]).view(batch, heads, num_tokens, -1).to(q.dtype)
