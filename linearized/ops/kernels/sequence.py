"""Linear attention of sequences on a GPU, with gradients. Knows tensors, tiles and launches.

B batch, H query heads, K key/value heads, R = H/K, S slots of the grid (see `ops/grid.py`), D key
width, E value width, G group size, M taps, P segments.

The walk. A row's slots are cut into P segments of `step` chunks; a chunk is some whole groups, and
no more than a block of slots unless one group is more. With few heads, P is what fills the GPU:

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
from torch.nn import functional as F

from linearized.errors import ConfigError
from linearized.ops.form import Form
from linearized.ops.grid import over_grid
from linearized.ops.kernels import forward, gradients
from linearized.ops.kernels.launch import (
    Launch,
    block,
    check,
    contiguous,
    given,
    new,
    numbers,
    on,
    rowwise,
    strides,
)
from linearized.ops.kernels.near import attend_near
from linearized.ops.reference import unit
from linearized.state import GroupState

CHUNK = 64
"""Slots of a group where groups make no difference."""


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: GroupState | None = None,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
    unit_norm: bool = False,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Outputs [B, H, T, U] of T tokens that follow the state's in time; see `backends.Backend`.

    Raises:
        ConfigError: a form, width or device that the kernels do not do.
    """
    return over_grid(
        scan,
        CHUNK,
        q,
        k,
        v,
        state,
        form=form,
        alpha=alpha,
        taps=taps,
        unit_norm=unit_norm,
        mask=mask,
        segments=segments,
    )


def scan(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, K, S, D]
    v: Tensor,  # [B, K, S, E]
    *,
    form: Form,
    unit_norm: bool,  # divide queries and keys by their norms first
    alpha: Tensor | None,  # [H]
    taps: Tensor | None,  # [H, M]
    memory: Tensor | None,  # [B, K, D, E], before slot 0
    before: Tensor | None,  # [B, K, M-1, E], values before slot 0
    start: Tensor | None,  # [B, C], first group of a group's document
    valid: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,  # [B, K, C or 1, sinks, ·], keys and values
) -> Tensor:
    """Outputs [B, H, S, E] of the tokens on a grid; see `ops/cpu/scan.py`.

    Raises:
        ConfigError: a form, width or device that the kernels do not do.
    """
    check(form, q.shape[3], v)
    if not form.causal:
        raise ConfigError("the Triton kernels are causal; for both directions use backend='cpu'")
    group = form.group if form.grouped else CHUNK
    num_groups = -(-q.shape[2] // group)
    if start is not None and start.shape != (q.shape[0], num_groups):
        raise ConfigError(
            f"start must be [batch, groups] = {[q.shape[0], num_groups]} with groups of {group} "
            f"slots, got {list(start.shape)}"
        )
    q, k = q.to(v.dtype), k.to(v.dtype)
    if form.window or form.sinks or form.inside == "softmax" or 0 < form.features < q.shape[3]:
        return _in_parts(
            q,
            k,
            v,
            form=form,
            unit_norm=unit_norm,
            alpha=alpha,
            taps=taps,
            memory=memory,
            before=before,
            start=start,
            sinks=sinks,
        )
    inside, has_memory = form.inside, form.features > 0
    return _walk(
        q, k, v, alpha, taps, memory, before, start, group, inside, has_memory, unit_norm, False
    )


def _in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    form: Form,
    unit_norm: bool,
    alpha: Tensor | None,
    taps: Tensor | None,
    memory: Tensor | None,
    before: Tensor | None,
    start: Tensor | None,
    sinks: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Near pairs, far pairs and convolution, each by kernels of its own, added up and rounded once.
    Far pairs are a walk without near pairs: over keys that come a window late, without sinks."""
    if unit_norm:
        q, k = unit(q), unit(k)
    skipped = q.shape[3] - form.features
    own = skipped or q.shape[3]
    if sinks is not None:
        sink_keys, sink_values = (x.to(v.dtype) for x in sinks)
        sink_keys = unit(sink_keys) if unit_norm else sink_keys
        sinks = sink_keys[..., :own], sink_values
    out = attend_near(
        q[..., :own],
        k[..., :own],
        v,
        near=form.near,
        inside=form.inside,
        start=start,
        sinks=sinks,
    )
    group = form.group
    if form.features:
        late = None if start is None else torch.where(start > 0, start + form.window, start)
        keys, values = _late(k[..., skipped:], form, start, True), _late(v, form, start, False)
        far = (keys, values, alpha, None, memory, None, late)
        out = out + _walk(q[..., skipped:], *far, group, "none", True, False, True)
    if taps is not None:
        nothing = (q[..., :0], k[..., :0], v, None, taps, None, before, start)
        out = out + _walk(*nothing, group, "none", False, False, True)
    return out.to(v.dtype)


def _late(x: Tensor, form: Form, start: Tensor | None, is_key: bool) -> Tensor:
    """[B, K, S, ·], a window late; keys without those of sinks."""
    num_slots = x.shape[2]
    if form.sinks and is_key:
        slots = torch.arange(num_slots, device=x.device)
        groups = slots // form.group
        first = start[:, groups] if start is not None else torch.zeros_like(groups)[None]
        is_sink = (groups == first) & (slots % form.group < form.sinks)  # B S
        x = x.masked_fill(is_sink[:, None, :, None], 0)
    late = min(form.window * form.group, num_slots)
    return F.pad(x[:, :, : num_slots - late], (0, 0, late, 0)) if late else x


def _walk(
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
) -> Tensor:
    """Outputs, as wide as sums are, or rounded."""
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
