"""The walk over a sequence in segments of some chunks, which fit the processor's caches, carrying
the memory from one to the next. Its gradient walks back and computes each segment again, so that
training keeps no more than the inputs and a memory a segment.

B batch, H query heads, K key/value heads, S slots of the grid (see `grid.py`), X width of queries
and keys, F of features, U of values, C chunks, M taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearized.ops.cpu.segment import Walk, attend_segment
from linearized.ops.form import Form


def scan(
    q: Tensor,  # [B, H, S, X]
    k: Tensor,  # [B, K, S, X]
    v: Tensor,  # [B, K, S, U]
    *,
    form: Form,
    unit_norm: bool,  # divide queries and keys by their norms first
    alpha: Tensor | None,  # [H]
    taps: Tensor | None,  # [H, M]; not causal: [H, 2M-1]
    memory: Tensor | None,  # [B, K, F, U], before slot 0
    before: Tensor | None,  # [B, K, M-1, U], values before slot 0
    start: Tensor | None,  # [B, C], first chunk of a chunk's document
    valid: Tensor | None = None,  # [B, S], for softmax in both directions
    sinks: tuple[Tensor, Tensor] | None = None,  # [B, K, C or 1, sinks, X or U], keys and values
) -> Tensor:
    """Outputs [B, H, S, U] of the tokens on a grid."""
    walk = Walk.of(q, k, v, form=form, unit_norm=unit_norm, taps=taps, start=start, valid=valid)
    if memory is None:
        wide = torch.promote_types(v.dtype, torch.float32)
        memory = k.new_zeros(*k.shape[:2], form.features, v.shape[3], dtype=wide)
    if before is None:
        before = v.new_zeros(*v.shape[:2], walk.num_tail, v.shape[3])
    inputs = (q, k, v, alpha, taps, memory, before, *(sinks or (None, None)))
    learns = any(x is not None and x.requires_grad for x in inputs)
    if not learns or not torch.is_grad_enabled():
        return _walk(walk, *inputs)[0]
    out: Tensor = _Scan.apply(walk, *inputs)
    return out


def _walk(
    walk: Walk,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    memory: Tensor,
    before: Tensor,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    *,
    keeps: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the memory before each segment and after the last, if they are to be kept: a
    gradient needs them, and they take room that grows with the tokens."""
    memories = [memory] if keeps else []
    batch, heads, num_slots, _ = q.shape
    # Heads beside each other in memory, where models want them.
    out = v.new_empty(batch, num_slots, heads, _out_width(walk.form, q, v)).transpose(1, 2)
    whole = {"q": q, "k": k, "v": v, "sink_keys": sink_keys, "sink_values": sink_values}
    for first, last in walk.segments():
        part = slice(first * walk.chunk, last * walk.chunk)
        out[:, :, part], memory = attend_segment(
            **_inputs(walk, whole, first, last), alpha=alpha, taps=taps, memory=memory,
            past=_past(v, before, part.start, walk.num_tail), walk=walk, first=first,
        )  # fmt: skip
        if keeps:
            memories.append(memory)
    return out, memories


class _Scan(torch.autograd.Function):
    """The walk, forwards; and back, computing each segment again."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, *inputs: Tensor | None) -> Tensor:
        out, memories = _walk(walk, *inputs, keeps=True)  # type: ignore[arg-type]
        ctx.walk = walk
        q, k, v, alpha, taps, _, before, *sinks = inputs
        ctx.save_for_backward(q, k, v, alpha, taps, before, *sinks, *memories)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        walk: Walk = ctx.walk
        q, k, v, alpha, taps, before, sink_keys, sink_values, *memories = ctx.saved_tensors
        whole = {"q": q, "k": k, "v": v, "sink_keys": sink_keys, "sink_values": sink_values}
        shared = {"alpha": alpha, "taps": taps}
        to = {n: torch.zeros_like(x) for n, x in whole.items() if x is not None}
        to["past"] = torch.zeros_like(before)
        for name, x in shared.items():  # a sum over all segments
            if x is not None:
                to[name] = torch.zeros_like(x, dtype=memories[-1].dtype)
        to_memory = torch.zeros_like(memories[-1])
        for index, (first, last) in reversed(list(enumerate(walk.segments()))):
            part = slice(first * walk.chunk, last * walk.chunk)
            inputs = _inputs(walk, whole, first, last) | shared | {"memory": memories[index]}
            inputs["past"] = _past(v, before, part.start, walk.num_tail)
            leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if x is not None}
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                ends = attend_segment(**{**inputs, **leaves}, walk=walk, first=first)
            grads = torch.autograd.grad(
                ends, list(leaves.values()), (grad[:, :, part], to_memory), materialize_grads=True
            )
            found = dict(zip(leaves, grads, strict=True))
            to_memory = found.pop("memory")
            _add_past(to["v"], to["past"], found.pop("past"), part.start)
            for name in shared:
                if name in found:
                    to[name] += found.pop(name)
            for name, piece in found.items():
                target, missing = _reach(walk, name, to[name], first, last)
                target += piece[:, :, missing:]
        for name, x in shared.items():
            if x is not None:
                to[name] = to[name].to(x.dtype)
        found = {**to, "memory": to_memory}
        order = ("q", "k", "v", "alpha", "taps", "memory", "past", "sink_keys", "sink_values")
        return None, *(found.get(name) for name in order)


def _inputs(walk: Walk, whole: dict[str, Tensor | None], first: int, last: int) -> dict[str, Any]:
    """What a segment takes of tensors of all slots or chunks."""
    found: dict[str, Any] = {}
    for name, x in whole.items():
        if x is not None:
            part, missing = _reach(walk, name, x, first, last)
            x = F.pad(part, (0, 0, missing, 0)) if missing else part
        found[name] = x
    return found


def _reach(walk: Walk, name: str, x: Tensor, first: int, last: int) -> tuple[Tensor, int]:
    """The part of one of them that a segment reaches, and how many slots before slot 0 it reaches,
    too. Queries and sinks are those of the segment; keys and values begin a window before."""
    if name.startswith("sink"):
        return x[:, :, first:last] if x.shape[2] > 1 else x, 0
    start = first * walk.chunk
    if name != "q":
        start -= walk.form.window * walk.chunk
    return x[:, :, max(start, 0) : last * walk.chunk], max(-start, 0)


def _past(v: Tensor, before: Tensor, slot: int, num_tail: int) -> Tensor:
    """The M-1 values before a slot."""
    own = v[:, :, max(slot - num_tail, 0) : slot]
    missing = num_tail - own.shape[2]
    if not missing:
        return own
    return torch.cat([before[:, :, before.shape[2] - missing :], own], dim=2)


def _add_past(to_v: Tensor, to_before: Tensor, piece: Tensor, slot: int) -> None:
    """Give the gradient of `_past` to what it was made of."""
    own = min(slot, piece.shape[2])
    missing = piece.shape[2] - own
    to_v[:, :, slot - own : slot] += piece[:, :, missing:]
    to_before[:, :, to_before.shape[2] - missing :] += piece[:, :, :missing]


def _out_width(form: Form, q: Tensor, v: Tensor) -> int:
    return v.shape[3] - q.shape[3] if form.inside == "slots" else v.shape[3]
