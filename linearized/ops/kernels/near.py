"""What near pairs add to outputs, as an operator with gradients. Knows tensors and launches; the
mathematics is in `pairs.py`.

B batch, H query heads, K key/value heads, S slots of the grid (see `ops/grid.py`), C groups, D key
width, U value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearized.near import Near
from linearized.ops.kernels import pairs
from linearized.ops.kernels.launch import (
    block,
    contiguous,
    given,
    new,
    numbers,
    on,
    rowwise,
    strides,
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def attend_near(
    q: Tensor,  # [B, H, S, D]
    k: Tensor,  # [B, K, S, D]
    v: Tensor,  # [B, K, S, U]
    *,
    near: Near,
    inside: str,
    start: Tensor | None,  # [B, C], first group of a group's document
    sinks: tuple[Tensor, Tensor] | None,  # [B, K, C or 1, sinks, D or U], keys and values
) -> Tensor:
    """Σ w(q·k) v of near pairs, [B, H, S, U], in float32 at least. `inside` is relu2 or softmax."""
    out, *_ = _near(
        q, k, v, *(sinks or (None, None)), start, near.group, near.window, near.sinks, inside
    )
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one call is cut up: a block's slots are of one group."""

    near: Near
    inside: str
    rows: int
    num_slots: int
    num_groups: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, near: Near, inside: str) -> Cut:
        most = 64 if v.dtype.itemsize <= 2 else 32
        return cls(
            near=near,
            inside=inside,
            rows=min(block(near.group), most),
            num_slots=q.shape[2],
            num_groups=-(-q.shape[2] // near.group),
            key_width=q.shape[3],
            value_width=v.shape[3],
        )

    def grid(self, x: Tensor, width: int, slots: int) -> tuple[int, int]:
        """Programs: rows and heads of x, groups and blocks of so many slots; tiles of a width."""
        blocks = self.num_groups * -(-slots // self.rows)
        return x.shape[0] * x.shape[1] * blocks, -(-width // self.tile(width))

    def tile(self, width: int) -> int:
        """Of the columns of a sum: every tile works the scores out again, so that few is best."""
        return min(block(width), 8192 // self.rows)

    def settings(self, v: Tensor, width: int, slots: int) -> dict[str, Any]:
        return {
            "key_width": self.key_width,
            "value_width": self.value_width,
            "group": self.near.group,
            "window": self.near.window,
            "sinks": self.near.sinks,
            "inside": self.inside,
            "blocks": -(-slots // self.rows),
            "rows": self.rows,
            "tile": self.tile(width),
            "num_warps": 4,
            "num_stages": 1,
            **numbers(v.dtype),
        }


@torch.library.custom_op("linearized::near", mutates_args=())
def _near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    start: Tensor | None,
    group: int,
    window: int,
    sinks: int,
    inside: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs; for a softmax each query's largest score and its key's place, [B, H, S]."""
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    cut = Cut.of(q, v, Near(group, window, sinks), inside)
    out, largest, at = _new(q, v, inside)
    sink_keys, sink_values = _rows(sink_keys), _rows(sink_values)
    with on(v.device):
        pairs.near_outputs[cut.grid(q, v.shape[3], group)](
            q, k, v, sink_keys, sink_values, contiguous(start), out, given(largest), given(at),
            *strides(q), *strides(k), *strides(v), *_by_group(sink_keys, 0),
            *_by_group(sink_values, 0), *strides(out), cut.num_slots, cut.num_groups,
            heads=q.shape[1], kv_heads=k.shape[1], **cut.settings(v, v.shape[3], group),
        )  # fmt: skip
    return out, largest, at


@_near.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    start: Tensor | None,
    group: int,
    window: int,
    sinks: int,
    inside: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(q, v, inside)


def _new(q: Tensor, v: Tensor, inside: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = q.shape[:3] if inside == "softmax" else (0,)
    largest, at = v.new_empty(shape, dtype=wide), v.new_empty(shape, dtype=torch.int32)
    return new(q, v, wide), largest, at


@torch.library.custom_op("linearized::near_backward", mutates_args=())
def _near_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    start: Tensor | None,
    largest: Tensor,
    at: Tensor,
    group: int,
    window: int,
    sinks: int,
    inside: str,
) -> Gradients:
    """Gradients of q, k, v and the sinks' keys and values; empty for what is not there."""
    g, q, k, v = rowwise(g), rowwise(q), rowwise(k), rowwise(v)
    sink_keys, sink_values, start = _rows(sink_keys), _rows(sink_values), contiguous(start)
    cut = Cut.of(q, v, Near(group, window, sinks), inside)
    dq, share = new(q, q), torch.empty_like(largest)
    softmax = (given(largest), given(at))
    shared = {"kv_heads": k.shape[1], "repeats": q.shape[1] // k.shape[1]}

    def of_keys(keys: Tensor, values: Tensor, to: Tensor, *, of_values: bool) -> Tensor:
        of_sinks = keys.ndim == 5
        width, slots = to.shape[-1], sinks if of_sinks else group
        pairs.near_key_gradients[cut.grid(k, width, slots)](
            q, keys, values, start, g, *softmax, given(share), to, *strides(q),
            *_by_group(keys, group), *_by_group(values, group), *strides(g), *_by_group(to, group),
            cut.num_slots, cut.num_groups, of_sinks=of_sinks, of_values=of_values, **shared,
            **cut.settings(v, width, slots),
        )  # fmt: skip
        return to

    with on(v.device):
        pairs.near_query_gradients[cut.grid(q, q.shape[3], group)](
            q, k, v, sink_keys, sink_values, start, g, *softmax, dq, given(share),
            *strides(q), *strides(k), *strides(v), *_by_group(sink_keys, 0),
            *_by_group(sink_values, 0), *strides(g), *strides(dq), cut.num_slots, cut.num_groups,
            heads=q.shape[1], kv_heads=k.shape[1], **cut.settings(v, q.shape[3], group),
        )  # fmt: skip
        dk = of_keys(k, v, new(k, k), of_values=False)
        dv = of_keys(k, v, new(v, v), of_values=True)
        if sink_keys is None or sink_values is None:
            return dq, dk, dv, v.new_empty(0), v.new_empty(0)
        # What each group's queries give to the sinks: of one document, they share them.
        shape = (*k.shape[:2], cut.num_groups, sinks)
        wide = torch.promote_types(v.dtype, torch.float32)
        to_keys, to_values = (
            v.new_empty(*shape, x.shape[4], dtype=wide) for x in (sink_keys, sink_values)
        )
        to_keys = of_keys(sink_keys, sink_values, to_keys, of_values=False)
        to_values = of_keys(sink_keys, sink_values, to_values, of_values=True)
    if sink_keys.shape[2] != cut.num_groups:
        to_keys, to_values = (x.sum(2, keepdim=True) for x in (to_keys, to_values))
    return dq, dk, dv, to_keys.to(v.dtype), to_values.to(v.dtype)


@_near_backward.register_fake
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    start: Tensor | None,
    largest: Tensor,
    at: Tensor,
    group: int,
    window: int,
    sinks: int,
    inside: str,
) -> Gradients:
    shapes = [(0,) if x is None else x.shape for x in (sink_keys, sink_values)]
    return new(q, q), new(k, k), new(v, v), v.new_empty(shapes[0]), v.new_empty(shapes[1])


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else rowwise(x)


def _by_group(x: Tensor | None, group: int) -> tuple[int, int, int, int]:
    """Strides of rows, heads, groups and slots: [B, K, S, ·], or [B, K, C or 1, sinks, ·]."""
    if x is None:
        return 0, 0, 0, 0
    if x.ndim == 4:
        return x.stride(0), x.stride(1), group * x.stride(2), x.stride(2)
    return x.stride(0), x.stride(1), x.stride(2) if x.shape[2] > 1 else 0, x.stride(3)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, group, window, sinks, inside = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.constants = (group, window, sinks, inside)


def _differentiate(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    g = g.to(ctx.saved_tensors[2].dtype)
    found = _near_backward(g, *ctx.saved_tensors, *ctx.constants)
    wanted = (True, True, True, *ctx.needs_input_grad[3:5])
    grads = [x if is_wanted else None for x, is_wanted in zip(found, wanted, strict=True)]
    return *grads, None, None, None, None, None


_near.register_autograd(_differentiate, setup_context=_keep)
