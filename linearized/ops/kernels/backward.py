"""The walk backwards: gradients of keys and values. Knows one segment at a time, and the gradient
of the outputs, g.

With w(s) + tap the weight that query t gives to key j, for their score s, and p = g_t·v_j:

    dk̂_j = Σ_t w'(s) p q̂_t + dS v_j
    dv_j = Σ_t (w(s) + tap) g_t + dSᵀ k̂_j

each summed over the query heads of the key/value head. dS = Σ α q̂ gᵀ of later queries is the
memory of this walk. Shapes and names as in `forward.py`; tiles are over D for dk, over E for dv.
Nothing is added to memory that another program adds to: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearized.ops.kernels.blocks import (
    add_dot,
    as_row,
    at_head,
    begins,
    dot,
    load,
    load_alpha,
    load_norm,
    project,
    reached,
    scaled,
    score,
    slope,
    store,
    toeplitz,
    weigh,
)
from linearized.ops.kernels.forward import bounds, kept, reading


@triton.jit
def sum_queries(
    q_ptr, g_ptr, q_norm_ptr, alpha_ptr, start_ptr, out_ptr,
    q_batch, q_head, q_slot, g_batch, g_head, g_slot,
    num_slots, num_groups, num_chunks, step, num_segments,
    kv_heads: tl.constexpr, repeats: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, chunk: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr,
    key_block: tl.constexpr, tile: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """What each segment adds to dS, [B, K, P, D, E]. Program: (b and key/value head, segment,
    value tile)."""
    pair, segment = tl.program_id(0), tl.program_id(1)
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    columns_d = tl.arange(0, key_block)
    columns_e = tl.program_id(2) * tile + tl.arange(0, tile)
    if start_ptr is not None:
        start_ptr += b * num_groups
    index = tl.arange(0, rows)
    memory = tl.full([key_block, tile], 0.0, wide)
    stop = tl.minimum((segment + 1) * step, num_chunks)
    for back in range(0, stop - segment * step):
        c = stop - 1 - back
        limit, last = bounds(start_ptr, c, num_groups, chunk // group)
        memory = kept(memory, limit, last)
        for i in range(blocks * repeats):
            head = kv_head * repeats + i % repeats
            local = (i // repeats) * rows + index
            t = c * chunk + local
            there = (local < chunk) & (t < num_slots)
            begin = begins(start_ptr, t, there, group)
            alpha = load_alpha(alpha_ptr, head, wide)
            q_norm_at = at_head(q_norm_ptr, b * kv_heads * repeats + head, num_slots)
            q = load(q_ptr + b * q_batch + head * q_head, t, q_slot, there, columns_d, key_width)
            g = load(g_ptr + b * g_batch + head * g_head, t, g_slot, there, columns_e, value_width)
            scale = reading(load_norm(q_norm_at, t, there, wide), alpha, begin, limit)
            memory = add_dot(memory, tl.trans(q), scaled(g, scale), precision)
    place = pair.to(tl.int64) * num_segments + segment
    out_ptr += place * key_width * value_width
    store(out_ptr, memory, columns_d, value_width, columns_d < key_width, columns_e, value_width)


@triton.jit
def key_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, q_norm_ptr, k_norm_ptr, alpha_ptr, memory_ptr, start_ptr, dk_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    g_batch, g_head, g_slot, dk_batch, dk_head, dk_slot,
    num_slots, num_groups, num_chunks, step, num_segments,
    kv_heads: tl.constexpr, repeats: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, chunk: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr,
    key_block: tl.constexpr, value_block: tl.constexpr, tile: tl.constexpr,
    inside: tl.constexpr, features: tl.constexpr, across: tl.constexpr, paired: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dk of a segment. Program: (b and key/value head, segment, key tile). With one key tile dk is
    that of k, with several that of k̂."""
    whole: tl.constexpr = tile == key_block
    pair, segment = tl.program_id(0), tl.program_id(1)
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    dk_ptr += b * dk_batch + kv_head * dk_head
    k_norm_ptr = at_head(k_norm_ptr, pair.to(tl.int64), num_slots)
    columns_d = tl.arange(0, key_block)
    columns_e = tl.arange(0, value_block)
    columns_t = tl.program_id(2) * tile + tl.arange(0, tile)
    index = tl.arange(0, rows)
    if start_ptr is not None:
        start_ptr += b * num_groups
    memory = tl.full([value_block, tile], 0.0, wide)  # dS, transposed
    if memory_ptr is not None:
        place = pair.to(tl.int64) * num_segments + segment
        at = memory_ptr + place * key_width * value_width
        at += columns_t[None, :] * value_width + columns_e[:, None]
        there_m = (columns_t < key_width)[None, :] & (columns_e < value_width)[:, None]
        memory = tl.load(at, mask=there_m, other=0.0)

    stop = tl.minimum((segment + 1) * step, num_chunks)
    for back in range(0, stop - segment * step):
        c = stop - 1 - back
        limit, last = bounds(start_ptr, c, num_groups, chunk // group)
        for n in range(blocks):
            local = n * rows + index
            j = c * chunk + local
            there = (local < chunk) & (j < num_slots)
            k = load(k_ptr, j, k_slot, there, columns_d, key_width)
            v = load(v_ptr, j, v_slot, there, columns_e, value_width)
            norm = load_norm(k_norm_ptr, j, there, wide)
            dk = tl.full([rows, tile], 0.0, wide)
            if features:
                dk = dot(v, memory.to(v.dtype), precision, wide)
                if start_ptr is not None:
                    dk = tl.where((j // group >= last)[:, None], dk, 0.0)
                if blocks == 1:
                    memory = kept(memory, limit, last)
            for i in range((blocks - n) * repeats):
                head = kv_head * repeats + i % repeats
                local_t = (n + i // repeats) * rows + index
                t = c * chunk + local_t
                there_t = (local_t < chunk) & (t < num_slots)
                begin = begins(start_ptr, t, there_t, group)
                alpha = load_alpha(alpha_ptr, head, wide)
                q_at = q_ptr + b * q_batch + head * q_head
                q = load(q_at, t, q_slot, there_t, columns_d, key_width)
                g = load(g_ptr + b * g_batch + head * g_head, t, g_slot, there_t, columns_e,
                         value_width)  # fmt: skip
                q_norm_at = at_head(q_norm_ptr, b * kv_heads * repeats + head, num_slots)
                norm_t = load_norm(q_norm_at, t, there_t, wide)
                q_tile = q if whole else load(q_at, t, q_slot, there_t, columns_t, key_width)
                if paired:
                    scores = score(k, norm, q, norm_t, precision, wide)
                    slopes = slope(scores, t[None, :], j[:, None], as_row(begin), alpha,
                                   group, inside, across)  # fmt: skip
                    slopes *= dot(v, tl.trans(g), precision, wide) * norm_t[None, :]
                    dk = add_dot(dk, slopes.to(q.dtype), q_tile, precision)
                if features and blocks == 1:
                    scale = reading(norm_t, alpha, begin, limit)
                    memory = add_dot(memory, tl.trans(g), scaled(q_tile, scale), precision)
            if whole and k_norm_ptr is not None:
                dk = project(dk, k, norm)
            store(dk_ptr, dk, j, dk_slot, there, columns_t, key_width)
        if features and blocks > 1:
            memory = kept(memory, limit, last)
            for i in range(blocks * repeats):
                head = kv_head * repeats + i % repeats
                local = (i // repeats) * rows + index
                t = c * chunk + local
                there = (local < chunk) & (t < num_slots)
                begin = begins(start_ptr, t, there, group)
                alpha = load_alpha(alpha_ptr, head, wide)
                q_at = q_ptr + b * q_batch + head * q_head
                q = load(q_at, t, q_slot, there, columns_d, key_width)
                g = load(g_ptr + b * g_batch + head * g_head, t, g_slot, there, columns_e,
                         value_width)  # fmt: skip
                q_norm_at = at_head(q_norm_ptr, b * kv_heads * repeats + head, num_slots)
                norm_t = load_norm(q_norm_at, t, there, wide)
                scale = reading(norm_t, alpha, begin, limit)
                q_tile = q if whole else load(q_at, t, q_slot, there, columns_t, key_width)
                memory = add_dot(memory, tl.trans(g), scaled(q_tile, scale), precision)


@triton.jit
def value_gradients(
    q_ptr, k_ptr, g_ptr, q_norm_ptr, k_norm_ptr, alpha_ptr, taps_ptr, memory_ptr, start_ptr,
    dv_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_slot,
    g_batch, g_head, g_slot, dv_batch, dv_head, dv_slot,
    num_slots, num_groups, num_chunks, step, num_segments,
    kv_heads: tl.constexpr, repeats: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, chunk: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr,
    key_block: tl.constexpr, tile: tl.constexpr, taps: tl.constexpr, window: tl.constexpr,
    inside: tl.constexpr, features: tl.constexpr, across: tl.constexpr, paired: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dv of a segment. Program: (b and key/value head, segment, value tile)."""
    pair, segment = tl.program_id(0), tl.program_id(1)
    b, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    k_ptr += b * k_batch + kv_head * k_head
    dv_ptr += b * dv_batch + kv_head * dv_head
    k_norm_ptr = at_head(k_norm_ptr, pair.to(tl.int64), num_slots)
    columns_d = tl.arange(0, key_block)
    columns_e = tl.program_id(2) * tile + tl.arange(0, tile)
    index = tl.arange(0, rows)
    next_index = tl.arange(0, window)
    if start_ptr is not None:
        start_ptr += b * num_groups
    memory = tl.full([key_block, tile], 0.0, wide)  # dS
    if memory_ptr is not None:
        place = pair.to(tl.int64) * num_segments + segment
        memory = load(memory_ptr + place * key_width * value_width, columns_d, value_width,
                      columns_d < key_width, columns_e, value_width)  # fmt: skip

    kind = g_ptr.dtype.element_ty
    near_lags = index[None, :] - index[:, None]
    if taps_ptr is not None and repeats == 1:  # one head's weights: work them out once
        near = toeplitz(taps_ptr + kv_head * taps, near_lags, taps, kind)
        far_lags = rows + next_index[None, :] - index[:, None]
        far = toeplitz(taps_ptr + kv_head * taps, far_lags, taps, kind)

    stop = tl.minimum((segment + 1) * step, num_chunks)
    for back in range(0, stop - segment * step):
        c = stop - 1 - back
        limit, last = bounds(start_ptr, c, num_groups, chunk // group)
        for n in range(blocks):
            local = n * rows + index
            j = c * chunk + local
            there = (local < chunk) & (j < num_slots)
            if key_width > 0:
                k = load(k_ptr, j, k_slot, there, columns_d, key_width)
                norm = load_norm(k_norm_ptr, j, there, wide)
            dv = tl.full([rows, tile], 0.0, wide)
            if features:
                scale = norm
                if start_ptr is not None:
                    scale = tl.where(j // group >= last, norm, 0.0)
                dv = dot(k, memory.to(k.dtype), precision, wide) * scale[:, None]
                if blocks == 1:
                    memory = kept(memory, limit, last)
            for r in range(repeats):  # queries of the same block
                head = kv_head * repeats + r
                g_at = g_ptr + b * g_batch + head * g_head
                g = load(g_at, j, g_slot, there, columns_e, value_width)
                weights = tl.full([rows, rows], 0.0, wide)
                begin = begins(start_ptr, j, there, group)
                if key_width > 0:
                    alpha = load_alpha(alpha_ptr, head, wide)
                    q_at = q_ptr + b * q_batch + head * q_head
                    q = load(q_at, j, q_slot, there, columns_d, key_width)
                    q_norm_at = at_head(q_norm_ptr, b * kv_heads * repeats + head, num_slots)
                    norm_q = load_norm(q_norm_at, j, there, wide)
                    if paired:
                        scores = score(k, norm, q, norm_q, precision, wide)
                        weights = weigh(scores, j[None, :], j[:, None], as_row(begin), alpha,
                                        group, inside, across)  # fmt: skip
                    if features and blocks == 1:
                        scale = reading(norm_q, alpha, begin, limit)
                        memory = add_dot(memory, tl.trans(q), scaled(g, scale), precision)
                if taps_ptr is not None:
                    if repeats > 1:
                        near = toeplitz(taps_ptr + head * taps, near_lags, taps, kind)
                    weights += reached(near, j[:, None], as_row(begin), group).to(wide)
                if paired or taps_ptr is not None:
                    dv = add_dot(dv, weights.to(kind), g, precision)
                if taps > 1:
                    t = tl.minimum(c * chunk + (n + 1) * rows, (c + 1) * chunk) + next_index
                    begin = begins(start_ptr, t, t < num_slots, group)
                    if repeats > 1 or chunk % rows != 0:
                        far = toeplitz(taps_ptr + head * taps, t[None, :] - j[:, None], taps, kind)
                    g = load(g_at, t, g_slot, t < num_slots, columns_e, value_width)
                    weights = reached(far, j[:, None], as_row(begin), group)
                    dv = add_dot(dv, weights, g, precision)
            later_blocks = blocks - 1 - n if paired else 0
            for i in range(later_blocks * repeats):  # of later blocks of the same group
                head = kv_head * repeats + i % repeats
                local_t = (n + 1 + i // repeats) * rows + index
                t = c * chunk + local_t
                there_t = (local_t < chunk) & (t < num_slots)
                g = load(g_ptr + b * g_batch + head * g_head, t, g_slot, there_t, columns_e,
                         value_width)  # fmt: skip
                q = load(q_ptr + b * q_batch + head * q_head, t, q_slot, there_t, columns_d,
                         key_width)  # fmt: skip
                q_norm_at = at_head(q_norm_ptr, b * kv_heads * repeats + head, num_slots)
                norm_q = load_norm(q_norm_at, t, there_t, wide)
                scores = score(k, norm, q, norm_q, precision, wide)
                begin = begins(start_ptr, t, there_t, group)
                alpha = load_alpha(alpha_ptr, head, wide)
                weights = weigh(scores, t[None, :], j[:, None], as_row(begin), alpha,
                                group, inside, across)  # fmt: skip
                dv = add_dot(dv, weights.to(kind), g, precision)
            store(dv_ptr, dv, j, dv_slot, there, columns_e, value_width)
        if features and blocks > 1:
            memory = kept(memory, limit, last)
            for i in range(blocks * repeats):
                head = kv_head * repeats + i % repeats
                local = (i // repeats) * rows + index
                t = c * chunk + local
                there = (local < chunk) & (t < num_slots)
                begin = begins(start_ptr, t, there, group)
                alpha = load_alpha(alpha_ptr, head, wide)
                q_at = q_ptr + b * q_batch + head * q_head
                q = load(q_at, t, q_slot, there, columns_d, key_width)
                g = load(g_ptr + b * g_batch + head * g_head, t, g_slot, there, columns_e,
                         value_width)  # fmt: skip
                q_norm_at = at_head(q_norm_ptr, b * kv_heads * repeats + head, num_slots)
                norm_t = load_norm(q_norm_at, t, there, wide)
                scale = reading(norm_t, alpha, begin, limit)
                memory = add_dot(memory, tl.trans(q), scaled(g, scale), precision)
