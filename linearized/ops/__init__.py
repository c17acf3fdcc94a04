"""The mathematics of linear attention: one door in front of its backends.

Shapes: q [B, H, T, D], k [B, K, T, D], v [B, K, T, E], as in torch's scaled_dot_product_attention;
each of the K key/value heads serves H/K query heads. `alpha` [H] or None, `taps` [H, M] with
column i the weight of lag i, or None. `attend`, `mix` and `attend_tree` are grouped linear
attention; `linear_attention` is the operator beneath, which takes any `Form`. Definitions:
`reference.py`. Source: You et al., "When Linear Attention Meets Autoregressive Decoding", ICML
2024; exactness across group boundaries, in sequences and in trees, is this project's.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from linearized.errors import ConfigError, StateError
from linearized.ops import cpu, reference
from linearized.ops.form import CONVOLUTION, Form
from linearized.ops.grid import Grid
from linearized.ops.nodes import Nodes
from linearized.ops.reference import unit
from linearized.state import GroupState
from linearized.tree import ancestors, check_parents

__all__ = [
    "BACKENDS",
    "Form",
    "Nodes",
    "ancestors",
    "attend",
    "attend_tree",
    "check_parents",
    "choose",
    "convolve",
    "fold_",
    "linear_attention",
    "mix",
    "pick",
    "recall",
    "remember",
    "unit",
]

BACKENDS = ("cpu", "reference", "triton")
"""`cpu` are chunks, on every device; `triton` needs a GPU (or TRITON_INTERPRET=1)."""


FEW = 32
"""Up to this many tokens on top of a state go as a tree that is a chain: less to set up."""


def choose(backend: str | None) -> ModuleType:
    """The backend of this name; None: `cpu`, until the kernels have proven themselves on GPUs."""
    if backend is None or backend == "cpu":
        return cpu
    if backend == "reference":
        return reference
    if backend == "triton":
        return _triton()
    choices = ", ".join(BACKENDS)
    raise ConfigError(f"unknown backend {backend!r}; choose from {choices}")


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
        state = reference.empty_state(k, v, form=_form(q, alpha, group), taps=taps)
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
    _check(q, k, v, alpha, taps, form, state)
    check_parents(parents, q.shape[0], q.shape[2])
    q, k = unit(q), unit(k)
    chosen = choose(backend)
    if chosen is reference:
        return reference.attend_tree(q, k, v, parents, state, form=form, alpha=alpha, taps=taps)
    nodes = _nodes(parents, state, chosen)
    out: Tensor = chosen.attend_tree(q, k, v, nodes, state, form=form, alpha=alpha, taps=taps)
    return out


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    form: Form,
    alpha: Tensor | None = None,
    taps: Tensor | None = None,
    unit_norm: bool = False,
    state: GroupState | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    nodes: Nodes | None = None,
    backend: str | None = None,
) -> Tensor:
    """The operator of every variant: q [B, H, T, X], k [B, K, T, X], v [B, K, T, U] to
    [B, H, T, U], as `form` says. With `nodes` they are a tree's nodes on top of `state`; without,
    T tokens that follow it in time. `unit_norm` divides queries and keys by their norms first.
    `taps` is [H, M], or [H, 2M-1] where the form is not causal. Nothing is written.

    Raises:
        ConfigError: shapes that do not fit each other. StateError: a state of other shapes.
    """
    _check(q, k, v, alpha, taps, form, state)
    for name, given in (("mask", mask), ("segments", segments)):
        if given is not None and given.shape != (q.shape[0], q.shape[2]):
            raise ConfigError(
                f"{name} must be [batch, tokens] = {[q.shape[0], q.shape[2]]}, got "
                f"{list(given.shape)}"
            )
    if state is not None and (segments is not None or not form.causal):
        raise ConfigError("several documents in a row, or both directions, go without a state")
    chosen = choose(backend)
    if unit_norm and (state is not None or chosen is reference):
        q, k, unit_norm = unit(q), unit(k), False
    few = mask is None and q.shape[2] <= FEW and form.causal and not torch.is_grad_enabled()
    if few and state is not None and nodes is None and chosen is cpu:
        chain = torch.arange(-1, q.shape[2] - 1, device=q.device).expand(len(q), -1)
        nodes = _nodes(chain, state, chosen)
    if nodes is not None:
        out: Tensor = chosen.attend_tree(q, k, v, nodes, state, form=form, alpha=alpha, taps=taps)
        return out
    if chosen is reference:
        return reference.linear_attention(
            q, k, v, form=form, alpha=alpha, taps=taps, state=state, mask=mask, segments=segments
        )
    chunk = form.group if form.grouped else cpu.CHUNK
    length = state.length if state is not None and form.grouped else None
    grid = Grid.of(q.shape[2], chunk, length=length, mask=mask, segments=segments)
    memory = before = valid = None
    keys, values = grid.place(k), grid.place(v)
    if state is not None:
        keys, values = grid.prepend(keys, state.keys), grid.prepend(values, state.values)
        memory = state.memory
        before = grid.before(state.tail) if taps is not None else None
    if form.inside == "softmax" and not form.causal and grid.slots is not None:
        valid = grid.valid(q.shape[0], q.device)
    out = chosen.scan(
        grid.place(q),
        keys,
        values,
        form=form,
        unit=unit_norm,
        alpha=alpha,
        taps=taps,
        memory=memory,
        before=before,
        start=grid.start,
        valid=valid,
    )
    return grid.take(out)


def convolve(
    v: Tensor,
    taps: Tensor,
    *,
    causal: bool = True,
    state: GroupState | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    nodes: Nodes | None = None,
    backend: str | None = None,
) -> Tensor:
    """The masked depthwise convolution alone: v [B, K, T, E], taps [H, M] to [B, H, T, E]."""
    empty = v.new_zeros(v.shape[0], taps.shape[0], v.shape[2], 0)
    tail = None
    if state is not None:
        group = state.group if nodes is not None else 1
        shape = (*v.shape[:2], group)
        tail = GroupState(
            memory=v.new_zeros(*v.shape[:2], 0, v.shape[3]),
            keys=v.new_zeros(*shape, 0),
            values=v.new_zeros(*shape, v.shape[3]),
            tail=state.tail,
            length=state.length,
        )
    form = replace(CONVOLUTION, causal=causal)
    return linear_attention(
        empty,
        empty[:, : v.shape[1]],
        v,
        form=form,
        taps=taps,
        state=tail,
        mask=mask,
        segments=segments,
        nodes=nodes,
        backend=backend,
    )


def remember(features: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ φ(k) vᵀ over all T tokens that `mask` [B, T] keeps: features [B, K, T, F], v [B, K, T, U]
    to [B, K, F, U], float32 at least."""
    wide = torch.promote_types(v.dtype, torch.float32)
    if mask is not None:
        features = features * mask.bool()[:, None, :, None]
    return features.to(wide).transpose(-1, -2) @ v.to(wide)


def recall(features: Tensor, memory: Tensor, alpha: Tensor | None = None) -> Tensor:
    """α φ(q)ᵀ memory: features [B, H, T, F], memory [B, K, F, U] to [B, H, T, U]."""
    batch, heads, num_tokens, width = features.shape
    if alpha is not None:
        features = features * alpha[:, None, None]
    rows = features.reshape(batch, memory.shape[1], -1, width).to(memory.dtype) @ memory
    return rows.view(batch, heads, num_tokens, -1).to(features.dtype)


def pick(q: Tensor, memory: Tensor) -> Tensor:
    """Linformer's answer of a whole memory: q [B, H, T, D], memory [B, K, F, D+E] to [B, H, T, E],
    softmax over the F rows."""
    batch, heads, num_tokens, width = q.shape
    rows = q.reshape(batch, memory.shape[1], -1, width).to(memory.dtype)
    picks = (rows @ memory[..., :width].transpose(-1, -2)).softmax(-1)
    return (picks @ memory[..., width:]).view(batch, heads, num_tokens, -1).to(q.dtype)


def fold_(
    state: GroupState,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Take T more tokens, those that `mask` [B, T] keeps, into the state, in place. Keys and
    values [B, K, T, ·] are those that the operator was given (of unit norm, if it normalises). All
    layers of a model, [L, B, …], are folded at once by the `cpu` backend."""
    choose(backend).fold_(state, k, v, mask)


def _nodes(parents: Tensor, state: GroupState, backend: ModuleType) -> Nodes:
    trim = backend is cpu and not parents.is_cuda  # on a GPU, looking would wait
    return Nodes.of(parents, state.length, group=state.group, taps=state.taps, trim=trim)


def _form(q: Tensor, alpha: Tensor | None, group: int) -> Form:
    """Of grouped attention; without α, of the group alone."""
    width = 0 if alpha is None or q.ndim != 4 else q.shape[3]
    return Form(group=group, inside="relu2", features=width)


def _triton() -> ModuleType:
    try:
        return importlib.import_module("linearized.ops.kernels")
    except ImportError as error:
        raise ConfigError(
            f"backend 'triton' is not available here ({error}); install triton, or choose 'cpu', "
            "which runs on GPUs, too"
        ) from error


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    form: Form,
    state: GroupState | None,
) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ConfigError(f"q, k, v must be [batch, heads, tokens, width], got {shapes}")
    if 0 in q.shape[:3] or 0 in v.shape or (not q.shape[3] and form.inside != "none"):
        raise ConfigError(f"attention needs at least one token, head and channel, got {shapes}")
    same_width = q.shape[3] == k.shape[3] or form.inside == "slots"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ConfigError(f"q, k, v must agree in batch and tokens, got {shapes}")
    if not same_width or k.shape[3] < form.features:
        raise ConfigError(
            f"q and k must agree in width, of at least {form.features} features, got {shapes}"
        )
    if q.shape[1] % k.shape[1]:
        raise ConfigError(f"query heads must be a multiple of key/value heads, got {shapes}")
    if alpha is not None and alpha.shape != (q.shape[1],):
        raise ConfigError(f"alpha must be [heads] = [{q.shape[1]}], got {list(alpha.shape)}")
    if taps is not None and (taps.ndim != 2 or taps.shape[0] != q.shape[1]):
        raise ConfigError(f"taps must be [heads, M], heads = {q.shape[1]}, got {list(taps.shape)}")
    if form == replace(CONVOLUTION, causal=form.causal) and taps is None:
        raise ConfigError("no pair weighs anything, there is no memory, and there are no taps")
    if taps is not None and not form.causal and taps.shape[1] % 2 == 0:
        raise ConfigError(f"taps in both directions are [heads, 2M-1], got {list(taps.shape)}")
    if state is None:
        return
    num_taps = state.taps if taps is None else taps.shape[1]
    group = form.group if form.grouped else state.group
    tail_width = state.tail.shape[-1] if taps is None else v.shape[3]
    want = (q.shape[0], k.shape[1], group, form.features, k.shape[3], v.shape[3])
    have = (
        state.length.shape[0],
        state.keys.shape[1],
        state.group,
        state.memory.shape[-2],
        state.keys.shape[-1],
        state.values.shape[-1],
    )
    if (*want, num_taps, tail_width) != (*have, state.taps, state.tail.shape[-1]):
        raise StateError(
            "the state does not fit: its batch, heads, group, features, key width, value width, "
            f"taps and tail width are {(*have, state.taps, state.tail.shape[-1])}, the call's are "
            f"{(*want, num_taps, tail_width)}"
        )
