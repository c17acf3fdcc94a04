"""Softmax attention for the layers of a hybrid that keep it. Knows masks, windows, soft caps and a
growing history; the product itself is torch's.

B batch, H query heads, K key/value heads, T tokens or tree nodes, C room of the history.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.ops import Nodes


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    nodes: Nodes | None = None,
    history: tuple[Tensor, Tensor] | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """q [B, H, T, D], k [B, K, T, D], v [B, K, T, E] to [B, H, T, E]. `history` holds keys and
    values [B, K, C, ·] of the tokens before, `length` [B] of them; `mask`, `segments`, `nodes` are
    those of the linear layers. `window` is the number of tokens seen back, the own one included;
    `softcap` c turns a score s into c·tanh(s/c)."""
    plain = mask is None and segments is None and nodes is None and history is None
    if plain and window is None and softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    seen, own, other = _seen(k, causal, mask, segments, nodes)
    if history is not None and length is not None:
        own = own + length[:, None]
        other = torch.cat([_columns(history[0]).expand(len(k), -1), other + length[:, None]], 1)
        before = _columns(history[0])[:, None] < length[:, None, None]
        seen = torch.cat([before.expand(-1, k.shape[2], -1), seen.expand(len(k), -1, -1)], 2)
        k, v = torch.cat([history[0], k], 2), torch.cat([history[1], v], 2)
    if window is not None:
        seen = seen & ((own[:, :, None] - other[:, None, :]).abs() < window)
    seen = seen | ~seen.any(-1, keepdim=True)  # a row without a token would be a division by zero
    repeats = q.shape[1] // k.shape[1]
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], scale=scaling, enable_gqa=repeats > 1
        )
    else:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (q.shape[3] ** -0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap)
        out = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v
    return out if mask is None else out * mask.bool()[:, None, :, None]


def _seen(
    k: Tensor, causal: bool, mask: Tensor | None, segments: Tensor | None, nodes: Nodes | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which new tokens each sees [B or 1, T, T], and positions from the first new one [B or 1, T],
    of queries and of keys."""
    columns = _columns(k)
    if nodes is not None:
        visible = (nodes.same | nodes.earlier)[:, :, -k.shape[2] :]
        depths = visible.sum(-1) - 1
        return visible, depths, depths
    seen = columns[:, None, :] <= columns[:, :, None]
    seen = seen if causal else torch.ones_like(seen)
    positions = columns
    if mask is not None:
        seen = seen & mask.bool()[:, None, :]
        positions = mask.long().cumsum(1) - 1
    if segments is not None:
        documents = F.pad((segments[:, 1:] != segments[:, :-1]).long().cumsum(1), (1, 0))
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return seen, positions, positions


def _columns(k: Tensor) -> Tensor:
    """[1, T]."""
    return torch.arange(k.shape[2], device=k.device)[None]
