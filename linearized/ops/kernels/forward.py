"""The walk forwards: memories and outputs of a sequence. Knows one segment at a time.

B batch, H query heads, K key/value heads, S slots, D key width, E value width, P segments, M taps.
See `walk.py` for the walk as a whole and `blocks.py` for what pairs weigh. Names of compile
time: `chunk` slots are whole groups (`chunk` ≥ `group`) and `blocks` blocks of `rows` slots;
`key_block` ≥ D and `tile` are powers of two; `window` ≥ M-1 slots lie before a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearized.ops.kernels.blocks import (
    add_dot,
    as_column,
    at_head,
    begins,
    dot,
    load,
    load_alpha,
    load_norm,
    load_past,
    reached,
    scaled,
    score,
    store,
    toeplitz,
    total,
    weigh,
)


@triton.jit
def bounds(start_ptr, c, num_groups, per_chunk: tl.constexpr):
    """What documents make of chunk c, in groups: a query reads the memory carried here if its
    document begins before the first number; a key goes into the memory carried on if its group is
    not before the second."""
    if start_ptr is None:
        return None, None
    else:
        limit = tl.maximum(c * per_chunk, 1)
        last = tl.minimum((c + 1) * per_chunk, num_groups) - 1
        return limit, tl.load(start_ptr + last).to(tl.int32)


@triton.jit
def kept(memory, limit, last):
    """The memory of the last document, if that began before the chunk; else nothing."""
    if last is None:
        return memory
    else:
        return tl.where(last < limit, memory, 0.0)


@triton.jit
def reading(norm, alpha, begin, limit):
    """What a query's row is multiplied by as it reads the memory."""
    scale = norm * alpha
    if begin is not None:
        scale = tl.where(begin < limit, scale, 0.0)
    return scale


@triton.jit
def add_keys(memory, k, norm, v, j, last, group: tl.constexpr, precision: tl.constexpr):
    """Memory plus Σ k̂ vᵀ of a block; only of the last document, if there are several. The norms
    go to v's rows: k stays as it was loaded."""
    if last is not None:
        norm = tl.where(j // group >= last, norm, 0.0)
    return add_dot(memory, tl.trans(k), scaled(v, norm), precision)


@triton.jit
def invert_norms(
    x_ptr, norm_ptr, x_batch, x_head, x_slot, num_slots,
    heads: tl.constexpr, width: tl.constexpr, width_block: tl.constexpr, rows: tl.constexpr,
    wide: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """1/‖x‖ of rows, [B, H, S]; 1 for a row of zeros. Program: (b and head, block of slots)."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, width_block)
    slots = tl.program_id(1) * rows + tl.arange(0, rows)
    there = slots < num_slots
    x_ptr += pair // heads * x_batch + pair % heads * x_head
    x = load(x_ptr, slots, x_slot, there, columns, width).to(wide)
    squared = total(x * x, 1)
    norm = tl.rsqrt(tl.where(squared > 0, squared, 1.0))
    tl.store(norm_ptr + pair * num_slots + slots, norm, mask=there)


@triton.jit
def sum_keys(
    k_ptr, v_ptr, k_norm_ptr, start_ptr, out_ptr,
    k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    num_slots, num_groups, num_chunks, step, num_segments,
    kv_heads: tl.constexpr, key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, chunk: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr,
    key_block: tl.constexpr, tile: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the memory, [B, K, P, D, E]. Program: (b and key/value head,
    segment, value tile)."""
    pair, segment = tl.program_id(0), tl.program_id(1)
    b, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    k_ptr += b * k_batch + head * k_head
    v_ptr += b * v_batch + head * v_head
    k_norm_ptr = at_head(k_norm_ptr, pair.to(tl.int64), num_slots)
    columns_d = tl.arange(0, key_block)
    columns_e = tl.program_id(2) * tile + tl.arange(0, tile)
    if start_ptr is not None:
        start_ptr += b * num_groups
    index = tl.arange(0, rows)
    memory = tl.full([key_block, tile], 0.0, wide)
    for c in range(segment * step, tl.minimum((segment + 1) * step, num_chunks)):
        limit, last = bounds(start_ptr, c, num_groups, chunk // group)
        memory = kept(memory, limit, last)
        for n in range(blocks):
            local = n * rows + index
            j = c * chunk + local
            there = (local < chunk) & (j < num_slots)
            k = load(k_ptr, j, k_slot, there, columns_d, key_width)
            v = load(v_ptr, j, v_slot, there, columns_e, value_width)
            norm = load_norm(k_norm_ptr, j, there, wide)
            memory = add_keys(memory, k, norm, v, j, last, group, precision)
    place = pair.to(tl.int64) * num_segments + segment
    out_ptr += place * key_width * value_width
    store(out_ptr, memory, columns_d, value_width, columns_d < key_width, columns_e, value_width)


@triton.jit
def carry(
    sums_ptr, first_ptr, last_ptr, start_ptr,
    num_groups, step, num_segments, size,
    kv_heads: tl.constexpr, per_chunk: tl.constexpr, reverse: tl.constexpr,
    tile: tl.constexpr, precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds, [B, K, P, size], into what each is given, in place. Program:
    (b and key/value head, tile). `first` [B, K, size] is given to the first, what comes out of
    the last goes to `last`; either may be None."""
    pair = tl.program_id(0)
    b = (pair // kv_heads).to(tl.int64)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    there = columns < size
    carried = tl.full([tile], 0.0, wide)
    if first_ptr is not None:
        at = first_ptr + pair.to(tl.int64) * size + columns
        carried = tl.load(at, mask=there, other=0.0).to(wide)
    # The last sum goes nowhere, and forwards is not even there, unless it is asked for.
    nought = tl.full([tile], 0, tl.int32)
    num_sums = num_segments
    if last_ptr is None:
        num_sums = num_segments - 1
    for n in range(num_segments):
        segment = num_segments - 1 - n if reverse else n
        at = sums_ptr + (pair.to(tl.int64) * num_segments + segment) * size + columns
        added = tl.load(at, mask=there & (nought + n < num_sums), other=0.0)
        tl.store(at, carried, mask=there)
        if start_ptr is not None:
            first_group = segment * step * per_chunk
            last_group = tl.minimum(first_group + step * per_chunk, num_groups) - 1
            begin = tl.load(start_ptr + b * num_groups + last_group)
            carried = tl.where(begin < tl.maximum(first_group, 1), carried, 0.0)
        carried += added
    if last_ptr is not None:
        tl.store(last_ptr + pair.to(tl.int64) * size + columns, carried, mask=there)


@triton.jit
def outputs(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, alpha_ptr, taps_ptr, memory_ptr, before_ptr,
    start_ptr, out_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    out_batch, out_head, out_slot,
    num_slots, num_groups, num_chunks, step, num_segments,
    heads: tl.constexpr, kv_heads: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, chunk: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr,
    key_block: tl.constexpr, tile: tl.constexpr, taps: tl.constexpr, window: tl.constexpr,
    inside: tl.constexpr, features: tl.constexpr, across: tl.constexpr, paired: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment. Program: (b and query head, segment, value tile)."""
    pair, segment = tl.program_id(0), tl.program_id(1)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    out_ptr += b * out_batch + head * out_head
    q_norm_ptr = at_head(q_norm_ptr, pair.to(tl.int64), num_slots)
    k_norm_ptr = at_head(k_norm_ptr, b * kv_heads + kv_head, num_slots)
    columns_d = tl.arange(0, key_block)
    columns_e = tl.program_id(2) * tile + tl.arange(0, tile)
    index = tl.arange(0, rows)
    past_index = tl.arange(0, window) - window
    alpha = load_alpha(alpha_ptr, head, wide)
    if before_ptr is not None:
        before_ptr += (b * kv_heads + kv_head) * (taps - 1) * value_width
    if start_ptr is not None:
        start_ptr += b * num_groups
    memory = tl.full([key_block, tile], 0.0, wide)
    if memory_ptr is not None:
        place = (b * kv_heads + kv_head) * num_segments + segment
        memory = load(memory_ptr + place * key_width * value_width, columns_d, value_width,
                      columns_d < key_width, columns_e, value_width)  # fmt: skip

    kind = v_ptr.dtype.element_ty
    if taps_ptr is not None:
        taps_ptr += head * taps
        near = toeplitz(taps_ptr, index[:, None] - index[None, :], taps, kind)
        far = toeplitz(taps_ptr, index[:, None] - past_index[None, :], taps, kind)

    for c in range(segment * step, tl.minimum((segment + 1) * step, num_chunks)):
        limit, last = bounds(start_ptr, c, num_groups, chunk // group)
        for i in range(blocks):
            local = i * rows + index
            t = c * chunk + local
            there = (local < chunk) & (t < num_slots)
            begin = begins(start_ptr, t, there, group)
            out = tl.full([rows, tile], 0.0, wide)
            if key_width > 0:
                q = load(q_ptr, t, q_slot, there, columns_d, key_width)
                norm = load_norm(q_norm_ptr, t, there, wide)
            if features:
                scale = reading(norm, alpha, begin, limit)
                out = dot(q, memory.to(kind), precision, wide) * scale[:, None]
            for n in range(i if paired else 0):
                j = c * chunk + n * rows + index
                k = load(k_ptr, j, k_slot, j < num_slots, columns_d, key_width)
                v = load(v_ptr, j, v_slot, j < num_slots, columns_e, value_width)
                norm_k = load_norm(k_norm_ptr, j, j < num_slots, wide)
                scores = score(q, norm, k, norm_k, precision, wide)
                weights = weigh(scores, t[:, None], j[None, :], as_column(begin), alpha,
                                group, inside, across)  # fmt: skip
                out = add_dot(out, weights.to(kind), v, precision)
            v = load(v_ptr, t, v_slot, there, columns_e, value_width)
            weights = tl.full([rows, rows], 0.0, wide)
            if key_width > 0:
                k = load(k_ptr, t, k_slot, there, columns_d, key_width)
                norm_k = load_norm(k_norm_ptr, t, there, wide)
            if paired:
                scores = score(q, norm, k, norm_k, precision, wide)
                weights = weigh(scores, t[:, None], t[None, :], as_column(begin), alpha,
                                group, inside, across)  # fmt: skip
            if taps_ptr is not None:
                weights += reached(near, t[None, :], as_column(begin), group).to(wide)
            if paired or taps_ptr is not None:
                out = add_dot(out, weights.to(kind), v, precision)
            if taps > 1:
                j = c * chunk + i * rows + past_index
                past = load_past(v_ptr, before_ptr, j, v_slot, num_slots, columns_e, value_width,
                                 taps)  # fmt: skip
                weights = reached(far, j[None, :], as_column(begin), group)
                out = add_dot(out, weights, past, precision)
            store(out_ptr, out, t, out_slot, there, columns_e, value_width)
            if features and blocks == 1:
                memory = kept(memory, limit, last)
                memory = add_keys(memory, k, norm_k, v, t, last, group, precision)
        if features and blocks > 1:
            memory = kept(memory, limit, last)
            for n in range(blocks):
                local = n * rows + index
                j = c * chunk + local
                there = (local < chunk) & (j < num_slots)
                k = load(k_ptr, j, k_slot, there, columns_d, key_width)
                v = load(v_ptr, j, v_slot, there, columns_e, value_width)
                norm_k = load_norm(k_norm_ptr, j, there, wide)
                memory = add_keys(memory, k, norm_k, v, j, last, group, precision)
