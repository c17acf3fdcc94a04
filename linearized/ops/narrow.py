"""Softmax of near tokens beside a memory of far ones, over whole rows, with products in half
precision and sums in float32: what training under autocast does. The numbers are those of the
operator with `inside="softmax"`, within rounding; the walk is laid out for large products.

B batch, H query heads, K key/value heads, R = H/K, T tokens, D width of near queries and keys, F of
features, E of values, G group size, C groups beyond the first ring, J near keys of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearized.near import Near
from linearized.ops.form import Form

BLOCK = 4
"""Groups whose scores are worked out at once: they fit a core's cache."""


def attend_narrow(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    form: Form,
    alpha: Tensor,
    least: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`queries` [B, H, T, D+F] (the first D of them scaled), `keys` [B, K, T, D+F] and `values`
    [B, K, T, 1+E], a column of ones first, float32: the weighted means [B, H, T, E], float32.
    Products of scores stay float32, all others of near pairs are of `dtype`. `alpha` [H] weighs far
    pairs; no denominator is below `least`. Differentiable once."""
    near, ring = form.near, form.near.ring
    width = queries.shape[-1] - form.features
    own = values[..., 1:]
    begin = (queries[..., :width], keys[..., :width], own)
    q, k, v = (x[:, :, :ring].to(dtype) for x in begin)
    first = F.scaled_dot_product_attention(  # all is near
        q, k, v, is_causal=True, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
    ).to(values.dtype)
    num_tokens = queries.shape[2]
    if num_tokens <= ring:
        return first
    missing = -num_tokens % near.group
    if missing:
        queries, keys, values = (F.pad(x, (0, 0, 0, missing)) for x in (queries, keys, values))
        own = values[..., 1:]
    heads, kv_heads = queries.shape[1], keys.shape[1]
    asked = _grouped(queries[:, :, ring:], kv_heads, near.group)  # B K C R·G D+F
    mean, mass = _near(asked[..., :width], keys[..., :width], own, near=near, dtype=dtype)
    memories = _memories(keys[..., width:], values, near, asked.shape[2])
    weights = alpha.repeat_interleave(near.group).view(kv_heads, 1, -1, 1)
    far = (asked[..., width:] * weights) @ memories  # B K C R·G 1+E
    sums = torch.addcmul(far[..., 1:], mass, mean)
    out = sums / (mass + far[..., :1]).clamp(min=least)
    out = out.unflatten(3, (-1, near.group)).transpose(2, 3)  # B K R C G E
    out = out.reshape(len(out), heads, -1, out.shape[-1])[:, :, : num_tokens - ring]
    return torch.cat([first, out], dim=2)


def _grouped(x: Tensor, kv_heads: int, group: int) -> Tensor:
    """[B, H, C·G, X] to [B, K, C, R·G, X]: the queries of a key/value head in one product."""
    batch, heads, num_tokens, width = x.shape
    x = x.reshape(batch, kv_heads, heads // kv_heads, num_tokens // group, group, width)
    return x.transpose(2, 3).reshape(batch, kv_heads, num_tokens // group, -1, width)


def _near(
    queries: Tensor, keys: Tensor, values: Tensor, *, near: Near, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Means of near values [B, K, C, R·G, E], and near pairs' mass [B, K, C, R·G, 1], in units of
    the largest."""
    batch, kv_heads, chunks, rows, _ = queries.shape

    def around(x: Tensor) -> Tensor:  # [B, K, T, X] -> [B·K·C, J, X]
        grouped = x.unflatten(2, (-1, near.group))
        parts = [grouped[:, :, 1 + back : 1 + back + chunks] for back in range(near.window + 1)]
        if near.sinks:
            sinks = x[:, :, None, : near.sinks]
            parts.insert(0, sinks.expand(-1, -1, chunks, -1, -1))
        return torch.cat(parts, dim=3).flatten(0, 2)

    found: Any = _Near.apply(queries.flatten(0, 2), around(keys), around(values), near.group, dtype)
    mean, mass = found
    shape = batch, kv_heads, chunks, rows
    return mean.view(*shape, -1), mass.view(*shape, 1)


class _Near(torch.autograd.Function):
    """Softmax of queries [N, R·G, D] over keys [N, J, D] of which the last G are the queries' own
    group: means of values [N, J, E], and 1 / the largest weight [N, R·G]. The weights are kept for
    the gradient, in half precision."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, group: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        num_blocks, rows, _ = queries.shape
        num_keys = keys.shape[1]
        order = torch.ones(group, num_keys, dtype=torch.bool).tril(num_keys - group)
        mask = torch.zeros(group, num_keys).masked_fill_(~order, -torch.inf)
        mask = mask.to(queries.dtype).repeat(rows // group, 1)
        weights = queries.new_empty(num_blocks, rows, num_keys, dtype=dtype)
        largest = queries.new_empty(num_blocks, rows)
        for first in range(0, num_blocks, BLOCK):
            part = slice(first, first + BLOCK)
            scores = torch.baddbmm(mask, queries[part], keys[part].mT)
            scores = scores.softmax(-1)
            torch.amax(scores, -1, out=largest[part])
            weights[part] = scores
        narrow = values.to(dtype)
        mean = torch.bmm(weights, narrow).to(values.dtype)
        mass = largest.reciprocal()
        ctx.save_for_backward(weights, mass, queries.to(dtype), keys.to(dtype), narrow)
        return mean, mass

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, to_mean: Tensor, to_mass: Tensor) -> tuple[Tensor | None, ...]:
        weights, mass, queries, keys, values = ctx.saved_tensors
        wide = to_mean.dtype
        to_mean = to_mean.to(weights.dtype)
        to_scores = torch.empty_like(weights)
        to_largest = (-to_mass * mass.square()).to(weights.dtype)[..., None]
        for first in range(0, len(weights), BLOCK):
            part = slice(first, first + BLOCK)
            to_weights = torch.bmm(to_mean[part], values[part].mT)
            best = (weights[part] == weights[part].amax(-1, keepdim=True)).to(weights.dtype)
            share = to_largest[part] / best.sum(-1, keepdim=True)  # of equal ones
            to_weights.addcmul_(best, share)
            to_scores[part] = torch._softmax_backward_data(
                to_weights, weights[part], -1, weights.dtype
            )
        to_queries = torch.bmm(to_scores, keys).to(wide)
        to_keys = torch.bmm(to_scores.mT, queries).to(wide)
        to_values = torch.bmm(weights.mT, to_mean).to(wide)
        return to_queries, to_keys, to_values, None, None


def _memories(features: Tensor, values: Tensor, near: Near, chunks: int) -> Tensor:
    """Σ φ(k) vᵀ of what is far from each group beyond the first ring, [B, K, C, F, 1+E]: of the
    groups up to a window before it, sinks left out."""
    far = chunks * near.group
    features = features[:, :, :far]
    if near.sinks:
        kept = torch.arange(far, device=features.device) >= near.sinks
        features = features * kept[:, None]
    features, values = (x.unflatten(2, (chunks, -1)) for x in (features, values[:, :, :far]))
    return (features.transpose(-1, -2) @ values).cumsum(2)
