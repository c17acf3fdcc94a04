"""Grouped linear attention, the flagship, as functions of queries, keys and values. Knows its form;
the operator is in `operator.py`. Shapes as in `linearized/ops/__init__.py`.
"""

from __future__ import annotations

from torch import Tensor

from linearized.ops.backends import choose
from linearized.ops.form import Form
from linearized.ops.layout import Layout
from linearized.ops.operator import check, fold_, linear_attention
from linearized.ops.reference import empty_state, unit
from linearized.state import GroupState
from linearized.tree import ancestors, check_parents


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
    state: GroupState | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, GroupState]:
    """Grouped linear attention of T tokens that follow `state` in time (None: the first tokens),
    and the state after them. `alpha` None is the group alone. `mask` [B, T] is False where there
    is no token (padding, left or right): it takes no position, is seen by nobody, and its output
    is zero. The given state is unchanged.

    Raises:
        ConfigError: shapes that do not fit each other. StateError: a state of other shapes.
    """
    out = mix(q, k, v, alpha=alpha, taps=taps, group=group, state=state, mask=mask, backend=backend)
    if state is None:
        state = empty_state(k, v, form=_form(q, alpha, group), taps=taps)
    else:
        state = state.clone()
    fold_(state, unit(k), v, mask, backend=backend)
    return out, state


def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
    state: GroupState | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The outputs of `attend` alone, [B, H, T, E]: what training needs. With `segments` [B, T] a
    row holds several documents, a new one wherever the number changes; none sees another."""
    return linear_attention(
        q,
        k,
        v,
        form=_form(q, alpha, group),
        alpha=alpha,
        taps=taps,
        unit_norm=True,
        state=state,
        mask=mask,
        segments=segments,
        backend=backend,
    )


def attend_tree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parents: Tensor,
    state: GroupState,
    *,
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
    backend: str | None = None,
) -> Tensor:
    """Grouped linear attention of N tree nodes, [B, H, N, E]: each gets what decoding its path
    token by token would give. `parents` [B, N]: -1 for a child of the last token in `state`, else
    a smaller index. Nothing is written.

    Raises:
        ConfigError: shapes that do not fit, or a node that stands before its parent.
    """
    form = _form(q, alpha, group)
    check(q, k, v, alpha, taps, form, state)
    check_parents(parents, q.shape[0], q.shape[2])
    trim = not parents.is_cuda  # looking would wait for a GPU
    layout = Layout.of(
        ancestors(parents), state.length, near=state.near, taps=state.taps, trim=trim
    )
    return choose(backend).attend_tree(
        unit(q), unit(k), v, layout, state, form=form, alpha=alpha, taps=taps
    )


def _form(q: Tensor, alpha: Tensor | None, group: int) -> Form:
    """Of grouped attention; without α, of the group alone."""
    width = 0 if alpha is None or q.ndim != 4 else q.shape[3]
    return Form(group=group, inside="relu2", features=width)
