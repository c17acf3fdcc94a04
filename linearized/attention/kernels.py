"""Kernel attentions: o_t = φ(q_t)ᵀ Σ φ(k_j) v_jᵀ / φ(q_t)ᵀ Σ φ(k_j), each with a φ of its own.
Knows feature maps; the sums are in `linearized/ops/`. All of it is float32 at least.

A first column of ones beside the values makes the operator sum the denominator, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized import ops
from linearized.attention.base import LinearAttention, Place, widen
from linearized.config import LinearConfig


class KernelAttention(LinearAttention):
    """Base: φ is `features`, the same for queries and keys."""

    num_features: int
    least = 1e-6
    """Of the denominator."""

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        self.num_features = self.prepare(config, place)
        self.form = ops.Form(
            group=1, inside="linear", features=self.num_features, causal=self.causal
        )

    def prepare(self, config: LinearConfig, place: Place) -> int:
        """Make what φ needs; its width."""
        return place.width

    def features(self, x: Tensor) -> Tensor:
        """φ: [.., D] to [.., F]."""
        raise NotImplementedError

    def queries(self, q: Tensor, scaling: float, positions: Tensor | None) -> Tensor:
        return self.features(widen(q))

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.features(widen(k)), with_ones(widen(v))

    def leave(self, sums: Tensor) -> Tensor:
        return sums[..., 1:] / sums[..., :1].clamp(min=self.least)


class ReluAttention(KernelAttention):
    """φ = relu + 1e-3. Source: the ReLU attention of You et al.; Cai et al., "EfficientViT",
    2023."""

    def features(self, x: Tensor) -> Tensor:
        return x.relu() + 1e-3


class PerformerAttention(KernelAttention):
    """FAVOR+: positive random features whose inner product is exp(scaling · q·k) in expectation.
    Source: Choromanski et al., "Rethinking Attention with Performers", 2021. The rows of ω are
    orthogonal in blocks of D, with norms of normal vectors. Their stabiliser, a maximum over the
    sequence, would let the future leak into the past. Here it is a constant of each feature, which
    keys lack and queries have in addition, and the maximum over a query's own features, which the
    quotient cancels."""

    least = 1e-30
    omega: Tensor
    """[F, D]."""

    def prepare(self, config: LinearConfig, place: Place) -> int:
        width, blocks = place.width, -(-config.features // place.width)
        normal = self.drawn(config.seed, 2, blocks, width, width)
        q, r = torch.linalg.qr(normal[0])
        uniform = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # no direction is favoured
        omega = (uniform * normal[1].norm(dim=-1, keepdim=True)).reshape(-1, width)[
            : config.features
        ]
        self.register_buffer("omega", self.placed(omega))
        return config.features

    def queries(self, q: Tensor, scaling: float, positions: Tensor | None) -> Tensor:
        exponents = self._exponents(q, scaling) + self._shift()
        return (exponents - exponents.amax(-1, keepdim=True).detach()).exp()

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = (self._exponents(k, scaling) - self._shift()).exp()
        return features * self.num_features**-0.5, with_ones(widen(v))

    def _shift(self) -> Tensor:
        """[F]. No exponent of a key is above ‖ω‖²/2; e^40 leaves room for long sums."""
        return (self.omega.square().sum(-1) / 2 - 40).clamp(min=0)

    def _exponents(self, x: Tensor, scaling: float) -> Tensor:
        x = widen(x) * scaling**0.5
        return x @ self.omega.to(x.dtype).t() - x.square().sum(-1, keepdim=True) / 2


class RandomFourierAttention(KernelAttention):
    """φ = m^-½ [sin ωx̂, cos ωx̂]: its inner product is exp(-‖q̂ - k̂‖²/2) in expectation. Source:
    Peng et al., "Random Feature Attention", 2021, without gates. The denominator, which noise may
    make negative, is kept above what the farthest single key would give, e^-2."""

    least = 0.1353352832366127
    omega: Tensor
    """[F/2, D]."""

    def prepare(self, config: LinearConfig, place: Place) -> int:
        omega = self.drawn(config.seed, config.features, place.width)
        self.register_buffer("omega", self.placed(omega))
        return 2 * config.features

    def features(self, x: Tensor) -> Tensor:
        angles = ops.unit(x) @ self.omega.to(x.dtype).t()
        return torch.cat([angles.sin(), angles.cos()], dim=-1) * len(self.omega) ** -0.5


class TransNormerAttention(KernelAttention):
    """φ = 1 + elu, and instead of a denominator an RMS norm of the sums, with a gain that starts
    at one. Source: Qin et al., "The Devil in Linear Transformer", 2022."""

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        self.gain = self.zeros(place.heads, place.value_width)
        with torch.no_grad():
            self.gain.fill_(1)

    def features(self, x: Tensor) -> Tensor:
        return 1 + F.elu(x)

    def tokens(
        self, k: Tensor, v: Tensor, scaling: float, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.features(widen(k)), widen(v)

    def leave(self, sums: Tensor) -> Tensor:
        normed = sums * (sums.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return normed * self.gain[:, None].to(sums.dtype)


def with_ones(v: Tensor) -> Tensor:
    """[1, v]."""
    return F.pad(v, (1, 0), value=1.0)
