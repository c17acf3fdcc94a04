"""The operator beneath every variant, its convolution and its fold. Knows which shapes fit each
other; the sums are a backend's.

Shapes as in `linearized/ops/__init__.py`; X width of queries and keys, U of values.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from linearized.errors import ConfigError, StateError
from linearized.near import Near
from linearized.ops.backends import choose
from linearized.ops.form import CONVOLUTION, Form
from linearized.ops.layout import Layout
from linearized.ops.reference import unit
from linearized.state import GroupState


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
    layout: Layout | None = None,
    backend: str | None = None,
) -> Tensor:
    """The operator of every variant: q [B, H, T, X], k [B, K, T, X], v [B, K, T, U] to
    [B, H, T, U], as `form` says. With `layout` they are a tree's nodes on top of `state`;
    without, T tokens that follow it in time. `unit_norm` divides queries and keys by their norms
    first. `taps` is [H, M], or [H, 2M-1] where the form is not causal. Nothing is written.

    Raises:
        ConfigError: shapes that do not fit each other. StateError: a state of other shapes.
    """
    check(q, k, v, alpha, taps, form, state)
    for name, given in (("mask", mask), ("segments", segments)):
        if given is not None and given.shape != (q.shape[0], q.shape[2]):
            raise ConfigError(
                f"{name} must be [batch, tokens] = {[q.shape[0], q.shape[2]]}, got "
                f"{list(given.shape)}"
            )
    if state is not None and (segments is not None or not form.causal):
        raise ConfigError("several documents in a row, or both directions, go without a state")
    chosen = choose(backend)
    if layout is None:
        return chosen.attend_sequence(
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
    if state is None or mask is not None or segments is not None:
        raise ConfigError("a tree's nodes stand on a state, without mask and segments")
    if unit_norm:
        q, k = unit(q), unit(k)
    return chosen.attend_tree(q, k, v, layout, state, form=form, alpha=alpha, taps=taps)


def convolve(
    v: Tensor,
    taps: Tensor,
    *,
    causal: bool = True,
    state: GroupState | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    layout: Layout | None = None,
    backend: str | None = None,
) -> Tensor:
    """The masked depthwise convolution alone: v [B, K, T, E], taps [H, M] to [B, H, T, E].
    The other arguments are those of `linear_attention`."""
    empty = v.new_zeros(v.shape[0], taps.shape[0], v.shape[2], 0)
    tail = None
    if state is not None:
        tail = GroupState(
            memory=v.new_zeros(*v.shape[:2], 0, v.shape[3]),
            keys=v.new_zeros(*v.shape[:2], 1, 0),
            values=v.new_zeros(*v.shape[:2], 1, v.shape[3]),
            tail=state.tail,
            length=state.length,
            near=Near(1),
        )
    layout = None if layout is None else layout.without_slots()
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
        layout=layout,
        backend=backend,
    )


def fold_(
    state: GroupState,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Take T more tokens, those that `mask` [B, T] keeps, into the state, in place. Keys and
    values [B, K, T, ·] are those that the operator was given (of unit norm, if it normalises). The
    layers of a model, [L, B, …], are folded all at once.

    Raises:
        ConfigError: shapes that do not fit each other. StateError: a state of other shapes.
    """
    fits = k.shape[:-2] == state.keys.shape[:-2] and k.shape[-1] == state.keys.shape[-1]
    if not fits or (*k.shape[:-1], state.values.shape[-1]) != v.shape:
        raise StateError(
            f"the state does not fit: it holds keys {list(state.keys.shape)} and values "
            f"{list(state.values.shape)}, the tokens' are {list(k.shape)} and {list(v.shape)}"
        )
    if mask is not None and mask.shape != (len(state.length), k.shape[-2]):
        raise ConfigError(
            f"mask must be [batch, tokens] = {[len(state.length), k.shape[-2]]}, got "
            f"{list(mask.shape)}"
        )
    choose(backend).fold_(state, k, v, mask)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    taps: Tensor | None,
    form: Form,
    state: GroupState | None,
) -> None:
    """Raises ConfigError for shapes that do not fit each other, StateError for another state's."""
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
    near = form.near if form.grouped else state.near
    tail_width = state.tail.shape[-1] if taps is None else v.shape[3]
    sizes = (near.group, near.window, near.sinks)
    want = (q.shape[0], k.shape[1], *sizes, form.features, k.shape[3], v.shape[3])
    have = (
        state.length.shape[0],
        state.keys.shape[1],
        *(state.near.group, state.near.window, state.near.sinks),
        state.memory.shape[-2],
        state.keys.shape[-1],
        state.values.shape[-1],
    )
    if (*want, num_taps, tail_width) != (*have, state.taps, state.tail.shape[-1]):
        raise StateError(
            "the state does not fit: its batch, heads, group, window, sinks, features, key width, "
            f"value width, taps and tail width are {(*have, state.taps, state.tail.shape[-1])}, "
            f"the call's are {(*want, num_taps, tail_width)}"
        )
