"""The mathematics of grouped linear attention: one door in front of its backends.

Shapes: q [B, H, T, D], k [B, K, T, D], v [B, K, T, E], as in torch's scaled_dot_product_attention;
each of the K key/value heads serves H/K query heads. `alpha` [H] or None, `taps` [H, M] with
column i the weight of lag i, or None. Definitions: `reference.py`. Source: You et al., "When
Linear Attention Meets Autoregressive Decoding", ICML 2024; exactness across group boundaries, in
sequences and in trees, is this project's.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from linearized.errors import ConfigError, StateError
from linearized.ops import cpu, reference
from linearized.ops.cpu import Nodes
from linearized.state import GroupState

__all__ = ["BACKENDS", "Nodes", "attend", "attend_tree", "choose", "fold", "mix"]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}


def choose(backend: str | None) -> ModuleType:
    """The backend of this name; None: the fastest there is."""
    if backend is None:
        return cpu
    if backend not in BACKENDS:
        choices = ", ".join(sorted(BACKENDS))
        raise ConfigError(f"unknown backend {backend!r}; choose from {choices}")
    return BACKENDS[backend]


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
    """Attention of T tokens that follow `state` in time (None: the first tokens), and the state
    after them. `mask` [B, T] is False where there is no token (padding, left or right): it takes
    no position, is seen by nobody, and its output is zero. The given state is unchanged.

    Raises:
        ConfigError: shapes that do not fit each other. StateError: a state of other shapes.
    """
    out = mix(q, k, v, alpha=alpha, taps=taps, group=group, state=state, mask=mask, backend=backend)
    if state is None:
        state = reference.empty_state(k, v, group=group, taps=taps)
    return out, choose(backend).fold(state, k, v, mask)


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
    backend: str | None = None,
) -> Tensor:
    """The outputs of `attend` alone, [B, H, T, E]: what training needs."""
    _check(q, k, v, alpha, taps, group, state)
    if mask is not None and mask.shape != (q.shape[0], q.shape[2]):
        raise ConfigError(
            f"mask must be [batch, tokens] = {[q.shape[0], q.shape[2]]}, got {list(mask.shape)}"
        )
    return choose(backend).attend(
        q, k, v, alpha=alpha, taps=taps, group=group, state=state, mask=mask
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
    """Attention of N tree nodes, [B, H, N, E]: each gets what decoding its path token by token
    would give. `parents` [B, N]: -1 for a child of the last token in `state`, else a smaller
    index. Nothing is written.

    Raises:
        ConfigError: shapes that do not fit, or a node that stands before its parent.
    """
    _check(q, k, v, alpha, taps, group, state)
    check_parents(parents, q.shape[0], q.shape[2])
    return choose(backend).attend_tree(q, k, v, parents, state, alpha=alpha, taps=taps, group=group)


def fold(
    state: GroupState,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> GroupState:
    """The state after T more tokens, those that `mask` [B, T] keeps."""
    return choose(backend).fold(state, k, v, mask)


def check_parents(parents: Tensor, batch: int, num_nodes: int) -> None:
    if parents.shape != (batch, num_nodes):
        raise ConfigError(
            f"parents must be [batch, nodes] = {[batch, num_nodes]}, got {list(parents.shape)}"
        )
    nodes = torch.arange(num_nodes, device=parents.device)
    if bool(((parents >= nodes) | (parents < -1)).any()):
        raise ConfigError(
            "every tree node needs a parent that stands before it, or -1 for a child of the last "
            f"token, got parents {parents.tolist()}"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    group: int,
    state: GroupState | None,
) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ConfigError(f"q, k, v must be [batch, heads, tokens, width], got {shapes}")
    if 0 in q.shape or 0 in v.shape:
        raise ConfigError(f"attention needs at least one token, head and channel, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ConfigError(f"q, k, v must agree in batch, tokens and key width, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ConfigError(f"query heads must be a multiple of key/value heads, got {shapes}")
    if alpha is not None and alpha.shape != (q.shape[1],):
        raise ConfigError(f"alpha must be [heads] = [{q.shape[1]}], got {list(alpha.shape)}")
    if taps is not None and (taps.ndim != 2 or taps.shape[0] != q.shape[1]):
        raise ConfigError(f"taps must be [heads, M], heads = {q.shape[1]}, got {list(taps.shape)}")
    if state is None:
        return
    num_taps = 1 if taps is None else taps.shape[1]
    want = (q.shape[0], k.shape[1], group, k.shape[3], v.shape[3], num_taps)
    have = (
        state.length.shape[0],
        state.keys.shape[1],
        state.group,
        state.keys.shape[3],
        state.values.shape[3],
        state.taps,
    )
    if want != have:
        raise StateError(
            "the state does not fit: its batch, heads, group, key width, value width and taps are "
            f"{have}, the call's are {want}"
        )
