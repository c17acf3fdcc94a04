"""Softmax attention for the layers of a hybrid that keep it. Knows masks, windows, soft caps and a
growing history; the product itself is torch's.

B batch, H query heads, K key/value heads, T tokens or tree nodes, C room of the history.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized import documents
from linearized.ops import Layout

FEW = 64
"""Up to so many new tokens a history is read where it lies; beyond, joining it with them costs
less than what torch's product of all saves."""


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    layout: Layout | None = None,
    history: tuple[Tensor, Tensor] | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """q [B, H, T, D], k [B, K, T, D], v [B, K, T, E] to [B, H, T, E]. `history` holds keys and
    values [B, K, C, ·] of the tokens before, `length` [B] of them; `mask`, `segments`, `layout` are
    those of the linear layers. `window` is the number of tokens seen back, the own one included;
    `softcap` c turns a score s into c·tanh(s/c); `dropout` is the share of weights left out."""
    plain = mask is None and segments is None and layout is None and history is None
    if plain and window is None and softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    seen, own, other = _seen(k, causal, mask, segments, layout)
    if history is not None and length is not None:
        own = own + length[:, None]
        other = torch.cat([_columns(history[0]).expand(len(k), -1), other + length[:, None]], 1)
        before = _columns(history[0])[:, None] < length[:, None, None]
        seen = torch.cat([before.expand(-1, k.shape[2], -1), seen.expand(len(k), -1, -1)], 2)
    if window is not None:
        seen = seen & ((own[:, :, None] - other[:, None, :]).abs() < window)
    seen = seen | ~seen.any(-1, keepdim=True)  # a row without a token would be a division by zero
    scaling = q.shape[3] ** -0.5 if scaling is None else scaling
    if softcap is None and (history is None or k.shape[2] > FEW):
        if history is not None:
            k, v = torch.cat([history[0], k], 2), torch.cat([history[1], v], 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], dropout_p=dropout, scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    else:
        parts = [(k, v)] if history is None else [history, (k, v)]
        out = _attend_parts(q, parts, seen, scaling, softcap, dropout)
    return out if mask is None else out * mask.bool()[:, None, :, None]


def _attend_parts(
    q: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    seen: Tensor,  # [B, T, J], J tokens in all parts
    scaling: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention to keys and values that lie apart, [B, K, J', ·] each, one softmax over all: what
    is long is read where it lies."""
    batch, heads, num_tokens, width = q.shape
    kv_heads = parts[0][0].shape[1]
    rows = (q * scaling).reshape(batch, kv_heads, -1, width)  # B K R·T D
    scores = torch.cat([rows @ keys.transpose(-1, -2) for keys, _ in parts], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(batch, heads, num_tokens, -1).masked_fill(~seen[:, None], -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(q.dtype).view(*rows.shape[:3], -1)
    weights = F.dropout(weights, dropout) if dropout else weights
    sizes = [keys.shape[2] for keys, _ in parts]
    out = sum(
        part @ values for part, (_, values) in zip(weights.split(sizes, dim=-1), parts, strict=True)
    )
    assert isinstance(out, Tensor)
    return out.view(batch, heads, num_tokens, -1)


def _seen(
    k: Tensor, causal: bool, mask: Tensor | None, segments: Tensor | None, layout: Layout | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which new tokens each sees [B or 1, T, T], and positions from the first new one [B or 1, T],
    of queries and of keys."""
    if layout is not None:
        depths = layout.visible.sum(-1) - 1
        return layout.visible, depths, depths
    columns = _columns(k)
    seen = documents.visible(columns[0], causal=causal, mask=mask, segments=segments)
    apart = mask is not None or segments is not None
    positions = documents.positions(segments, mask) if apart else columns
    return seen, positions, positions


def _columns(k: Tensor) -> Tensor:
    """[1, T]."""
    return torch.arange(k.shape[2], device=k.device)[None]
