"""Committing tokens to the state on a GPU, in place. Knows rows of state; knows no trees.

L layers, B rows, K key/value heads, T tokens, G group size, R = (window + 1)·G slots of the ring, X
key width (the last F columns are features), U value width (the last E columns are the
convolution's), M taps.

The tokens in the ring and the new ones are one line; those whose places on it are less than
`closed` are far from now on, but for sinks. Two launches, each for all layers and rows at once:
`close` adds what becomes far to the memory; `append`, after it, clears the slots of that, and puts
the rest of the new tokens into slots and tail. Neither asks the GPU for a length, so that a commit
can be captured in a graph.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from linearized.errors import ConfigError
from linearized.ops.kernels.blocks import add_dot, load, store, total
from linearized.ops.kernels.launch import block, check_device, numbers, on, rowwise
from linearized.state import GroupState

ROWS = 32


def fold_(state: GroupState, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Take T more tokens into the state, in place; see `backends.Backend`.

    Raises:
        ConfigError: tensors on no GPU.
    """
    check_device(v)
    _check_rows(state)
    layers = state.stacked
    k, v = (x if x.ndim == 5 else x[None] for x in (k, v))
    if not k.shape[3]:
        return
    k, v = rowwise(k.to(layers.keys.dtype)), rowwise(v.to(layers.values.dtype))
    mask = None if mask is None else mask.bool().contiguous()
    num_layers, batch, kv_heads, num_tokens, key_width = k.shape
    shapes = {
        "kv_heads": kv_heads,
        "group": layers.near.group,
        "window": layers.near.window,
        "sinks": layers.near.sinks,
        "key_width": key_width,
        "value_width": v.shape[4],
        "rows": ROWS,
    }
    pairs, memory = num_layers * batch * kv_heads, layers.memory
    with on(memory.device):
        if memory.numel():
            features, tile = block(memory.shape[3]), min(block(v.shape[4]), 64)
            tile_f = min(features, 128)
            close[(pairs, -(-v.shape[4] // tile), -(-memory.shape[3] // tile_f))](
                k, v, mask, layers.length, layers.keys, layers.values, memory,
                *_strides(k), *_strides(v), *_strides(layers.keys), *_strides(layers.values),
                *_strides(memory), num_tokens, batch,
                **shapes, features=memory.shape[3], feature_tile=tile_f, tile=tile,
                **numbers(memory.dtype), num_warps=4, num_stages=1,
            )  # fmt: skip
        append[(pairs,)](
            k, v, mask, layers.length, layers.keys, layers.values, layers.tail,
            *_strides(k), *_strides(v), *_strides(layers.keys), *_strides(layers.values),
            *_strides(layers.tail), num_tokens, batch,
            **shapes, num_tail=layers.taps - 1, tail_width=layers.tail.shape[4],
            key_block=block(key_width), value_block=block(v.shape[4]),
            tail_block=block(layers.taps - 1), tile=min(block(layers.tail.shape[4]), 32),
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    state.length.add_(num_tokens if mask is None else mask.sum(1))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of layers, rows, heads and slots."""
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def _check_rows(state: GroupState) -> None:
    for name, tensor in state.tensors().items():
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ConfigError(
                f"the rows of a state that is written in place lie in one piece; {name} has "
                f"strides {tensor.stride()}: make it contiguous"
            )


@triton.jit
def place(pair, batch, kv_heads: tl.constexpr):
    """A program's layer, row and head."""
    row = pair // kv_heads
    head = pair % kv_heads
    return (row // batch).to(tl.int64), (row % batch).to(tl.int64), head.to(tl.int64)


@triton.jit
def token_places(mask_ptr, b, first, num_tokens, line, rows: tl.constexpr):
    """Of a block of tokens: which are there, their places on the line, and the line's length after
    them."""
    index = tl.arange(0, rows)
    t = first + index
    there = t < num_tokens
    if mask_ptr is None:
        return there, line + index, line + tl.minimum(rows, num_tokens - first)
    else:
        at = mask_ptr + b * num_tokens
        there = tl.load(at + t, mask=there, other=0).to(tl.int1)
        earlier = tl.where(index[None, :] < index[:, None], there[None, :].to(tl.int32), 0)
        return there, line + total(earlier, 1), line + total(there.to(tl.int32), 0)


@triton.jit
def measure(
    mask_ptr, length_ptr, b, num_tokens,
    group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Of the line: tokens in the state, tokens in all, and of these the places that are far after
    it; how many of the first are sinks, and the ring's slot of the first."""
    length = tl.load(length_ptr + b)
    oldest = tl.maximum(length // group - window, 0) * group
    filled = (length - oldest).to(tl.int32)
    line = filled
    if mask_ptr is None:
        line += num_tokens
    else:
        for first in range(0, num_tokens, rows):
            _, _, line = token_places(mask_ptr, b, first, num_tokens, line, rows)
    closed = tl.maximum(line // group - window, 0) * group
    num_sinks = tl.where(oldest == 0, sinks, 0)
    return filled, line, closed, num_sinks, (oldest % ((window + 1) * group)).to(tl.int32)


@triton.jit
def slots_of(
    places, num_sinks, turn, group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr
):
    """Where a state keeps tokens at these places on the line, as `Near.slot` says."""
    ring = sinks + (turn + places) % ((window + 1) * group)
    return tl.where(places < num_sinks, places, ring)


@triton.jit
def close(
    k_ptr, v_ptr, mask_ptr, length_ptr, keys_ptr, values_ptr, memory_ptr,
    k_layer, k_batch, k_head, k_slot, v_layer, v_batch, v_head, v_slot,
    keys_layer, keys_batch, keys_head, keys_slot,
    values_layer, values_batch, values_head, values_slot,
    memory_layer, memory_batch, memory_head, memory_slot, num_tokens, batch,
    kv_heads: tl.constexpr, group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr, rows: tl.constexpr,
    features: tl.constexpr, feature_tile: tl.constexpr, tile: tl.constexpr,
    wide: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Add what becomes far to the memory. Program: (layer, row and head; tiles)."""
    pair = tl.program_id(0)
    layer, b, head = place(pair, batch, kv_heads)
    filled, line, closed, num_sinks, turn = measure(
        mask_ptr, length_ptr, b, num_tokens, group, window, sinks, rows
    )
    if closed == 0:
        return
    skipped: tl.constexpr = key_width - features
    k_ptr += layer * k_layer + b * k_batch + head * k_head + skipped
    v_ptr += layer * v_layer + b * v_batch + head * v_head
    keys_ptr += layer * keys_layer + b * keys_batch + head * keys_head + skipped
    values_ptr += layer * values_layer + b * values_batch + head * values_head
    memory_ptr += layer * memory_layer + b * memory_batch + head * memory_head
    columns_f = tl.program_id(2) * feature_tile + tl.arange(0, feature_tile)
    columns_u = tl.program_id(1) * tile + tl.arange(0, tile)
    index = tl.arange(0, rows)
    memory = load(memory_ptr, columns_f, memory_slot, columns_f < features, columns_u, value_width)
    leaving = tl.minimum(filled, closed)
    for first in range(0, leaving, rows):
        places = first + index
        leaves = (places >= num_sinks) & (places < leaving)
        slots = slots_of(places, num_sinks, turn, group, window, sinks)
        k = load(keys_ptr, slots, keys_slot, leaves, columns_f, features)
        v = load(values_ptr, slots, values_slot, leaves, columns_u, value_width)
        memory = add_dot(memory, tl.trans(k), v, precision)
    line = filled
    for first in range(0, num_tokens, rows):
        there, places, line = token_places(mask_ptr, b, first, num_tokens, line, rows)
        there = there & (places >= num_sinks) & (places < closed)
        k = load(k_ptr, first + index, k_slot, there, columns_f, features)
        v = load(v_ptr, first + index, v_slot, there, columns_u, value_width)
        memory = add_dot(memory, tl.trans(k), v, precision)
    store(memory_ptr, memory, columns_f, memory_slot, columns_f < features, columns_u, value_width)


@triton.jit
def append(
    k_ptr, v_ptr, mask_ptr, length_ptr, keys_ptr, values_ptr, tail_ptr,
    k_layer, k_batch, k_head, k_slot, v_layer, v_batch, v_head, v_slot,
    keys_layer, keys_batch, keys_head, keys_slot,
    values_layer, values_batch, values_head, values_slot,
    tail_layer, tail_batch, tail_head, tail_slot, num_tokens, batch,
    kv_heads: tl.constexpr, group: tl.constexpr, window: tl.constexpr, sinks: tl.constexpr,
    key_width: tl.constexpr, value_width: tl.constexpr, rows: tl.constexpr,
    num_tail: tl.constexpr, tail_width: tl.constexpr,
    key_block: tl.constexpr, value_block: tl.constexpr,
    tail_block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Clear the slots of what has become far, put the rest into slots, and move the tail on.
    Program: layer, row and head."""
    pair = tl.program_id(0)
    layer, b, head = place(pair, batch, kv_heads)
    filled, line, closed, num_sinks, turn = measure(
        mask_ptr, length_ptr, b, num_tokens, group, window, sinks, rows
    )
    k_ptr += layer * k_layer + b * k_batch + head * k_head
    v_ptr += layer * v_layer + b * v_batch + head * v_head
    keys_ptr += layer * keys_layer + b * keys_batch + head * keys_head
    values_ptr += layer * values_layer + b * values_batch + head * values_head
    tail_ptr += layer * tail_layer + b * tail_batch + head * tail_head
    columns_x, columns_u = tl.arange(0, key_block), tl.arange(0, value_block)
    index = tl.arange(0, rows)
    leaving = tl.minimum(filled, closed)
    for first in range(0, leaving, rows):
        places = first + index
        leaves = (places >= num_sinks) & (places < leaving)
        slots = slots_of(places, num_sinks, turn, group, window, sinks)
        nought = tl.full([rows, key_block], 0.0, tl.float32)
        store(keys_ptr, nought, slots, keys_slot, leaves, columns_x, key_width)
        nought = tl.full([rows, value_block], 0.0, tl.float32)
        store(values_ptr, nought, slots, values_slot, leaves, columns_u, value_width)
    if num_tail > 0:
        places = tl.arange(0, tail_block)
        kept = places + (line - filled) < num_tail
        for first in range(0, tail_width, tile):
            columns = first + tl.arange(0, tile)
            old = load(tail_ptr, places + (line - filled), tail_slot, kept, columns, tail_width)
            tl.debug_barrier()  # all of it is read before any of it is written
            store(tail_ptr, old, places, tail_slot, kept, columns, tail_width)
    tl.debug_barrier()  # slots are cleared before they are filled
    end = line
    line = filled
    for first in range(0, num_tokens, rows):
        there, places, line = token_places(mask_ptr, b, first, num_tokens, line, rows)
        k = load(k_ptr, first + index, k_slot, there, columns_x, key_width)
        v = load(v_ptr, first + index, v_slot, there, columns_u, value_width)
        slots = slots_of(places, num_sinks, turn, group, window, sinks)
        stays = there & ((places >= closed) | (places < num_sinks))
        store(keys_ptr, k, slots, keys_slot, stays, columns_x, key_width)
        store(values_ptr, v, slots, values_slot, stays, columns_u, value_width)
        if num_tail > 0:
            columns = columns_u - (value_width - tail_width)
            slots = num_tail + places - end
            at = tail_ptr + slots.to(tl.int64)[:, None] * tail_slot + columns[None, :]
            stays = (there & (slots >= 0))[:, None] & ((columns >= 0) & (columns < tail_width))
            tl.store(at, v.to(tail_ptr.dtype.element_ty), mask=stays)
