"""Tokens that follow each other. Many go over the grid in chunks; a few that stand on a state go as
a tree that is a chain."""

from __future__ import annotations

import torch
from torch import Tensor

from linearized.ops.cpu.scan import scan
from linearized.ops.cpu.segment import CHUNK
from linearized.ops.cpu.tree import attend_tree
from linearized.ops.form import Form
from linearized.ops.grid import over_grid
from linearized.ops.layout import FEW, Layout
from linearized.ops.reference import unit
from linearized.state import GroupState


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
    """Outputs [B, H, T, U] of T tokens that follow the state's in time; see `backends.Backend`."""
    few = q.shape[2] <= FEW and mask is None and form.causal and not torch.is_grad_enabled()
    if few and state is not None:
        if unit_norm:
            q, k = unit(q), unit(k)
        layout = _chain(q, state)
        return attend_tree(q, k, v, layout, state, form=form, alpha=alpha, taps=taps)
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


def _chain(q: Tensor, state: GroupState) -> Layout:
    num_tokens = q.shape[2]
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device).tril()
    trim = not q.is_cuda  # looking would wait for a GPU
    visible = visible.expand(len(q), -1, -1)
    return Layout.of(visible, state.length, near=state.near, taps=state.taps, trim=trim)
