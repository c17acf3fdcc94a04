"""A walk over a sequence on a GPU, as an operator with gradients. Knows tensors, tiles, launches.

B batch, H query heads, K key/value heads, R = H/K, S slots of the grid (see `ops/grid.py`), D key
width, E value width, G group size, M taps, P segments. A query's near pairs are those of its group.

A row's slots are cut into P segments of `step` chunks; a chunk is some whole groups, and no more
than a block of slots unless one group is more. With few heads, P is what fills the GPU:

    sum_keys   what each segment adds to the memory                  (not if P = 1)
    carry      a running sum of that, in float32: what each is given (not if P = 1)
    outputs    one pass over q, k, v: a program takes a segment, keeps the memory on the chip from
               chunk to chunk, and adds up all three parts of an output: pairs inside the chunk, the
               memory, and the convolution as a Toeplitz matrix of weights

Norms are one number a row, worked out before the walk by a pass of their own (in the walk they cost
a fifth of its registers, and each would be worked out by five kernels and every tile); normalised
queries and keys are never written.

Saved for the gradient are the inputs, the norms and the P memories. It walks forwards once more
for dq (`replay.py`), and backwards for dk and dv (`backward.py`), each a pass like that for outputs
with other roles. A pair's weight is worked out again wherever it is needed: cheaper than to keep.

Sums across programs (of dα, dtaps, and of segments) are over scratch memory, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearized.ops.kernels import forward, gradients
from linearized.ops.kernels.launch import (
    Launch,
    block,
    contiguous,
    given,
    new,
    numbers,
    on,
    rowwise,
    strides,
)


def walk(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, K, S, D]
    v: Tensor,  # [B, K, S, E]
    alpha: Tensor | None,  # [H]
    taps: Tensor | None,  # [H, M]
    memory: Tensor | None,  # [B, K, D, E], before slot 0
    before: Tensor | None,  # [B, K, M-1, E], values before slot 0
    start: Tensor | None,  # [B, C], first group of a group's document
    *,
    group: int,
    inside: str,  # relu2, linear or none
    features: bool,  # are far pairs α q·k? Else there are none
    unit_norm: bool = False,  # divide queries and keys by their norms first
    wide: bool = False,  # leave the sums in float32 at least, not rounded to v's type
) -> Tensor:
    """Outputs, [B, H, S, E]."""
    num_taps = 1 if taps is None else taps.shape[1]
    out, *_ = _scan(
        q,
        k,
        v,
        alpha if features else None,
        taps,
        memory.to(_wide(v)) if features and memory is not None else None,
        before.to(v.dtype) if before is not None and num_taps > 1 else None,
        start,
        group,
        inside,
        features,
        unit_norm,
        wide,
    )
    return out


@torch.library.custom_op("linearized::scan", mutates_args=())
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    memory: Tensor | None,
    before: Tensor | None,
    start: Tensor | None,
    group: int,
    inside: str,
    features: bool,
    unit_norm: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, what queries and keys are multiplied by to have norm 1, [B, H, S] and [B, K, S],
    and the memory that each segment is given, [B, K, P, D, E]; empty where there is none."""
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    launch = Launch.of(q, k, v, group, inside, features)
    before, start, taps = contiguous(before), contiguous(start), contiguous(taps)
    with on(v.device):
        q_norm, k_norm = _norms(launch, q, unit_norm), _norms(launch, k, unit_norm)
        memories = _memories(launch, k, v, given(k_norm), memory, start)
        out = new(q, v, _wide(v) if wide else None)
        tiling = launch.tiling(launch.key_block, launch.value_block, 2 * launch.key_block)
        forward.outputs[launch.grid(q, launch.value_width, tiling)](
            q, k, v, given(q_norm), given(k_norm), alpha, taps, given(memories), before, start, out,
            *strides(q), *strides(k), *strides(v), *strides(out), *launch.walk,
            heads=q.shape[1], kv_heads=k.shape[1], key_block=launch.key_block,
            **launch.blocking, **launch.weights, **launch.convolution(taps), **tiling,
            **numbers(v.dtype),
        )  # fmt: skip
    return out, q_norm, k_norm, memories


@_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    memory: Tensor | None,
    before: Tensor | None,
    start: Tensor | None,
    group: int,
    inside: str,
    features: bool,
    unit_norm: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = Launch.of(q, k, v, group, inside, features)
    q_norm, k_norm = _new_norms(launch, q, unit_norm), _new_norms(launch, k, unit_norm)
    out = new(q, v, _wide(v) if wide else None)
    return out, q_norm, k_norm, _new_memories(launch, k, v, memory)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _norms(launch: Launch, x: Tensor, unit_norm: bool) -> Tensor:
    norms = _new_norms(launch, x, unit_norm)
    if norms.numel():
        batch, heads, num_slots, width = x.shape
        forward.invert_norms[(batch * heads, -(-num_slots // 32))](
            x, norms, *strides(x), num_slots,
            heads=heads, width=width, width_block=block(width), rows=32,
            **numbers(x.dtype), num_warps=4,
        )  # fmt: skip
    return norms


def _new_norms(launch: Launch, x: Tensor, unit_norm: bool) -> Tensor:
    shape = x.shape[:3] if unit_norm and launch.key_width else (0,)
    return x.new_empty(shape, dtype=_wide(x))


def _memories(
    launch: Launch,
    k: Tensor,
    v: Tensor,
    k_norm: Tensor | None,
    memory: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    memories = _new_memories(launch, k, v, memory)
    if launch.num_segments > 1 and memories.numel():
        tiling = launch.tiling(launch.key_block, launch.value_block, launch.key_block)
        pairs, _, tiles = launch.grid(k, launch.value_width, tiling)
        forward.sum_keys[(pairs, launch.num_segments - 1, tiles)](
            k, v, k_norm, start, memories, *strides(k), *strides(v), *launch.walk,
            kv_heads=k.shape[1], key_block=launch.key_block,
            **launch.blocking, **tiling, **numbers(v.dtype),
        )  # fmt: skip
    if memories.numel():
        gradients.carry(launch, memories, contiguous(memory), None, start, reverse=False)
    return memories


def _new_memories(launch: Launch, k: Tensor, v: Tensor, memory: Tensor | None) -> Tensor:
    if not launch.features or (launch.num_segments == 1 and memory is None):
        return v.new_empty(0, dtype=_wide(v))
    shape = (k.shape[0], k.shape[1], launch.num_segments, k.shape[3], v.shape[3])
    return v.new_empty(shape, dtype=_wide(v))


@torch.library.custom_op("linearized::scan_backward", mutates_args=())
def _scan_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    q_norm: Tensor,
    k_norm: Tensor,
    memories: Tensor,
    before: Tensor | None,
    start: Tensor | None,
    group: int,
    inside: str,
    features: bool,
    wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, alpha, taps, memory and before; empty for what is not there."""
    launch = Launch.of(q, k, v, group, inside, features)
    inputs = gradients.Inputs(
        g=rowwise(g),
        q=rowwise(q),
        k=rowwise(k),
        v=rowwise(v),
        q_norm=given(q_norm),
        k_norm=given(k_norm),
        alpha=alpha,
        taps=contiguous(taps),
        before=contiguous(before),
        start=contiguous(start),
    )
    with on(v.device):
        later, dmemory = gradients.memories(launch, inputs, wants_memory)
        dq, dalpha = gradients.queries(launch, inputs, given(memories))
        dk = gradients.keys(launch, inputs, later)
        dv = gradients.values(launch, inputs, later)
        dtaps = gradients.taps(launch, inputs)
    return dq, dk, dv, dalpha, dtaps, dmemory, gradients.before(launch, inputs)


@_scan_backward.register_fake
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    q_norm: Tensor,
    k_norm: Tensor,
    memories: Tensor,
    before: Tensor | None,
    start: Tensor | None,
    group: int,
    inside: str,
    features: bool,
    wants_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory = (*k.shape[:2], q.shape[3], v.shape[3]) if wants_memory and features else (0,)
    return (
        new(q, q),
        new(k, k),
        new(v, v),
        v.new_empty(0) if alpha is None else alpha.new_empty(alpha.shape),
        v.new_empty(0) if taps is None else taps.new_empty(taps.shape),
        v.new_empty(memory, dtype=_wide(v)),
        v.new_empty(0) if before is None else before.new_empty(before.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, alpha, taps, _, before, start, *ctx.constants, _, _ = inputs
    ctx.save_for_backward(q, k, v, alpha, taps, *output[1:], before, start)


def _differentiate(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    alpha, taps, memory, before = ctx.needs_input_grad[3:7]
    g = g.to(ctx.saved_tensors[2].dtype)
    found = _scan_backward(g, *ctx.saved_tensors, *ctx.constants, memory)
    wanted = (True, True, True, alpha, taps, memory, before)
    grads = [x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True)]
    return (*grads, None, None, None, None, None, None)


_scan.register_autograd(_differentiate, setup_context=_keep)
