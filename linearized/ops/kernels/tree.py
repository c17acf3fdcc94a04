"""Token trees on top of a state, on a GPU. Knows nodes; writes nothing but outputs.

B batch, H query heads, K key/value heads, R = H/K, N nodes, X width of queries and keys, of which
the last F columns are features and the first D a near pair's own (D = X if F = X), U width of
values, S slots of a state's near tokens, M taps. `Layout` says for each pair whether it is near,
far, or unseen, so that a batch of different trees is one launch.

`many` takes blocks of rows (a query head's node each; those of one key/value head together, so
that its memory is read once) through four sums: memory, slots, nodes, tail. A softmax looks for
each row's largest near score before. `one` is the step of one token: no products of matrices, every
tensor read at once, and that is the time it takes. To one token all slots are near.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from linearized.ops.form import Form
from linearized.ops.kernels.blocks import (
    LOWEST,
    add_dot,
    dot,
    exact,
    greatest,
    load,
    products,
    total,
)
from linearized.ops.kernels.launch import block, check, new, numbers, on, rowwise, strides
from linearized.ops.layout import Layout
from linearized.state import GroupState

AT_ONCE = 16384
"""Elements of the ring's keys that `one` can hold."""


def attend_tree(
    q: Tensor,  # [B, H, N, X]
    k: Tensor,  # [B, K, N, X]
    v: Tensor,  # [B, K, N, U]
    layout: Layout,
    state: GroupState,
    *,
    form: Form,
    alpha: Tensor | None,
    taps: Tensor | None,
) -> Tensor:
    """Outputs [B, H, N, U] of N tree nodes; see `backends.Backend`. Has no gradient.

    Raises:
        ConfigError: a form or device that the kernels do not do.
    """
    check(form, q.shape[3], v)
    num_slots = state.near.slots
    layout = layout.at(num_slots)
    q, k, v = (rowwise(x.detach().to(state.values.dtype)) for x in (q, k, v))
    keys, values, memory = rowwise(state.keys), rowwise(state.values), rowwise(state.memory)
    tail = None if taps is None or taps.shape[1] == 1 else rowwise(state.tail)
    out = new(q, v)
    batch, heads, num_nodes, width = q.shape
    kv_heads, features = k.shape[1], form.features
    own = width - features or width
    if form.inside == "none" and (num_nodes == 1 or not features):
        own = 0
    repeats, key_block = heads // kv_heads, block(own)
    near, held = state.near, block(state.near.ring) * key_block
    single = num_nodes == 1 and max(held, block(features) * 32) <= AT_ONCE
    most = 64 if not single or batch * kv_heads >= 128 else 32
    tile = min(block(v.shape[3]), most, AT_ONCE // block(features) if single else most)
    tiles = -(-v.shape[3] // tile)
    shapes = {
        "kv_heads": kv_heads,
        "repeats": repeats,
        "key_width": own,
        "value_width": v.shape[3],
        "features": features,
        "skipped": width - features,
        "sinks": near.sinks,
        "ring": near.ring,
        "key_block": key_block,
        "tile": tile,
        "taps": 0 if taps is None else taps.shape[1],
        "inside": form.inside,
        "wide": numbers(memory.dtype)["wide"],
        "enable_fp_fusion": True,
    }
    tensors = (
        q, k, v, keys, values, memory, tail,
        layout.near.contiguous(), layout.far.contiguous(), layout.lags.contiguous(),
        alpha if features else None, None if taps is None else taps.contiguous(), out,
        *strides(q), *strides(k), *strides(v), *strides(keys), *strides(values), *strides(memory),
        *strides(state.tail), *strides(out),
    )  # fmt: skip
    with on(v.device):
        if single:
            warps = 8 if held > AT_ONCE // 2 else 4
            one[(batch * kv_heads, tiles)](
                *tensors, ring_block=block(near.ring), sinks_block=block(near.sinks),
                feature_block=block(features), tail_block=block(state.taps - 1), num_warps=warps,
                num_stages=1, **shapes,
            )  # fmt: skip
        else:
            most = 64 if v.dtype.itemsize <= 2 else 32  # that the registers hold
            rows = min(block(repeats * num_nodes), most)
            blocks = -(-repeats * num_nodes // rows)
            many[(batch * kv_heads, tiles, blocks)](
                *tensors, num_nodes, rows=rows, columns=32, num_warps=4, num_stages=2,
                precision=numbers(v.dtype)["precision"], **shapes,
            )  # fmt: skip
    return out


@triton.jit
def weigh(s, near, alpha, largest, inside: tl.constexpr):
    """A near pair's weight, from its score."""
    if inside == "linear":
        return tl.where(near, alpha * s, 0.0)
    else:
        return exact(s, near, largest, inside)


@triton.jit
def scores_of(
    q, k_ptr, m, k_slot, there, columns_d, key_width: tl.constexpr, precision: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """[rows, columns], of a block of keys."""
    k = load(k_ptr, m, k_slot, there, columns_d, key_width)
    return dot(q, tl.trans(k), precision, wide)


@triton.jit
def weights_of(
    scores, near_ptr, far_ptr, pair_at, seen, alpha, largest,
    q_ptr, q_at, rows_there, k_ptr, m, k_slot, there,
    inside: tl.constexpr, features: tl.constexpr, skipped: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of a block of pairs, near and far. Few blocks have a far pair: the scores of features are
    worked out where one has."""
    near = tl.load(near_ptr + pair_at, mask=seen, other=0).to(tl.int1)
    weights = weigh(scores, near, alpha, largest, inside)
    if features > 0:
        far = tl.load(far_ptr + pair_at, mask=seen, other=0).to(tl.int1)
        if skipped == 0:
            weights += tl.where(far, alpha * scores, 0.0)
        elif total(total(far.to(tl.int32), 1), 0) > 0:
            across = products(
                q_ptr + skipped, q_at, rows_there, k_ptr + skipped, m.to(tl.int64) * k_slot, there,
                features, precision, scores.dtype,
            )  # fmt: skip
            weights += tl.where(far, alpha * across, 0.0)
    return weights


@triton.jit
def many(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, memory_ptr, tail_ptr,
    near_ptr, far_ptr, lags_ptr, alpha_ptr, taps_ptr, out_ptr,
    q_batch, q_head, q_node, k_batch, k_head, k_node, v_batch, v_head, v_node,
    keys_batch, keys_head, keys_slot, values_batch, values_head, values_slot,
    memory_batch, memory_head, memory_slot, tail_batch, tail_head, tail_slot,
    out_batch, out_head, out_node, num_nodes,
    kv_heads: tl.constexpr, repeats: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    features: tl.constexpr, skipped: tl.constexpr, sinks: tl.constexpr, ring: tl.constexpr,
    key_block: tl.constexpr, tile: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    taps: tl.constexpr, inside: tl.constexpr,
    wide: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Outputs of a block of rows. Program: (b and key/value head, value tile, block of rows)."""
    slots: tl.constexpr = sinks + ring
    pair = tl.program_id(0)
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row = tl.program_id(2) * rows + tl.arange(0, rows)
    there = row < repeats * num_nodes
    head, node = kv_head * repeats + row // num_nodes, row % num_nodes
    columns_e = tl.program_id(1) * tile + tl.arange(0, tile)
    columns_d = tl.arange(0, key_block)
    index = tl.arange(0, columns)
    kind = v_ptr.dtype.element_ty
    q_ptr += b * q_batch
    q_at = head * q_head + node * q_node.to(tl.int64)
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    keys_ptr += b * keys_batch + kv_head * keys_head
    values_ptr += b * values_batch + kv_head * values_head
    alpha = tl.full([rows], 1.0, wide)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + head, mask=there, other=0.0).to(wide)
    taps_at = taps_ptr
    if taps > 0:
        taps_at = taps_ptr + head * taps

    out = tl.full([rows, tile], 0.0, wide)
    if features > 0:
        memory_at = memory_ptr + b * memory_batch + kv_head * memory_head
        step: tl.constexpr = 16 if features <= 32 else 64
        for first in range(0, features, step):
            f = first + tl.arange(0, step)
            piece = tl.load(q_ptr + skipped + q_at[:, None] + f[None, :],
                            mask=there[:, None] & (f < features), other=0.0)  # fmt: skip
            memory = load(memory_at, f, memory_slot, f < features, columns_e, value_width)
            out = add_dot(out, piece.to(wide), memory, precision)
        out *= alpha[:, None]
    largest = tl.full([rows], LOWEST, wide)
    if key_width > 0:
        q = tl.load(q_ptr + q_at[:, None] + columns_d[None, :],
                    mask=there[:, None] & (columns_d < key_width), other=0.0)  # fmt: skip
        pairs_at = (b * num_nodes + node) * (slots + num_nodes)
        if inside == "softmax":
            for first in range(0, slots, columns):
                m = first + index
                scores = scores_of(
                    q, keys_ptr, m, keys_slot, m < slots, columns_d, key_width, precision, wide
                )
                seen = there[:, None] & (m < slots)[None, :]
                near = tl.load(near_ptr + pairs_at[:, None] + m[None, :], mask=seen, other=0)
                scores = tl.where(near.to(tl.int1), scores, LOWEST)
                largest = tl.maximum(largest, greatest(scores, 1))
            for first in range(0, num_nodes, columns):
                m = first + index
                scores = scores_of(
                    q, k_ptr, m, k_node, m < num_nodes, columns_d, key_width, precision, wide
                )
                seen = there[:, None] & (m < num_nodes)[None, :]
                pair_at = pairs_at[:, None] + (slots + m)[None, :]
                near = tl.load(near_ptr + pair_at, mask=seen, other=0)
                scores = tl.where(near.to(tl.int1), scores, LOWEST)
                largest = tl.maximum(largest, greatest(scores, 1))
        for first in range(0, slots, columns):
            m = first + index
            v = load(values_ptr, m, values_slot, m < slots, columns_e, value_width)
            scores = scores_of(
                q, keys_ptr, m, keys_slot, m < slots, columns_d, key_width, precision, wide
            )
            seen = there[:, None] & (m < slots)[None, :]
            weights = weights_of(
                scores, near_ptr, far_ptr, pairs_at[:, None] + m[None, :], seen,
                alpha[:, None], largest[:, None], q_ptr, q_at, there, keys_ptr, m, keys_slot,
                m < slots, inside, features, skipped, precision,
            )  # fmt: skip
            out = add_dot(out, weights.to(kind), v, precision)
    for first in range(0, num_nodes, columns):
        m = first + index
        v = load(v_ptr, m, v_node, m < num_nodes, columns_e, value_width)
        weights = tl.full([rows, columns], 0.0, wide)
        seen = there[:, None] & (m < num_nodes)[None, :]
        if key_width > 0:
            scores = scores_of(
                q, k_ptr, m, k_node, m < num_nodes, columns_d, key_width, precision, wide
            )
            weights = weights_of(
                scores, near_ptr, far_ptr, pairs_at[:, None] + (slots + m)[None, :], seen,
                alpha[:, None], largest[:, None], q_ptr, q_at, there, k_ptr, m, k_node,
                m < num_nodes, inside, features, skipped, precision,
            )  # fmt: skip
        if taps > 0:
            lags_at = (b * num_nodes + node) * (taps - 1 + num_nodes)
            weights += lagged(lags_ptr, lags_at[:, None] + (taps - 1 + m)[None, :], seen,
                              taps_at[:, None], taps, wide)  # fmt: skip
        out = add_dot(out, weights.to(kind), v, precision)
    if tail_ptr is not None:
        for first in range(0, taps - 1, columns):
            m = first + index
            v = load(tail_ptr + b * tail_batch + kv_head * tail_head, m, tail_slot, m < taps - 1,
                     columns_e, value_width)  # fmt: skip
            seen = there[:, None] & (m < taps - 1)[None, :]
            lags_at = (b * num_nodes + node) * (taps - 1 + num_nodes)
            weights = lagged(
                lags_ptr, lags_at[:, None] + m[None, :], seen, taps_at[:, None], taps, wide
            )
            out = add_dot(out, weights.to(kind), v.to(kind), precision)
    out_at = out_ptr + b * out_batch + head * out_head + node * out_node.to(tl.int64)
    tl.store(out_at[:, None] + columns_e[None, :], out.to(out_ptr.dtype.element_ty),
             mask=there[:, None] & (columns_e < value_width)[None, :])  # fmt: skip


@triton.jit
def lagged(lags_ptr, at, seen, taps_at, taps: tl.constexpr, wide: tl.constexpr):
    """The taps of the lags that are stored at `at`; M is out of reach."""
    lags = tl.load(lags_ptr + at, mask=seen, other=taps)
    return tl.load(taps_at + lags, mask=lags < taps, other=0.0).to(wide)


@triton.jit
def one(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, memory_ptr, tail_ptr,
    near_ptr, far_ptr, lags_ptr, alpha_ptr, taps_ptr, out_ptr,
    q_batch, q_head, q_node, k_batch, k_head, k_node, v_batch, v_head, v_node,
    keys_batch, keys_head, keys_slot, values_batch, values_head, values_slot,
    memory_batch, memory_head, memory_slot, tail_batch, tail_head, tail_slot,
    out_batch, out_head, out_node,
    kv_heads: tl.constexpr, repeats: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    features: tl.constexpr, skipped: tl.constexpr, sinks: tl.constexpr, ring: tl.constexpr,
    key_block: tl.constexpr, tile: tl.constexpr, ring_block: tl.constexpr,
    sinks_block: tl.constexpr, feature_block: tl.constexpr, tail_block: tl.constexpr,
    taps: tl.constexpr, inside: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Outputs of one node a row. Program: (b and key/value head, value tile)."""
    pair = tl.program_id(0)
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    columns_e = tl.program_id(1) * tile + tl.arange(0, tile)
    columns_d, columns_f = tl.arange(0, key_block), tl.arange(0, feature_block)
    in_e, in_d, in_f = columns_e < value_width, columns_d < key_width, columns_f < features
    own_v = tl.load(v_ptr + b * v_batch + kv_head * v_head + columns_e, mask=in_e, other=0.0)
    own_v = own_v.to(wide)
    if key_width > 0:
        own_k = tl.load(k_ptr + b * k_batch + kv_head * k_head + columns_d, mask=in_d, other=0.0)
        keys_ptr += b * keys_batch + kv_head * keys_head
        values_ptr += b * values_batch + kv_head * values_head
        near_ptr += b * (sinks + ring + 1)
        m = tl.arange(0, ring_block)
        k = load(keys_ptr, sinks + m, keys_slot, m < ring, columns_d, key_width).to(wide)
        v = load(values_ptr, sinks + m, values_slot, m < ring, columns_e, value_width).to(wide)
        near = tl.load(near_ptr + sinks + m, mask=m < ring, other=0).to(tl.int1)
        if sinks > 0:  # apart: the ring's slots alone are often a power of two
            n = tl.arange(0, sinks_block)
            sink_k = load(keys_ptr, n, keys_slot, n < sinks, columns_d, key_width).to(wide)
            sink_v = load(values_ptr, n, values_slot, n < sinks, columns_e, value_width).to(wide)
            sink_near = tl.load(near_ptr + n, mask=n < sinks, other=0).to(tl.int1)
    if features > 0:
        memory = load(memory_ptr + b * memory_batch + kv_head * memory_head, columns_f,
                      memory_slot, in_f, columns_e, value_width)  # fmt: skip
    if tail_ptr is not None:
        p = tl.arange(0, tail_block)
        tail = load(tail_ptr + b * tail_batch + kv_head * tail_head, p, tail_slot, p < taps - 1,
                    columns_e, value_width).to(wide)  # fmt: skip
    for r in range(repeats):
        head = kv_head * repeats + r
        out = tl.full([tile], 0.0, wide)
        own = tl.full([], 0.0, wide)
        alpha = tl.full([], 1.0, wide)
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + head).to(wide)
        q_at = q_ptr + b * q_batch + head * q_head
        if features > 0:
            q = tl.load(q_at + skipped + columns_f, mask=in_f, other=0.0)
            out += alpha * total(q.to(wide)[:, None] * memory, 0)
        if key_width > 0:
            q = tl.load(q_at + columns_d, mask=in_d, other=0.0).to(wide)
            scores = total(k * q[None, :], 1)
            score = total(own_k.to(wide) * q, 0)
            largest = tl.maximum(score, greatest(tl.where(near, scores, LOWEST), 0))
            if sinks > 0:
                sink_scores = total(sink_k * q[None, :], 1)
                most = greatest(tl.where(sink_near, sink_scores, LOWEST), 0)
                largest = tl.maximum(largest, most)
                weights = weigh(sink_scores, sink_near, alpha, largest, inside)
                out += total(weights[:, None] * sink_v, 0)
            out += total(weigh(scores, near, alpha, largest, inside)[:, None] * v, 0)
            own = weigh(score, tl.full([], 1, tl.int1), alpha, largest, inside)
        if taps > 0:
            own += tl.load(taps_ptr + head * taps).to(wide)
        if tail_ptr is not None:
            weights = lagged(
                lags_ptr, b * taps + p, p < taps - 1, taps_ptr + head * taps, taps, wide
            )
            out += total(weights[:, None] * tail, 0)
        out += own * own_v
        out_at = out_ptr + b * out_batch + head * out_head + columns_e
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_e)
