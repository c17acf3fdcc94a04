"""YOSO: attention by hash collisions. Knows hashes and their gradient; the sums are in
`linearized/ops/`.

Source: Zeng et al., "You Only Sample (Almost) Once", 2021. A pair weighs the share of hashes that
give query and key the same bucket, in expectation (1 - arccos(q̂·k̂)/π)^bits. The tables of all
hashes are the memory, summed over time; the original's hold the whole sequence. The original
divides by the norm of the sum; here it is the sum of weights, as for the other kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearized import documents, ops
from linearized.attention.base import Place, widen
from linearized.attention.kernels import KernelAttention
from linearized.config import LinearConfig

BLOCK = 256
"""Queries whose gradient is worked out at once."""


class YosoAttention(KernelAttention):
    """φ(x) is one-hot in the bucket of each hash. Gradients of queries and keys are those of the
    expected weights, worked out in blocks: time quadratic in the tokens, in training only."""

    planes: Tensor
    """[hashes, bits, D], normals of the hyperplanes whose sides are a hash's bits."""

    def prepare(self, config: LinearConfig, place: Place) -> int:
        planes = self.drawn(config.seed, config.hashes, config.bits, place.width)
        self.register_buffer("planes", self.placed(planes))
        self.least = 1 / config.hashes  # the weight of a single collision
        return config.hashes << config.bits

    def features(self, x: Tensor) -> Tensor:
        hashes, bits, _ = self.planes.shape
        sides = torch.einsum("...d,hbd->...hb", x.detach(), self.planes.to(x.dtype)) > 0
        powers = 2 ** torch.arange(bits, device=x.device)
        buckets = (sides * powers).sum(-1)  # .. hashes
        one_hot = F.one_hot(buckets, 1 << bits).flatten(-2)
        return one_hot.to(x.dtype) * hashes**-0.5

    def with_gradient(
        self,
        sums: Tensor,
        q: Tensor,
        k: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
            return sums
        q, k = ops.unit(widen(q)), ops.unit(widen(k))
        bits = self.planes.shape[1]
        nothing: Tensor = _Expectation.apply(q, k, values, bits, self.causal, mask, segments)
        if mask is not None and self.place.kind != "cross":
            nothing = nothing * mask.bool()[:, None, :, None]
        return sums + nothing


class _Expectation(torch.autograd.Function):
    """Zero; its gradient is that of Σ (1 - arccos(q̂·k̂)/π)^bits v for q̂ and k̂."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, H, T, D]
        k: Tensor,  # [B, K, T, D]
        values: Tensor,  # [B, K, T, U]
        bits: int,
        causal: bool,
        mask: Tensor | None,
        segments: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, values, mask, segments)
        ctx.bits, ctx.causal = bits, causal
        return values.new_zeros(*q.shape[:3], values.shape[3])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, values, mask, segments = ctx.saved_tensors
        repeats = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in (k, values))
        to_q, to_k = torch.empty_like(q), torch.zeros_like(keys)
        columns = torch.arange(k.shape[2], device=k.device)
        for start in range(0, q.shape[2], BLOCK):
            rows = slice(start, min(start + BLOCK, q.shape[2]))
            seen = documents.visible(
                columns, causal=ctx.causal, mask=mask, segments=segments, rows=rows
            )
            cosine = q[:, :, rows] @ keys.transpose(-1, -2)
            slope = _slope(cosine, ctx.bits) * seen[:, None]
            slope = slope * (grad[:, :, rows] @ values.transpose(-1, -2))
            to_q[:, :, rows] = slope @ keys
            to_k += slope.transpose(-1, -2) @ q[:, :, rows]
        to_k = to_k.unflatten(1, (k.shape[1], repeats)).sum(2)
        return to_q, to_k, None, None, None, None, None


def _slope(cosine: Tensor, bits: int) -> Tensor:
    """Derivative of (1 - arccos(x)/π)^bits; at ±1, where it is infinite, that at ±√0.999."""
    angle = cosine.clamp(-1, 1).arccos() / torch.pi
    sine = (1 - cosine.square()).clamp(min=1e-3).sqrt()
    return bits * (1 - angle) ** (bits - 1) / (torch.pi * sine)
