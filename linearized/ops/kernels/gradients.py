"""Gradients of `walk.py`, launch by launch. Knows shapes and scratch memory; the mathematics is
in `replay.py` and `backward.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.ops.kernels import backward, forward, replay
from linearized.ops.kernels.launch import Launch, block, new, numbers, strides


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The inputs of a call, and the gradient g of its outputs; see `walk.walk`."""

    g: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    alpha: Tensor | None
    taps: Tensor | None
    before: Tensor | None
    start: Tensor | None

    @property
    def heads(self) -> dict[str, int]:
        return {"heads": self.q.shape[1], "kv_heads": self.k.shape[1]}

    @property
    def shared(self) -> dict[str, int]:
        return {"kv_heads": self.k.shape[1], "repeats": self.q.shape[1] // self.k.shape[1]}

    @property
    def constants(self) -> dict[str, Any]:
        return numbers(self.v.dtype)


def carry(
    launch: Launch,
    sums: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    start: Tensor | None,
    *,
    reverse: bool,
) -> None:
    """Running sums over segments [B, K, P, D, E], in place."""
    size, tile = sums.shape[3] * sums.shape[4], 1024
    _, num_groups, _, step, num_segments = launch.walk
    forward.carry[(sums.shape[0] * sums.shape[1], -(-size // tile))](
        sums, first, last, start, num_groups, step, num_segments, size,
        kv_heads=sums.shape[1], per_chunk=launch.chunk // launch.group, reverse=reverse, tile=tile,
        **numbers(sums.dtype),
    )  # fmt: skip


def memories(launch: Launch, x: Inputs, wants_memory: bool) -> tuple[Tensor | None, Tensor]:
    """dS that each segment is given from those after it, and the gradient of the first memory."""
    q, k, v = x.q, x.k, x.v
    wide = torch.promote_types(v.dtype, torch.float32)
    if not launch.features or (launch.num_segments == 1 and not wants_memory):
        return None, v.new_empty(0, dtype=wide)
    shape = (*k.shape[:2], launch.num_segments, k.shape[3], v.shape[3])
    sums = v.new_empty(shape, dtype=wide)
    tiling = launch.tiling(launch.key_block, launch.value_block, launch.key_block)
    backward.sum_queries[launch.grid(k, launch.value_width, tiling)](
        q, x.g, x.q_norm, x.alpha, x.start, sums, *strides(q), *strides(x.g), *launch.walk,
        key_block=launch.key_block, **x.shared, **launch.blocking, **tiling, **x.constants,
    )  # fmt: skip
    first = v.new_empty((*k.shape[:2], *shape[3:]) if wants_memory else (0,), dtype=wide)
    carry(launch, sums, None, first if wants_memory else None, x.start, reverse=True)
    return sums, first


def queries(launch: Launch, x: Inputs, memories: Tensor | None) -> tuple[Tensor, Tensor]:
    """dq and dα."""
    g, q, k, v, alpha = x.g, x.q, x.k, x.v, x.alpha
    if not launch.key_width:
        return new(q, q).zero_(), v.new_zeros(0 if alpha is None else len(alpha))
    tiling = launch.tiling(
        launch.value_block, launch.key_block, 2 * (launch.key_block + launch.value_block)
    )
    grid = launch.grid(q, launch.key_width, tiling)
    wide = torch.promote_types(v.dtype, torch.float32)
    dq = new(q, q)
    dalpha = None if alpha is None else v.new_empty(q.shape[0], q.shape[1], *grid[1:], dtype=wide)
    replay.query_gradients[grid](
        q, k, v, g, x.q_norm, x.k_norm, alpha, memories, x.start, dq, dalpha,
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(dq), *launch.walk,
        key_block=launch.key_block, value_block=launch.value_block,
        **x.heads, **launch.blocking, **launch.weights, **tiling, **x.constants,
    )  # fmt: skip
    total = v.new_empty(0)
    if alpha is not None and dalpha is not None:
        total = dalpha.sum((0, 2, 3)).to(alpha.dtype)
    if tiling["tile"] < launch.key_block:
        _project(dq, q, x.q_norm)
    return dq, total


def keys(launch: Launch, x: Inputs, later: Tensor | None) -> Tensor:
    """dk."""
    g, q, k, v = x.g, x.q, x.k, x.v
    if not launch.key_width:
        return new(k, k).zero_()
    tiling = launch.tiling(
        launch.value_block, launch.key_block, 2 * (launch.key_block + launch.value_block)
    )
    dk = new(k, k)
    backward.key_gradients[launch.grid(k, launch.key_width, tiling)](
        q, k, v, g, x.q_norm, x.k_norm, x.alpha, later, x.start, dk,
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(dk), *launch.walk,
        key_block=launch.key_block, value_block=launch.value_block,
        **x.shared, **launch.blocking, **launch.weights, **tiling, **x.constants,
    )  # fmt: skip
    if tiling["tile"] < launch.key_block:
        _project(dk, k, x.k_norm)
    return dk


def values(launch: Launch, x: Inputs, later: Tensor | None) -> Tensor:
    """dv."""
    g, q, k = x.g, x.q, x.k
    tiling = launch.tiling(launch.key_block, launch.value_block, 2 * launch.key_block)
    dv = new(x.v, x.v)
    backward.value_gradients[launch.grid(k, launch.value_width, tiling)](
        q, k, g, x.q_norm, x.k_norm, x.alpha, x.taps, later, x.start, dv,
        *strides(q), *strides(k), *strides(g), *strides(dv), *launch.walk,
        key_block=launch.key_block, **x.shared, **launch.blocking, **launch.weights,
        **launch.convolution(x.taps), **tiling, **x.constants,
    )  # fmt: skip
    return dv


def taps(launch: Launch, x: Inputs) -> Tensor:
    """dtaps: the diagonals of Σ g_t·v_j, by the places of t and j in a block."""
    g, v, taps = x.g, x.v, x.taps
    if taps is None:
        return v.new_empty(0)
    batch, heads, num_slots, _ = g.shape
    rows, convolution = launch.rows, launch.convolution(taps)
    num_blocks = -(-num_slots // rows)
    step = -(-num_blocks // launch.num_segments)
    num_segments = -(-num_blocks // step)
    window = convolution["window"]
    wide = torch.promote_types(v.dtype, torch.float32)
    near = v.new_empty(batch, heads, num_segments, rows, rows, dtype=wide)
    past = v.new_empty(batch, heads, num_segments, rows, window, dtype=wide)
    replay.sum_lags[(batch * heads, num_segments)](
        v, g, x.before, x.start, near, past, *strides(v), *strides(g),
        num_slots, launch.walk[1], num_blocks, step, num_segments,
        value_width=launch.value_width, value_block=launch.value_block,
        group=launch.group, rows=rows,
        **x.heads, **convolution, **numbers(v.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    sums = torch.cat([past.sum((0, 2)), near.sum((0, 2))], dim=2)  # H rows window+rows
    lags = torch.arange(taps.shape[1], device=taps.device)
    places = torch.arange(rows, device=taps.device)[:, None] + window - lags
    return sums.gather(2, places.expand(heads, -1, -1)).sum(1).to(taps.dtype)


def before(launch: Launch, x: Inputs) -> Tensor:
    """The gradient of the values before slot 0: at most M-1 by M-1 pairs."""
    g, v, values = x.g, x.v, x.before
    if values is None or x.taps is None:
        return v.new_empty(0)
    num_tail = values.shape[2]
    reach = min(num_tail, g.shape[2])
    slots = torch.arange(reach, device=v.device)
    lags = slots[:, None] + num_tail - torch.arange(num_tail, device=v.device)  # reach M-1
    wide = torch.promote_types(v.dtype, torch.float32)
    weights = F.pad(x.taps, (0, 1)).to(wide)[:, lags.clamp(max=num_tail + 1)]
    near = g[:, :, :reach].to(wide)
    if x.start is not None:
        near = near * (x.start[:, slots // launch.group] <= 0)[:, None, :, None]
    found = weights.transpose(1, 2) @ near  # B H M-1 E
    return found.unflatten(1, (v.shape[1], -1)).sum(2).to(values.dtype)


def _project(grad: Tensor, x: Tensor, norm: Tensor | None) -> None:
    if norm is None:
        return
    batch, heads, num_slots, width = x.shape
    replay.project_rows[(batch * heads, -(-num_slots // 32))](
        grad, x, norm, *strides(grad), *strides(x), num_slots,
        heads=heads, width=width, width_block=block(width), rows=32,
        **numbers(x.dtype), num_warps=4,
    )  # fmt: skip
