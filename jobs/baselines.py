"""What linear attention is measured against. Knows formulas; written for the benchmarks alone.

B batch, H heads, T tokens, D width, G group size, C groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def einsum(q: Tensor, k: Tensor, v: Tensor, *, alpha: Tensor, taps: Tensor, group: int) -> Tensor:
    """Grouped linear attention in the straightforward way: the scores of every group and the state
    before every group are materialised, the convolution is torch's. [B, H, T, D] each."""
    batch, heads, tokens, width = q.shape
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    missing = -tokens % group

    def grouped(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, missing)).view(batch, heads, -1, group, x.shape[3])

    queries, keys, values = grouped(q), grouped(k), grouped(v)
    scores = torch.einsum("bhcid,bhcjd->bhcij", queries, keys).relu().square()
    mask = torch.ones(group, group, dtype=torch.bool, device=q.device).tril()
    local = torch.einsum("bhcij,bhcje->bhcie", scores * mask, values)
    states = torch.einsum("bhcjd,bhcje->bhcde", keys, values).cumsum(2)
    before = F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    past = torch.einsum("bhcid,bhcde->bhcie", queries, before)
    out = local + alpha[:, None, None, None] * past
    out = out.reshape(batch, heads, -1, width)[:, :, :tokens]
    channels = v.transpose(-1, -2).reshape(batch, heads * width, tokens)
    kernel = taps.flip(1).repeat_interleave(width, dim=0)[:, None]
    near = F.conv1d(F.pad(channels, (taps.shape[1] - 1, 0)), kernel, groups=heads * width)
    return out + near.view(batch, heads, width, tokens).transpose(-1, -2)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by torch's fused kernel. All tensors are [B, H, T, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fla() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The nearest operators of flash-linear-attention by name, in their chunked forms; none where
    it is not installed. They take and give [B, T, H, D]. They have no exact part inside a group and
    no convolution, and so do less than ours. (Yang and Zhang, "FLA: a Triton-based library for
    hardware-efficient implementations of linear attention mechanism", 2024.)"""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.retention import chunk_retention
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return {}

    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gates = q.new_full(q.shape[:3], -0.05, dtype=torch.float32)
        out: Tensor = chunk_simple_gla(q, k, v, g=gates)[0]
        return out

    return {
        "fla simple_gla": gated,
        "fla retention": lambda q, k, v: chunk_retention(q, k, v)[0],
        "fla linear_attn": lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0],
    }


class Cache:
    """Keys and values [B, H, room, D] of the softmax model, allocated once, `length` of them
    filled; new tokens are written behind them."""

    def __init__(self, k: Tensor, v: Tensor, more: int) -> None:
        self.length = k.shape[2]
        self.keys = F.pad(k, (0, 0, 0, more))
        self.values = F.pad(v, (0, 0, 0, more))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """N tokens [B, H, N, D] after the cached ones. `seen` [N, length + N], for a tree."""
        end = self.length + q.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
