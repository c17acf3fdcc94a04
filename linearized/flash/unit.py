"""A layer of FLASH: the gated attention unit, with its norm and its token shift. The formulas are
in the docstring of `linearized.flash`.

B batch, T tokens or tree nodes, C hidden width, E value width, D width of the one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from linearized import documents, ops
from linearized.attention.base import LinearAttention, Place, widen
from linearized.config import LinearConfig
from linearized.context import Context
from linearized.flash.config import FlashConfig
from linearized.slots import slot_of


class GatedAttention(GradientCheckpointingLayer):
    """A layer: the gated attention unit."""

    def __init__(self, config: FlashConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.group = config.group
        self.shifted = config.hidden_size // 2
        """Channels that come from the token before."""
        inner, width = config.expansion * config.hidden_size, config.head_dim
        self.widths = (inner, inner, width)
        self.norm = ScaleNorm(config.norm_eps)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths))
        self.scale = nn.Parameter(torch.ones(4, width))
        self.offset = nn.Parameter(torch.zeros(4, width))
        place = Place(layer=layer_idx, heads=1, kv_heads=1, width=2 * width, value_width=inner)
        self.linear_attention = MixedChunkAttention(
            LinearConfig.from_dict(config.linearized), place
        )
        self.out_proj = nn.Linear(inner, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,  # [B, T, C]
        positions: Tensor,  # [B or 1, T]
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        x = self._shift(self.norm(hidden), mask, segments, context)
        gate, values, base = F.silu(self.in_proj(x)).split(self.widths, dim=-1)
        q, k = self._heads(base, positions, rotary)
        v = values[:, None]
        slot = slot_of(self)
        if context is not None and slot is not None:
            out = context.attend(
                slot.index, self.linear_attention, q, k, v, None, self.linear_attention.backend
            )
        else:
            out, _, _ = self.linear_attention(q, k, v, mask=mask, segments=segments)
        return hidden + self.out_proj(gate * out[:, 0])

    def _shift(
        self, x: Tensor, mask: Tensor | None, segments: Tensor | None, context: Context | None
    ) -> Tensor:
        own, kept = x.split([self.shifted, x.shape[-1] - self.shifted], dim=-1)
        last = layout = None
        slot = slot_of(self)
        if context is not None and slot is not None:
            last, layout = context.shift(slot.index, own), context.layout
        before = previous(own, last, mask=mask, segments=segments, layout=layout)
        return torch.cat([before, kept], dim=-1)

    def _heads(
        self, base: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Z [B, T, D] to queries and keys [B, 1, T, 2D]."""
        heads = _rotate(base[:, :, None] * self.scale + self.offset, *rotary)  # B T 4 D
        q, k, far_q, far_k = heads.unbind(2)
        before = (positions // self.group * self.group).clamp(min=1)[..., None]
        share = before.to(rotary[0].dtype).reciprocal().to(far_q.dtype)
        queries = torch.cat([q / self.group, far_q * share], dim=-1)
        return queries[:, None], torch.cat([k, far_k], dim=-1)[:, None]


class ScaleNorm(nn.Module):
    """x over its root mean square, times one learned number. Source: Nguyen and Salazar,
    "Transformers without Tears", 2019."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normed.to(x.dtype) * self.gain


class MixedChunkAttention(LinearAttention):
    """One head whose queries and keys are [local, far]: Laplace weights in the group, the far
    parts' products around it."""

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__(config, place)
        self.form = ops.Form(group=config.group, inside="laplace", features=place.width // 2)


def previous(
    x: Tensor,
    last: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    layout: ops.Layout | None = None,
) -> Tensor:
    """x [B, T, C] of each token to that of the token before it: the parent of a tree's node, else
    the last one that `mask` [B, T] keeps. Before the first is `last` [B, C], or zeros; so are they
    at the beginning of a document in `segments` [B, T]."""
    num_tokens = x.shape[1]
    last = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    whole = torch.cat([last[:, None], x], dim=1)
    columns = torch.arange(num_tokens + 1, device=x.device)
    index = columns[:-1].expand(x.shape[0], -1)
    if layout is not None:
        depths = layout.positions
        parents = layout.visible & (depths[:, :, None] - depths[:, None, :] == 1)
        index = (parents * columns[1:]).sum(-1)
    elif mask is not None:
        index = F.pad((mask.bool() * columns[1:]).cummax(1).values[:, :-1], (1, 0))
    elif segments is None:
        return whole[:, :-1]
    before = whole.gather(1, index[..., None].expand_as(x))
    if segments is None:
        return before
    document = documents.numbers(segments)
    same = F.pad(document, (1, 0), value=-1).gather(1, index) == document
    return before * same[..., None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R channels of [B, T, H, D] by [B or 1, T, R/2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
