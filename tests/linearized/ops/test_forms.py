"""The operator for every form: chunks against the reference, sequences and trees, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearized import ops
from linearized.errors import ConfigError, StateError
from linearized.near import Near
from linearized.ops import Form, Layout, reference
from linearized.ops.cpu import segment
from linearized.state import GroupState
from linearized.tree import ancestors

KINDS = ["relu2", "softmax", "laplace", "linear", "none", "slots"]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case(
    inside: str, tokens: int, *, batch=2, heads=4, kv_heads=2, width=6, features=6, group=8,
    taps=5, split=False, causal=True, window=0, sinks=0,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:  # fmt: skip
    """Random q, k, v, and the settings of a call."""
    if inside in ("linear", "slots"):
        group, split = 1, False
    if inside == "slots":
        taps, keys = 0, normal(batch, kv_heads, tokens, features)
        q, values = normal(batch, heads, tokens, width), normal(batch, kv_heads, tokens, width + 5)
    else:
        x = width + features if split else width
        features = features if split else (0 if features == 0 else width)
        q, keys = normal(batch, heads, tokens, x), normal(batch, kv_heads, tokens, x)
        values = normal(batch, kv_heads, tokens, 5)
    if inside == "softmax":
        values[..., 0] = 1
    if inside == "none" and not features:
        group, taps = 1, max(taps, 1)
    if inside not in ("relu2", "softmax", "laplace") or not causal:
        window = sinks = 0
    form = Form(
        group=group, inside=inside, features=features, causal=causal, window=window,
        sinks=min(sinks, group),
    )  # fmt: skip
    num_taps = taps if causal else 2 * taps - 1
    made = {"form": form, "alpha": normal(heads)}
    made["taps"] = normal(heads, num_taps) if taps else None
    return (q, keys, values), made


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * max(float(b.detach().norm()), 1.0)


shapes = {
    "inside": st.sampled_from(KINDS),
    "tokens": st.integers(1, 90),
    "group": st.integers(2, 17),
    "window": st.sampled_from([0, 0, 1, 2]),
    "sinks": st.sampled_from([0, 0, 1, 4]),
    "taps": st.integers(0, 20),
    "features": st.sampled_from([0, 1, 6, 9]),
    "kv_heads": st.sampled_from([1, 2, 4]),
    "split": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=150)
@given(
    **shapes, causal=st.booleans(), documents=st.booleans(), masked=st.booleans(),
    size=st.sampled_from([1, 300, 1 << 14]),
)  # fmt: skip
def test_chunks_are_the_reference(
    inside,
    tokens,
    group,
    window,
    sinks,
    taps,
    features,
    kv_heads,
    split,
    seed,
    causal,
    documents,
    masked,
    size,
):
    """Outputs and gradients, whatever the length of a segment of the walk."""
    torch.manual_seed(seed)
    features = max(features, 1) if split or inside in ("linear", "slots") else features
    given_, made = case(
        inside, tokens, group=group, taps=taps, features=features, kv_heads=kv_heads, split=split,
        causal=causal, window=window, sinks=sinks,
    )  # fmt: skip
    made["mask"] = torch.rand(2, tokens) > 0.3 if masked else None
    made["segments"] = (torch.rand(2, tokens) < 0.1).long().cumsum(1) if documents else None
    inputs = [x.requires_grad_() for x in (*given_, made["alpha"])]
    inputs += [made["taps"].requires_grad_()] if made["taps"] is not None else []
    old, segment.SEGMENT = segment.SEGMENT, size
    try:
        fast = ops.linear_attention(*given_, **made, backend="cpu")
        grad = torch.randn_like(fast)
        fast_grads = torch.autograd.grad(
            fast, inputs, grad, allow_unused=True, materialize_grads=True
        )
    finally:
        segment.SEGMENT = old
    slow = ops.linear_attention(*given_, **made, backend="reference")
    assert_close(fast, slow)
    slow_grads = torch.autograd.grad(slow, inputs, grad, allow_unused=True, materialize_grads=True)
    for one, other in zip(fast_grads, slow_grads, strict=True):
        assert_close(one, other)


def empty(given_: tuple[Tensor, ...], form: Form, taps: Tensor | None) -> GroupState:
    return reference.empty_state(given_[1], given_[2], form=form, taps=taps)


@settings(max_examples=80)
@given(**shapes, size=st.integers(1, 40), num_nodes=st.integers(1, 20))
def test_states_and_trees(
    inside, tokens, group, window, sinks, taps, features, kv_heads, split, seed, size, num_nodes
):
    """Parts of any size are the whole; then a tree of the fast backend is the reference's."""
    torch.manual_seed(seed)
    features = max(features, 1) if split or inside in ("linear", "slots") else features
    sizes = {
        "group": group, "taps": taps, "features": features, "kv_heads": kv_heads, "split": split,
        "window": window, "sinks": sinks,
    }  # fmt: skip
    given_, made = case(inside, tokens, **sizes)
    whole = ops.linear_attention(*given_, **made)
    states = [empty(given_, made["form"], made["taps"]) for _ in range(2)]
    for start in range(0, tokens, size):
        part = [x[:, :, start : start + size] for x in given_]
        for state, backend in zip(states, ("cpu", "reference"), strict=True):
            out = ops.linear_attention(*part, **made, state=state, backend=backend)
            assert_close(out, whole[:, :, start : start + size])
            ops.fold_(state, part[1], part[2], backend=backend)
    for name, tensor in states[0].tensors().items():
        assert_close(tensor.double(), states[1].tensors()[name].double())

    tree, other = case(inside, num_nodes, **sizes)
    parents = torch.stack(
        [torch.tensor([int(torch.randint(-1, n, ())) if n else -1 for n in range(num_nodes)])
         for _ in range(2)]
    )  # fmt: skip
    state = states[0]
    visible = ancestors(parents)
    layout = Layout.of(visible, state.length, near=state.near, taps=state.taps)
    fast = ops.linear_attention(*tree, **made, state=state, layout=layout)
    assert_close(fast, reference.attend_tree(*tree, layout, state, **made))
    trimmed = Layout.of(visible, state.length, near=state.near, taps=state.taps, trim=True)
    assert trimmed.near.shape[2] <= layout.near.shape[2]
    assert_close(ops.linear_attention(*tree, **made, state=state, layout=trimmed), fast)
    for name in ("near", "far", "lags", "positions"):
        assert torch.equal(getattr(trimmed.at(state.near.slots), name), getattr(layout, name))
    assert other["form"] == made["form"]


@settings(max_examples=25)
@given(
    inside=st.sampled_from(["relu2", "softmax"]), group=st.integers(1, 5),
    window=st.integers(0, 3), sinks=st.integers(0, 5), taps=st.integers(0, 9),
    features=st.sampled_from([0, 6]), widths=st.lists(st.integers(1, 14), min_size=2, max_size=4),
    share=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_rows_of_any_lengths_side_by_side(
    inside, group, window, sinks, taps, features, widths, share, seed
):
    """Each as if it were alone, whoever of them is in its sinks, and whatever lies in padding."""
    torch.manual_seed(seed)
    rows = 3
    given_, made = case(
        inside, sum(widths), batch=rows, group=group, taps=taps, features=features,
        window=window, sinks=sinks,
    )  # fmt: skip
    mask = torch.rand(rows, sum(widths)) < torch.tensor([[share], [1.0], [share / 2]])
    alone = []
    for row in range(rows):
        kept = [x[row : row + 1, :, mask[row]] for x in given_]
        alone.append(reference.attend_sequence(*kept, **made) if mask[row].any() else None)
    states = {
        backend: empty(given_, made["form"], made["taps"]) for backend in ("cpu", "reference")
    }
    for backend, state in states.items():
        outs = []
        parts = zip(*(x.split(widths, dim=2) for x in given_), mask.split(widths, 1), strict=True)
        for q, k, v, here in parts:
            where = {"state": state, "mask": here, "backend": backend}
            outs.append(ops.linear_attention(q, k, v, **made, **where))
            ops.fold_(state, k, v, here, backend=backend)
        out = torch.cat(outs, dim=2)
        for row, want in enumerate(alone):
            if want is not None:
                assert_close(out[row : row + 1, :, mask[row]], want)
            assert not out[row, :, ~mask[row]].any()
    for name, tensor in states["cpu"].tensors().items():
        assert_close(tensor.double(), states["reference"].tensors()[name].double())


@settings(max_examples=60)
@given(
    length=st.integers(0, 40), tokens=st.integers(1, 30), group=st.integers(1, 9),
    window=st.integers(0, 3), sinks=st.integers(0, 5),
    taps=st.integers(1, 12), extra=st.integers(0, 2), features=st.integers(0, 3),
    masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_folding_is_the_references(
    length, tokens, group, window, sinks, taps, extra, features, masked, seed
):
    torch.manual_seed(seed)
    near = Near(group, window, min(sinks, group))
    state = GroupState.empty(
        2, heads=2, features=features, key_width=4, value_width=3 + extra, tail_width=3,
        near=near, taps=taps, dtype=torch.float64,
    )  # fmt: skip
    states = [state, state.clone()]
    for count, mask in ((length, None), (tokens, torch.rand(2, tokens) > 0.4 if masked else None)):
        if count:
            k, v = normal(2, 2, count, 4), normal(2, 2, count, 3 + extra)
            for one, backend in zip(states, ("cpu", "reference"), strict=True):
                ops.fold_(one, k, v, mask, backend=backend)
    for name, tensor in states[0].tensors().items():
        assert_close(tensor.double(), states[1].tensors()[name].double())


@pytest.mark.parametrize("causal", [True, False])
def test_the_convolution_alone(causal):
    v, taps = normal(2, 2, 150, 3), normal(4, 9 if causal else 17)
    out = ops.convolve(v, taps, causal=causal)
    values = v.repeat_interleave(2, dim=1).transpose(-1, -2).reshape(2, 12, 150)
    kernel = taps.flip(-1).repeat_interleave(3, dim=0)[:, None]
    padded = torch.nn.functional.pad(values, (8, 0 if causal else 8))
    want = torch.nn.functional.conv1d(padded, kernel, groups=12)
    assert_close(out, want.view(2, 4, 3, 150).transpose(-1, -2))


def test_memory_across_texts():
    features, v = normal(2, 2, 30, 4), normal(2, 2, 30, 3)
    q, alpha = normal(2, 4, 7, 4), normal(4)
    out = ops.recall(q, ops.remember(features, v), alpha)
    scores = q @ features.repeat_interleave(2, dim=1).transpose(-1, -2)
    assert_close(out, alpha[:, None, None] * scores @ v.repeat_interleave(2, dim=1))


def test_errors_name_the_value():
    with pytest.raises(ConfigError, match=r"'cubic'.*relu2, softmax"):
        Form(group=8, inside="cubic", features=4)
    with pytest.raises(ConfigError, match="group must be 1.*got 8"):
        Form(group=8, inside="linear", features=4)
    given_, made = case("relu2", 10)
    with pytest.raises(ConfigError, match=r"segments must be.*\[2, 10\].*\[2, 9\]"):
        ops.linear_attention(*given_, **made, segments=torch.zeros(2, 9))
    with pytest.raises(ConfigError, match="without a state"):
        state = empty(given_, made["form"], made["taps"])
        ops.linear_attention(*given_, **made, state=state, segments=torch.zeros(2, 10))
    wrong = GroupState.empty(
        2, heads=2, features=6, key_width=6, value_width=5, tail_width=5, near=Near(9), taps=5,
        dtype=torch.float64,
    )  # fmt: skip
    with pytest.raises(StateError, match="does not fit"):
        ops.linear_attention(*given_, **made, state=wrong)
    with pytest.raises(ConfigError, match="no taps"):
        ops.linear_attention(*given_, form=Form(group=1, inside="none", features=0))
    both = Form(group=8, inside="relu2", features=6, causal=False)
    with pytest.raises(ConfigError, match="2M-1"):
        ops.linear_attention(*given_, form=both, taps=normal(4, 4))
