"""Linear attention of sequences on a GPU, with gradients. Knows which kernels a form takes.

B batch, H query heads, K key/value heads, S slots of the grid (see `ops/grid.py`), C groups, X
width of queries and keys, of which the last F are features, U value width, M taps.

Where near pairs are those of a group, and of the same columns as far ones, one walk does it all
(`walk.py`). Else near pairs have kernels of their own (`near.py`); far pairs and the convolution
are a walk each, and the three are summed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from linearized.errors import ConfigError
from linearized.ops.form import Form
from linearized.ops.grid import over_grid
from linearized.ops.kernels.launch import check
from linearized.ops.kernels.near import attend_near
from linearized.ops.kernels.walk import walk
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
    q: Tensor,  # [B, H, S, X]
    k: Tensor,  # [B, K, S, X]
    v: Tensor,  # [B, K, S, U]
    *,
    form: Form,
    unit_norm: bool,  # divide queries and keys by their norms first
    alpha: Tensor | None,  # [H]
    taps: Tensor | None,  # [H, M]
    memory: Tensor | None,  # [B, K, F, U], before slot 0
    before: Tensor | None,  # [B, K, M-1, U], values before slot 0
    start: Tensor | None,  # [B, C], first group of a group's document
    valid: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,  # [B, K, C or 1, sinks, ·], keys and values
) -> Tensor:
    """Outputs [B, H, S, U] of the tokens on a grid; see `ops/cpu/scan.py`.

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
    return walk(
        q,
        k,
        v,
        alpha,
        taps,
        memory,
        before,
        start,
        group=group,
        inside=form.inside,
        features=form.features > 0,
        unit_norm=unit_norm,
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
    Far pairs are a walk without near pairs, over keys that come a window late, without sinks."""
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
    add = functools.partial(walk, group=form.group, inside="none", wide=True)
    if form.features:
        late = None if start is None else torch.where(start > 0, start + form.window, start)
        keys, values = _late(k[..., skipped:], form, start, True), _late(v, form, start, False)
        queries = q[..., skipped:]
        out = out + add(queries, keys, values, alpha, None, memory, None, late, features=True)
    if taps is not None:
        nothing = q[..., :0], k[..., :0]
        out = out + add(*nothing, v, None, taps, None, before, start, features=False)
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
