"""Every backend against the reference, through the door: sequences, trees, and folds of one layer
and of all."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    # Triton decides as a kernel is defined, and linearized defines its kernels on first use.
    os.environ["TRITON_INTERPRET"] = "1"

from linearized import ops  # noqa: E402
from linearized.errors import ConfigError, StateError  # noqa: E402
from linearized.near import Near  # noqa: E402
from linearized.ops import Form, Layout, reference  # noqa: E402
from linearized.ops import kernels as _kernels  # noqa: E402, F401
from linearized.state import GroupState  # noqa: E402
from linearized.tree import ancestors  # noqa: E402

if not CUDA:
    del os.environ["TRITON_INTERPRET"]

DEVICE = "cuda" if CUDA else "cpu"
FORMS = {
    "grouped": Form(group=8, inside="relu2", features=12),
    "local": Form(group=8, inside="relu2", features=0),
    "global": Form(group=8, inside="none", features=12),
    "linear": Form(group=1, inside="linear", features=12),
    "softmax": Form(group=8, inside="softmax", features=8, window=1, sinks=2),
}
FAST = [name for name in ops.BACKENDS if name != "reference"]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, 4, tokens, 12), (2, 2, tokens, 12), (2, 2, tokens, 9)
    q, k, v = (normal(*shape, dtype=dtype) for shape in shapes)
    return ops.unit(q), ops.unit(k), v


def weights(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"alpha": normal(4, dtype=dtype), "taps": normal(4, 5, dtype=dtype)}


def after(tokens: int, form: Form, dtype: torch.dtype = torch.float64) -> GroupState:
    """A state whose two rows hold different numbers of tokens."""
    _, k, v = inputs(max(tokens, 1), dtype)
    state = reference.empty_state(k, v, form=form, taps=normal(4, 5))
    mask = torch.ones(2, k.shape[2], dtype=torch.bool, device=DEVICE)
    mask[1, : (tokens + 1) // 2] = False
    if tokens:
        reference.fold_(state, k, v, mask)
    return state


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * max(float(b.norm()), 1.0)


def assert_same(a: GroupState, b: GroupState) -> None:
    for name, tensor in a.tensors().items():
        assert_close(tensor.double(), b.tensors()[name].double())


@pytest.mark.parametrize("name", ["attend_sequence", "attend_tree", "fold_"])
def test_backends_have_one_signature(name):
    signatures = [inspect.signature(getattr(ops.choose(b), name)) for b in ops.BACKENDS]
    signatures.append(inspect.signature(getattr(ops.Backend, name)))
    parameters = [list(s.parameters.values()) for s in signatures]
    parameters[-1] = parameters[-1][1:]  # self
    assert all(p == parameters[0] for p in parameters)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens,before", [(1, 0), (7, 29), (33, 0), (40, 9)])
def test_sequences(backend, form, tokens, before):
    torch.manual_seed(0)
    state = after(before, FORMS[form]) if before else None
    mask = None
    if tokens > 1:
        mask = torch.rand(2, tokens).to(DEVICE) > 0.3
    given = {"form": FORMS[form], "state": state, "mask": mask, "unit_norm": True, **weights()}
    q, k, v = inputs(tokens)
    outs = [ops.linear_attention(3 * q, 2 * k, v, **given, backend=b)
            for b in ("reference", backend)]  # fmt: skip
    if state is not None:  # its keys have norm 1, whatever those of the call
        outs.append(ops.linear_attention(q, k, v, **{**given, "unit_norm": False}, backend=backend))
    for out in outs[1:]:
        assert_close(out, outs[0])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("form", FORMS)
def test_documents(backend, form):
    """Of every length around a group's; the second row's lie on whole groups of their own."""
    torch.manual_seed(0)
    cuts = [1, 7, 8, 9, 17]
    rows = [torch.repeat_interleave(torch.arange(5), torch.tensor(cuts)), torch.arange(42) // 16]
    segments = torch.stack(rows).to(DEVICE)
    q, k, v = inputs(42)
    mask = torch.ones(2, 42, dtype=torch.bool, device=DEVICE)
    mask[0, 1:3] = mask[1, 14:18] = False
    for chosen in (slice(0, 2), slice(1, 2)):
        for there in (None, mask[chosen]):
            given = {"form": FORMS[form], "segments": segments[chosen], "mask": there, **weights()}
            parts = q[chosen], k[chosen], v[chosen]
            want = ops.linear_attention(*parts, **given, backend="reference")
            assert_close(ops.linear_attention(*parts, **given, backend=backend), want)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nodes", [1, 9])
def test_trees(backend, form, nodes, trim):
    torch.manual_seed(nodes)
    state, q, k, v = after(29, FORMS[form]), *inputs(nodes)
    parents = [[int(torch.randint(-1, max(n, 1), ())) if n else -1 for n in range(nodes)]
               for _ in range(2)]  # fmt: skip
    visible = ancestors(torch.tensor(parents, device=DEVICE))
    layout = Layout.of(visible, state.length, near=state.near, taps=5, trim=trim)
    assert torch.equal(layout.visible, visible)
    given = {"form": FORMS[form], "state": state, "layout": layout, **weights()}
    want = ops.linear_attention(q, k, v, **given, backend="reference")
    assert_close(ops.linear_attention(q, k, v, **given, backend=backend), want)
    given = {"state": state, "layout": layout}
    taps = normal(4, 5)
    want = ops.convolve(v, taps, **given, backend="reference")
    assert_close(ops.convolve(v, taps, **given, backend=backend), want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_all_layers_are_folded_as_each_is(backend, form, tokens, masked):
    torch.manual_seed(0)
    states = [after(29, FORMS[form]) for _ in range(3)]
    parts = [inputs(tokens)[1:] for _ in range(3)]
    mask = torch.rand(2, tokens).to(DEVICE) > 0.4 if masked else None
    stacked = GroupState(
        **{name: torch.stack([s.tensors()[name] for s in states])
           for name in ("memory", "keys", "values", "tail")},
        length=states[0].length.clone(),
        near=states[0].near,
    )  # fmt: skip
    for state, (k, v) in zip(states, parts, strict=True):
        reference.fold_(state, k, v, mask)
    alone, (k, v) = after(0, FORMS[form]), parts[0]
    want = alone.clone()
    reference.fold_(want, k, v, mask)
    ops.fold_(alone, k, v, mask, backend=backend)
    assert_same(alone, want)
    k, v = (torch.stack(x) for x in zip(*parts, strict=True))
    ops.fold_(stacked, k, v, mask, backend=backend)
    for layer, state in enumerate(states):
        found = {n: t[layer] for n, t in stacked.tensors().items() if n != "length"}
        assert_same(GroupState(**found, length=stacked.length, near=state.near), state)


@pytest.mark.parametrize("near", [Near(8), Near(8, 2, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_fold_away_from_the_processor_looks_at_nothing(masked, near):
    """Numbers on the meta device cannot be looked at, as those on a GPU should not."""
    state = GroupState.empty(
        3, 2, heads=2, features=4, key_width=4, value_width=4, tail_width=4, near=near, taps=5,
        dtype=torch.float32, device="meta",
    )  # fmt: skip
    k = torch.empty(3, 2, 2, 7, 4, device="meta")
    mask = torch.empty(2, 7, dtype=torch.bool, device="meta") if masked else None
    ops.fold_(state, k, k, mask, backend="cpu")
    visible = torch.empty(2, 7, 7, dtype=torch.bool, device="meta")
    Layout.of(visible, state.length, near=near, taps=5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_fold_that_does_not_look_is_one_that_does(monkeypatch, masked):
    from linearized.ops.cpu import fold

    torch.manual_seed(0)
    form, (_, k, v) = FORMS["grouped"], inputs(5)
    mask = torch.rand(2, 5).to(DEVICE) > 0.4 if masked else None
    for tokens in (0, 8, 13):
        want = after(tokens, form)
        state = want.clone()
        reference.fold_(want, k, v, mask)
        fold._close(state.stacked, k[None], v[None], mask, look=False)
        state.length.add_(5 if mask is None else mask.sum(1))
        assert_same(state, want)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_rounded_once(form):
    """Of the same bfloat16 numbers, a sequence and a tree are what float32 gives, rounded; only
    where that lies between two numbers may they fall apart."""
    torch.manual_seed(0)
    half = torch.bfloat16
    q, k, v = inputs(40, half)
    given = {"form": FORMS[form], **weights(half)}
    wide = {"form": FORMS[form], **{n: x.float() for n, x in given.items() if n != "form"}}
    want = ops.linear_attention(q.float(), k.float(), v.float(), **wide).to(half)
    outs = [ops.linear_attention(q, k, v, **given, backend=b) for b in ("reference", "cpu")]
    state = reference.empty_state(k, v, form=FORMS[form], taps=given["taps"])
    reference.fold_(state, k[:, :, :21], v[:, :, :21])
    part = q[:, :, 21:], k[:, :, 21:], v[:, :, 21:]
    with torch.no_grad():
        tree = ops.linear_attention(*part, **given, state=state, backend="cpu")
    for out in (*outs, torch.cat([want[:, :, :21], tree], dim=2)):
        assert out.dtype == half
        assert float((out != want).double().mean()) < 0.005
        assert_close(out.double(), want.double(), 1e-3)


def test_errors_name_the_value():
    form, (q, k, v) = FORMS["grouped"], inputs(5)
    state = after(3, form)
    layout = Layout.of(torch.ones(2, 5, 5, dtype=torch.bool).tril().to(DEVICE), state.length,
                       near=state.near, taps=5)  # fmt: skip
    with pytest.raises(ConfigError, match="stand on a state"):
        ops.linear_attention(q, k, v, form=form, layout=layout, **weights())
    with pytest.raises(StateError, match=r"does not fit.*\[2, 2, 8, 12\].*\[2, 1, 5, 12\]"):
        ops.fold_(state, k[:, :1], v[:, :1])
    with pytest.raises(ConfigError, match=r"mask must be.*\[2, 5\], got \[2, 4\]"):
        ops.fold_(state, k, v, torch.ones(2, 4, dtype=torch.bool))
