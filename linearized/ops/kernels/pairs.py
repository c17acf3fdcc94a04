"""Near pairs, one by one: outputs of a window and sinks, and their gradients. Knows blocks of
slots; knows no memory.

t query slots, j key slots, both of one group in a block: its queries see the same sinks, and begin
at the same key. Scores and g·v are worked out again by every program that needs them, some columns
at a time, so that rows of any width fit the chip.

With w(s) the weight of a pair and p = g_t·v_j:

    ds   = w'(s) p                                                               of relu2
    ds   = w(s) p, less Σ w p of the query's pairs for the key with the largest  of softmax
    dq_t = Σ_j ds k_j     dk_j = Σ_t ds q_t     dv_j = Σ_t w(s) g_t

A key's place is its slot, or less than 0 for a sink. Nothing is added to memory that another
program adds to: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearized.ops.kernels.blocks import (
    LOWEST,
    add_dot,
    begins,
    exact,
    greatest,
    load,
    products,
    store,
    total,
)


@triton.jit
def place_of(num_groups, heads: tl.constexpr, blocks: tl.constexpr):
    """A program's row, head, group, and block in the group."""
    program = tl.program_id(0)
    pair = program // (num_groups * blocks)
    block = program % (num_groups * blocks)
    b, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    return b, head, block // blocks, block % blocks


@triton.jit
def reach(start_ptr, b, c, num_groups, group: tl.constexpr, window: tl.constexpr,
          sinks: tl.constexpr):  # fmt: skip
    """Of group c: the first slot of its window, and how many sinks lie before that."""
    begin = tl.full([], 0, tl.int32)
    if start_ptr is not None:
        begin = tl.load(start_ptr + b * num_groups + c).to(tl.int32)
    oldest = tl.maximum(tl.maximum(c - window, begin), 0) * group
    return oldest, tl.where(c - begin > window, sinks, 0)


@triton.jit
def raised(largest, at, s, seen, places):
    """The largest score so far of each query and its key's place, after more pairs."""
    s = tl.where(seen, s, LOWEST)
    most = greatest(s, 1)
    where = greatest(tl.where(s == most[:, None], places[None, :], -(2**31)), 1)
    higher = most > largest
    return tl.where(higher, most, largest), tl.where(higher, where, at)


@triton.jit
def score_slopes(s, p, seen, largest, inside: tl.constexpr):
    """ds of a block, but for the largest's share."""
    if inside == "relu2":
        return tl.where(seen, 2 * tl.maximum(s, 0.0), 0.0) * p
    else:
        return exact(s, seen, largest, inside) * p


@triton.jit
def near_outputs(
    q_ptr, k_ptr, v_ptr, sink_k_ptr, sink_v_ptr, start_ptr, out_ptr, largest_ptr, at_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    sink_k_batch, sink_k_head, sink_k_group, sink_k_slot,
    sink_v_batch, sink_v_head, sink_v_group, sink_v_slot,
    out_batch, out_head, out_slot, num_slots, num_groups,
    heads: tl.constexpr, kv_heads: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr, inside: tl.constexpr,
    blocks: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Outputs, and for a softmax each query's largest score and its key's place. Program: (b, query
    head and block of queries; value tile)."""
    b, head, c, i = place_of(num_groups, heads, blocks)
    kv_head = head // (heads // kv_heads)
    q_ptr += b * q_batch + head * q_head
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    out_ptr += b * out_batch + head * out_head
    index = tl.arange(0, rows)
    local = i * rows + index
    t = c * group + local
    there = (local < group) & (t < num_slots)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    kind = v_ptr.dtype.element_ty
    q_at = t.to(tl.int64) * q_slot
    oldest, num_sinks = reach(start_ptr, b, c, num_groups, group, window, sinks)
    stop = tl.minimum(c * group + tl.minimum((i + 1) * rows, group), num_slots)
    if sinks > 0:
        sink_k_ptr += b * sink_k_batch + kv_head * sink_k_head + c * sink_k_group.to(tl.int64)
        sink_v_ptr += b * sink_v_batch + kv_head * sink_v_head + c * sink_v_group.to(tl.int64)

    largest = tl.full([rows], LOWEST, wide)
    if inside == "softmax":
        at = tl.full([rows], 0, tl.int32)
        if sinks > 0:
            for first in range(0, num_sinks, rows):
                n = first + index
                s = products(q_ptr, q_at, there, sink_k_ptr, n.to(tl.int64) * sink_k_slot,
                             n < num_sinks, key_width, precision, wide)  # fmt: skip
                seen = there[:, None] & (n < num_sinks)[None, :]
                largest, at = raised(largest, at, s, seen, n - sinks)
        for first in range(oldest, stop, rows):
            j = first + index
            s = products(q_ptr, q_at, there, k_ptr, j.to(tl.int64) * k_slot, j < stop, key_width,
                         precision, wide)  # fmt: skip
            seen = there[:, None] & (j[None, :] <= t[:, None])
            largest, at = raised(largest, at, s, seen, j)
        line = (b * heads + head) * num_slots
        if tl.program_id(1) == 0:
            tl.store(largest_ptr + line + t, largest, mask=there)
            tl.store(at_ptr + line + t, at, mask=there)

    out = tl.full([rows, tile], 0.0, wide)
    if sinks > 0:
        for first in range(0, num_sinks, rows):
            n = first + index
            s = products(q_ptr, q_at, there, sink_k_ptr, n.to(tl.int64) * sink_k_slot,
                         n < num_sinks, key_width, precision, wide)  # fmt: skip
            seen = there[:, None] & (n < num_sinks)[None, :]
            weights = exact(s, seen, largest[:, None], inside)
            v = load(sink_v_ptr, n, sink_v_slot, n < num_sinks, columns, value_width)
            out = add_dot(out, weights.to(kind), v, precision)
    for first in range(oldest, stop, rows):
        j = first + index
        s = products(q_ptr, q_at, there, k_ptr, j.to(tl.int64) * k_slot, j < stop, key_width,
                     precision, wide)  # fmt: skip
        seen = there[:, None] & (j[None, :] <= t[:, None])
        weights = exact(s, seen, largest[:, None], inside)
        v = load(v_ptr, j, v_slot, j < stop, columns, value_width)
        out = add_dot(out, weights.to(kind), v, precision)
    store(out_ptr, out, t, out_slot, there, columns, value_width)


@triton.jit
def near_query_gradients(
    q_ptr, k_ptr, v_ptr, sink_k_ptr, sink_v_ptr, start_ptr, g_ptr, largest_ptr, at_ptr,
    dq_ptr, share_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    sink_k_batch, sink_k_head, sink_k_group, sink_k_slot,
    sink_v_batch, sink_v_head, sink_v_group, sink_v_slot,
    g_batch, g_head, g_slot, dq_batch, dq_head, dq_slot, num_slots, num_groups,
    heads: tl.constexpr, kv_heads: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr, inside: tl.constexpr,
    blocks: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dq, and for a softmax the share Σ w p of each query's largest pair. Program: (b, query head
    and block of queries; key tile)."""
    b, head, c, i = place_of(num_groups, heads, blocks)
    kv_head = head // (heads // kv_heads)
    q_ptr += b * q_batch + head * q_head
    g_ptr += b * g_batch + head * g_head
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    dq_ptr += b * dq_batch + head * dq_head
    index = tl.arange(0, rows)
    local = i * rows + index
    t = c * group + local
    there = (local < group) & (t < num_slots)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    kind = v_ptr.dtype.element_ty
    q_at, g_at = t.to(tl.int64) * q_slot, t.to(tl.int64) * g_slot
    oldest, num_sinks = reach(start_ptr, b, c, num_groups, group, window, sinks)
    stop = tl.minimum(c * group + tl.minimum((i + 1) * rows, group), num_slots)
    if sinks > 0:
        sink_k_ptr += b * sink_k_batch + kv_head * sink_k_head + c * sink_k_group.to(tl.int64)
        sink_v_ptr += b * sink_v_batch + kv_head * sink_v_head + c * sink_v_group.to(tl.int64)
    line = (b * heads + head) * num_slots
    largest = tl.full([rows], 0.0, wide)
    if inside == "softmax":
        largest = tl.load(largest_ptr + line + t, mask=there, other=0.0)

    dq = tl.full([rows, tile], 0.0, wide)
    share = tl.full([rows], 0.0, wide)
    if sinks > 0:
        for first in range(0, num_sinks, rows):
            n = first + index
            s = products(q_ptr, q_at, there, sink_k_ptr, n.to(tl.int64) * sink_k_slot,
                         n < num_sinks, key_width, precision, wide)  # fmt: skip
            p = products(g_ptr, g_at, there, sink_v_ptr, n.to(tl.int64) * sink_v_slot,
                         n < num_sinks, value_width, precision, wide)  # fmt: skip
            seen = there[:, None] & (n < num_sinks)[None, :]
            slopes = score_slopes(s, p, seen, largest[:, None], inside)
            share += total(slopes, 1)
            k = load(sink_k_ptr, n, sink_k_slot, n < num_sinks, columns, key_width)
            dq = add_dot(dq, slopes.to(kind), k, precision)
    for first in range(oldest, stop, rows):
        j = first + index
        s = products(q_ptr, q_at, there, k_ptr, j.to(tl.int64) * k_slot, j < stop, key_width,
                     precision, wide)  # fmt: skip
        p = products(g_ptr, g_at, there, v_ptr, j.to(tl.int64) * v_slot, j < stop, value_width,
                     precision, wide)  # fmt: skip
        seen = there[:, None] & (j[None, :] <= t[:, None])
        slopes = score_slopes(s, p, seen, largest[:, None], inside)
        share += total(slopes, 1)
        k = load(k_ptr, j, k_slot, j < stop, columns, key_width)
        dq = add_dot(dq, slopes.to(kind), k, precision)
    if inside == "softmax":
        at = tl.load(at_ptr + line + t, mask=there, other=0)
        k = load(k_ptr, at, k_slot, there & (at >= 0), columns, key_width).to(wide)
        if sinks > 0:
            k += load(sink_k_ptr, at + sinks, sink_k_slot, there & (at < 0), columns, key_width)
        dq -= share[:, None] * k
        if tl.program_id(1) == 0:
            tl.store(share_ptr + line + t, share, mask=there)
    store(dq_ptr, dq, t, dq_slot, there, columns, key_width)


@triton.jit
def near_key_gradients(
    q_ptr, k_ptr, v_ptr, start_ptr, g_ptr, largest_ptr, at_ptr, share_ptr, out_ptr,
    q_batch, q_head, q_slot, k_batch, k_head, k_group, k_slot, v_batch, v_head, v_group, v_slot,
    g_batch, g_head, g_slot, out_batch, out_head, out_group, out_slot, num_slots, num_groups,
    kv_heads: tl.constexpr, repeats: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr,
    group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr, inside: tl.constexpr,
    of_sinks: tl.constexpr, of_values: tl.constexpr,
    blocks: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """dk or dv: of the keys on the grid, or of the sinks as each group's queries see them.
    Program: (b, key/value head and block of keys; tile)."""
    b, kv_head, c, n = place_of(num_groups, kv_heads, blocks)
    q_ptr += b * q_batch
    g_ptr += b * g_batch
    group_at = c.to(tl.int64)
    k_ptr += b * k_batch + kv_head * k_head + group_at * k_group
    v_ptr += b * v_batch + kv_head * v_head + group_at * v_group
    out_ptr += b * out_batch + kv_head * out_head + group_at * out_group
    index = tl.arange(0, rows)
    local = n * rows + index
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    kind = v_ptr.dtype.element_ty
    if of_sinks:
        _, num_sinks = reach(start_ptr, b, c, num_groups, group, window, sinks)
        there = local < num_sinks
        places = local - sinks
        start_t = c * group
        stop = tl.where(num_sinks > 0, tl.minimum((c + 1) * group, num_slots), start_t)
    else:
        places = c * group + local
        there = (local < group) & (places < num_slots)
        start_t = c * group + n * rows
        stop = tl.minimum((c + window + 1) * group, num_slots)
    if start_ptr is not None:
        start_ptr += b * num_groups
    k_at, v_at = local.to(tl.int64) * k_slot, local.to(tl.int64) * v_slot
    out = tl.full([rows, tile], 0.0, wide)
    for r in range(repeats):
        head = kv_head * repeats + r
        q_from, g_from = q_ptr + head * q_head, g_ptr + head * g_head
        line = (b * kv_heads * repeats + head) * num_slots
        for first in range(start_t, stop, rows):
            t = first + index
            there_t = t < stop
            s = products(k_ptr, k_at, there, q_from, t.to(tl.int64) * q_slot, there_t, key_width,
                         precision, wide)  # fmt: skip
            seen = there[:, None] & there_t[None, :]
            if not of_sinks:
                seen = seen & (places[:, None] <= t[None, :])
                if start_ptr is not None:
                    seen = seen & (begins(start_ptr, t, there_t, group) <= c)[None, :]
            largest = tl.full([rows], 0.0, wide)
            if inside == "softmax":
                largest = tl.load(largest_ptr + line + t, mask=there_t, other=0.0)
            if of_values:
                weights = exact(s, seen, largest[None, :], inside)
                g = load(g_from, t, g_slot, there_t, columns, value_width)
                out = add_dot(out, weights.to(kind), g, precision)
            else:
                p = products(v_ptr, v_at, there, g_from, t.to(tl.int64) * g_slot, there_t,
                             value_width, precision, wide)  # fmt: skip
                slopes = score_slopes(s, p, seen, largest[None, :], inside)
                if inside == "softmax":
                    at = tl.load(at_ptr + line + t, mask=there_t, other=0)
                    share = tl.load(share_ptr + line + t, mask=there_t, other=0.0)
                    is_largest = seen & (at[None, :] == places[:, None])
                    slopes -= tl.where(is_largest, share[None, :], 0.0)
                q = load(q_from, t, q_slot, there_t, columns, key_width)
                out = add_dot(out, slopes.to(kind), q, precision)
    if of_values:
        store(out_ptr, out, local, out_slot, local < sinks if of_sinks else there, columns,
              value_width)  # fmt: skip
    else:
        store(out_ptr, out, local, out_slot, local < sinks if of_sinks else there, columns,
              key_width)  # fmt: skip
