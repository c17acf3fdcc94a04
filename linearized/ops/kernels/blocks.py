"""Blocks of slots on the chip: what the sequence kernels share. Knows how a block is loaded and
what its pairs weigh; knows nothing of the walk.

t query slots, j key slots, both as rows or columns of a block's index; `begin` is the first group
of the query's document, None where a row holds one document.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3e38)
"""A score that weighs nothing beside any other. (No infinity: their difference is no number.)"""


@triton.jit
def total(x, axis: tl.constexpr):
    # tl.sum itself is fixed to the compiler or the interpreter when triton is imported; this is
    # fixed when this file is.
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def greatest(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def exact(s, near, largest, inside: tl.constexpr):
    """Weights of near pairs that have one of their own, from their scores."""
    weights = tl.full(s.shape, 0.0, s.dtype)
    if inside == "relu2":
        positive = tl.maximum(s, 0.0)
        weights = tl.where(near, positive * positive, 0.0)
    if inside == "softmax":
        weights = tl.exp(tl.where(near, s - largest, LOWEST))
    return weights


@triton.jit
def dot(a, b, precision: tl.constexpr, wide: tl.constexpr):
    return tl.dot(a, b, input_precision=precision, out_dtype=wide)


@triton.jit
def add_dot(total, a, b, precision: tl.constexpr):
    """total + a·b, without a second total on the chip."""
    return tl.dot(a, b, acc=total, input_precision=precision, out_dtype=total.dtype)


@triton.jit
def load(ptr, rows, stride, there, columns, width: tl.constexpr):
    """[rows, columns], zero where a row is not `there` or a column is beyond the width."""
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=there[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store(ptr, x, rows, stride, there, columns, width: tl.constexpr):
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=there[:, None] & (columns < width)[None, :])


@triton.jit
def products(
    a_ptr, a_at, a_there, b_ptr, b_at, b_there,
    width: tl.constexpr, precision: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """[rows, columns], of a's rows at the offsets `a_at` with b's, some columns at a time, so that
    rows of any width fit the chip."""
    step: tl.constexpr = 16 if width <= 32 else 64
    out = tl.full([a_at.shape[0], b_at.shape[0]], 0.0, wide)
    for first in range(0, width, step):
        columns = first + tl.arange(0, step)
        within = (columns < width)[None, :]
        a = tl.load(a_ptr + a_at[:, None] + columns[None, :], mask=a_there[:, None] & within,
                    other=0.0)  # fmt: skip
        b = tl.load(b_ptr + b_at[:, None] + columns[None, :], mask=b_there[:, None] & within,
                    other=0.0)  # fmt: skip
        out = add_dot(out, a, tl.trans(b), precision)
    return out


@triton.jit
def load_alpha(alpha_ptr, head, wide: tl.constexpr):
    if alpha_ptr is None:
        return tl.full([], 1.0, wide)
    else:
        return tl.load(alpha_ptr + head).to(wide)


@triton.jit
def load_past(ptr, before_ptr, rows, stride, end, columns, width: tl.constexpr, taps: tl.constexpr):
    """Values at slots that may lie before slot 0, where the last M-1 of `before` are."""
    past = load(ptr, rows, stride, (rows >= 0) & (rows < end), columns, width)
    if before_ptr is not None:
        at = rows + (taps - 1)
        past += load(before_ptr, at, width, (rows < 0) & (at >= 0), columns, width)
    return past


@triton.jit
def at_head(norm_ptr, head, num_slots):
    if norm_ptr is None:
        return None
    else:
        return norm_ptr + head * num_slots


@triton.jit
def load_norm(norm_ptr, rows, there, wide: tl.constexpr):
    """What each row is multiplied by; without norms, 1."""
    if norm_ptr is None:
        return tl.full(rows.shape, 1.0, wide)
    else:
        return tl.load(norm_ptr + rows, mask=there, other=1.0)


@triton.jit
def scaled(x, scale):
    """Rows times a number each, in x's type."""
    return (x.to(scale.dtype) * scale[:, None]).to(x.dtype)


@triton.jit
def project(grad, x, norm):
    """The gradient of a row from that of the row over its norm."""
    hat = x.to(grad.dtype) * norm[:, None]
    return (grad - hat * total(hat * grad, 1)[:, None]) * norm[:, None]


@triton.jit
def sees(t, j, begin, group: tl.constexpr):
    """Is the key no later than the query, and in its document?"""
    seen = t >= j
    if begin is not None:
        seen = seen & (j >= begin * group)
    return seen


@triton.jit
def weigh(s, t, j, begin, alpha, group: tl.constexpr, inside: tl.constexpr, across: tl.constexpr):
    """The weights of a block's pairs. `across`: does it hold pairs of different groups, or pairs
    that weigh as if they were?"""
    weights = tl.full(s.shape, 0.0, s.dtype)
    if across:
        weights = tl.where(sees(t, j, begin, group), alpha * s, 0.0)
    if inside != "linear":
        same = (t >= j) & (t // group == j // group)
        near = tl.full(s.shape, 0.0, s.dtype)
        if inside == "relu2":
            positive = tl.maximum(s, 0.0)
            near = positive * positive
        weights = tl.where(same, near, weights)
    return weights


@triton.jit
def slope(s, t, j, begin, alpha, group: tl.constexpr, inside: tl.constexpr, across: tl.constexpr):
    """The derivative of `weigh` by s."""
    slopes = tl.full(s.shape, 0.0, s.dtype)
    if across:
        slopes = tl.where(sees(t, j, begin, group), alpha, slopes)
    if inside != "linear":
        same = (t >= j) & (t // group == j // group)
        near = tl.full(s.shape, 0.0, s.dtype)
        if inside == "relu2":
            near = 2 * tl.maximum(s, 0.0)
        slopes = tl.where(same, near, slopes)
    return slopes


@triton.jit
def apart(t, j, begin, group: tl.constexpr, inside: tl.constexpr):
    """1 for the pairs that weigh α s, else 0."""
    far = sees(t, j, begin, group)
    if inside != "linear":
        far = far & (t // group != j // group)
    return tl.where(far, 1.0, 0.0)


@triton.jit
def toeplitz(taps_ptr, lags, taps: tl.constexpr, out_type: tl.constexpr):
    """The convolution's weights, the tap of each lag. In the values' type: registers are few."""
    reached = (lags >= 0) & (lags < taps)
    return tl.load(taps_ptr + lags, mask=reached, other=0.0).to(out_type)


@triton.jit
def score(a, norm_a, b, norm_b, precision: tl.constexpr, wide: tl.constexpr):
    """Products of a's rows with b's, over their norms."""
    return dot(a, tl.trans(b), precision, wide) * norm_a[:, None] * norm_b[None, :]


@triton.jit
def reached(weights, j, begin, group: tl.constexpr):
    """The convolution's weights where the key is in the query's document."""
    if begin is not None:  # what is before slot 0 belongs to the document that begins there
        weights = tl.where((begin <= 0) | (j >= begin * group), weights, 0.0)
    return weights


@triton.jit
def as_column(begin):
    if begin is None:
        return None
    else:
        return begin[:, None]


@triton.jit
def as_row(begin):
    if begin is None:
        return None
    else:
        return begin[None, :]


@triton.jit
def begins(start_ptr, t, there, group: tl.constexpr):
    """[rows], the first group of each query's document."""
    if start_ptr is None:
        return None
    else:
        return tl.load(start_ptr + t // group, mask=there, other=0).to(tl.int32)
