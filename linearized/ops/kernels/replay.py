"""The walk forwards once more: gradients of queries, α and taps. Knows one segment at a time, and
the gradient of the outputs, g.

With w(s) the weight that query t gives to key j, for their score s, p = g_t·v_j, and S = Σ k̂ vᵀ of
earlier keys:

    dq̂_t = Σ_j w'(s) p k̂_j + α S g_t
    dα   = Σ_t q̂_t·S g_t + Σ s p           of pairs that weigh α s
    dtap = Σ p                             of pairs at its lag

Shapes and names as in `forward.py`; tiles are over D. Nothing is added to memory that another
program adds to: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearized.ops.kernels.blocks import (
    add_dot,
    apart,
    as_column,
    at_head,
    begins,
    dot,
    load,
    load_alpha,
    load_norm,
    load_past,
    project,
    scaled,
    score,
    slope,
    store,
    total,
)
from linearized.ops.kernels.forward import bounds, kept


@triton.jit
def across_keys(memory, v, k_tile, norm, j, last, group: tl.constexpr,
                precision: tl.constexpr):  # fmt: skip
    """The transposed memory plus Σ v k̂ᵀ of a block."""
    if last is not None:
        norm = tl.where(j // group >= last, norm, 0.0)
    return add_dot(memory, tl.trans(v), scaled(k_tile, norm), precision)


@triton.jit
def query_gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, q_norm_ptr, k_norm_ptr, alpha_ptr, memory_ptr, start_ptr,
    dq_ptr, dalpha_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    g_batch, g_head, g_slot, dq_batch, dq_head, dq_slot,
    num_slots, num_groups, num_chunks, step, num_segments,
    heads: tl.constexpr, kv_heads: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, chunk: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr,
    key_block: tl.constexpr, value_block: tl.constexpr, tile: tl.constexpr,
    inside: tl.constexpr, features: tl.constexpr, across: tl.constexpr, paired: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dq of a segment, and what it adds to dα, [B, H, P, key tiles]. Program: (b and query head,
    segment, key tile). With one key tile dq is that of q, with several that of q̂."""
    whole: tl.constexpr = tile == key_block
    pair, segment, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    g_ptr += b * g_batch + head * g_head
    dq_ptr += b * dq_batch + head * dq_head
    q_norm_ptr = at_head(q_norm_ptr, pair.to(tl.int64), num_slots)
    k_norm_ptr = at_head(k_norm_ptr, b * kv_heads + kv_head, num_slots)
    columns_d = tl.arange(0, key_block)
    columns_e = tl.arange(0, value_block)
    columns_t = part * tile + tl.arange(0, tile)
    index = tl.arange(0, rows)
    alpha = load_alpha(alpha_ptr, head, wide)
    if start_ptr is not None:
        start_ptr += b * num_groups
    memory = tl.full([value_block, tile], 0.0, wide)  # transposed
    if memory_ptr is not None:
        place = (b * kv_heads + kv_head) * num_segments + segment
        at = memory_ptr + place * key_width * value_width
        at += columns_t[None, :] * value_width + columns_e[:, None]
        there_m = (columns_t < key_width)[None, :] & (columns_e < value_width)[:, None]
        memory = tl.load(at, mask=there_m, other=0.0)
    dalpha = tl.full([rows], 0.0, wide)

    for c in range(segment * step, tl.minimum((segment + 1) * step, num_chunks)):
        limit, last = bounds(start_ptr, c, num_groups, chunk // group)
        for i in range(blocks):
            local = i * rows + index
            t = c * chunk + local
            there = (local < chunk) & (t < num_slots)
            begin = begins(start_ptr, t, there, group)
            q = load(q_ptr, t, q_slot, there, columns_d, key_width)
            g = load(g_ptr, t, g_slot, there, columns_e, value_width)
            norm = load_norm(q_norm_ptr, t, there, wide)
            q_tile = q if whole else load(q_ptr, t, q_slot, there, columns_t, key_width)
            dq = tl.full([rows, tile], 0.0, wide)
            if features:
                dq = dot(g, memory.to(g.dtype), precision, wide)
                if start_ptr is not None:
                    dq = tl.where(begin[:, None] < limit, dq, 0.0)
                dalpha += total(dq * q_tile.to(wide), 1) * norm
                dq *= alpha
            for n in range(i + 1):
                local_j = n * rows + index
                j = c * chunk + local_j
                there_j = (local_j < chunk) & (j < num_slots)
                k = load(k_ptr, j, k_slot, there_j, columns_d, key_width)
                v = load(v_ptr, j, v_slot, there_j, columns_e, value_width)
                norm_k = load_norm(k_norm_ptr, j, there_j, wide)
                k_tile = k if whole else load(k_ptr, j, k_slot, there_j, columns_t, key_width)
                if paired:
                    scores = score(q, norm, k, norm_k, precision, wide)
                    products = dot(g, tl.trans(v), precision, wide)
                    if across:
                        far = scores * products * apart(t[:, None], j[None, :], as_column(begin),
                                                        group, inside)  # fmt: skip
                        dalpha += tl.where(part == 0, total(far, 1), 0.0)
                    products *= slope(scores, t[:, None], j[None, :], as_column(begin), alpha,
                                      group, inside, across)  # fmt: skip
                    dq = add_dot(dq, (products * norm_k[None, :]).to(k.dtype), k_tile, precision)
                if features and blocks == 1:
                    memory = kept(memory, limit, last)
                    memory = across_keys(memory, v, k_tile, norm_k, j, last, group, precision)
            if whole and q_norm_ptr is not None:
                dq = project(dq, q, norm)
            store(dq_ptr, dq, t, dq_slot, there, columns_t, key_width)
        if features and blocks > 1:
            memory = kept(memory, limit, last)
            for n in range(blocks):
                local = n * rows + index
                j = c * chunk + local
                there = (local < chunk) & (j < num_slots)
                k = load(k_ptr, j, k_slot, there, columns_d, key_width)
                v = load(v_ptr, j, v_slot, there, columns_e, value_width)
                k_tile = k if whole else load(k_ptr, j, k_slot, there, columns_t, key_width)
                norm_j = load_norm(k_norm_ptr, j, there, wide)
                memory = across_keys(memory, v, k_tile, norm_j, j, last, group, precision)
    if dalpha_ptr is not None:
        place = (pair.to(tl.int64) * num_segments + segment) * tl.num_programs(2) + part
        tl.store(dalpha_ptr + place, total(dalpha, 0))


@triton.jit
def project_rows(
    grad_ptr, x_ptr, norm_ptr, grad_batch, grad_head, grad_slot, x_batch, x_head, x_slot,
    num_slots,
    heads: tl.constexpr, width: tl.constexpr, width_block: tl.constexpr, rows: tl.constexpr,
    wide: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Make gradients of q̂ or k̂ those of q or k, in place, where no program held whole rows.
    Program: (b and head, block of slots)."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, width_block)
    slots = tl.program_id(1) * rows + tl.arange(0, rows)
    there = slots < num_slots
    grad_ptr += pair // heads * grad_batch + pair % heads * grad_head
    x_ptr += pair // heads * x_batch + pair % heads * x_head
    grad = load(grad_ptr, slots, grad_slot, there, columns, width).to(wide)
    x = load(x_ptr, slots, x_slot, there, columns, width)
    norm = load_norm(norm_ptr + pair * num_slots, slots, there, wide)
    store(grad_ptr, project(grad, x, norm), slots, grad_slot, there, columns, width)


@triton.jit
def sum_lags(
    v_ptr, g_ptr, before_ptr, start_ptr, near_ptr, past_ptr,
    v_batch, v_head, v_slot, g_batch, g_head, g_slot,
    num_slots, num_groups, num_blocks, step, num_segments,
    heads: tl.constexpr, kv_heads: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, rows: tl.constexpr, value_block: tl.constexpr,
    taps: tl.constexpr, window: tl.constexpr, precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Σ g_t·v_j over a segment's blocks, by the places of t and j in a block (`near`, [B, H, P,
    rows, rows]) and before it (`past`, [B, H, P, rows, window]); dtaps are their diagonals.
    Program: (b and query head, segment)."""
    pair, segment = tl.program_id(0), tl.program_id(1)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    v_ptr += b * v_batch + kv_head * v_head
    g_ptr += b * g_batch + head * g_head
    columns = tl.arange(0, value_block)
    index = tl.arange(0, rows)
    past_index = tl.arange(0, window)
    if before_ptr is not None:
        before_ptr += (b * kv_heads + kv_head) * (taps - 1) * value_width
    if start_ptr is not None:
        start_ptr += b * num_groups
    near = tl.full([rows, rows], 0.0, wide)
    past = tl.full([rows, window], 0.0, wide)
    for n in range(segment * step, tl.minimum((segment + 1) * step, num_blocks)):
        t = n * rows + index
        there = t < num_slots
        g = load(g_ptr, t, g_slot, there, columns, value_width)
        v = load(v_ptr, t, v_slot, there, columns, value_width)
        j = n * rows - window + past_index
        v_past = load_past(v_ptr, before_ptr, j, v_slot, num_slots, columns, value_width, taps)
        products = dot(g, tl.trans(v), precision, wide)
        products_past = dot(g, tl.trans(v_past), precision, wide)
        if start_ptr is not None:
            begin = begins(start_ptr, t, there, group)[:, None] * group
            products = tl.where(t[None, :] >= begin, products, 0.0)
            seen = (begin <= 0) | (j[None, :] >= begin)
            products_past = tl.where(seen, products_past, 0.0)
        near += products
        past += products_past
    place = pair.to(tl.int64) * num_segments + segment
    store(near_ptr + place * rows * rows, near, index, rows, index >= 0, index, rows)
    store(past_ptr + place * rows * window, past, index, window, index >= 0, past_index, window)
