"""The operator: its laws for every backend, and every fast backend against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearized import ops
from linearized.errors import ConfigError, StateError
from linearized.ops import reference
from linearized.state import GroupState

LENGTHS = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]
BACKENDS = ["cpu", "reference"]  # `test_kernels.py` has Triton
# Along random directions in seconds; each entry of the Jacobian in minutes.
FAST = [True, pytest.param(False, marks=pytest.mark.slow)]


@dataclass
class Case:
    """Random inputs of one call, float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    taps: Tensor | None
    group: int

    @classmethod
    def of(
        cls, tokens: int, *, group=64, taps=32, batch=2, heads=4, kv_heads=2, seed=0, alpha=True
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        return cls(
            q=normal(batch, heads, tokens, 16),
            k=normal(batch, kv_heads, tokens, 16),
            v=normal(batch, kv_heads, tokens, 12),
            alpha=normal(heads) if alpha else None,
            taps=normal(heads, taps) if taps else None,
            group=group,
        )

    def attend(self, start=0, stop=None, state=None, mask=None, backend="reference"):
        part = slice(start, stop)
        return ops.attend(
            self.q[:, :, part],
            self.k[:, :, part],
            self.v[:, :, part],
            alpha=self.alpha,
            taps=self.taps,
            group=self.group,
            state=state,
            mask=mask,
            backend=backend,
        )


def assert_same(a: Tensor | GroupState, b: Tensor | GroupState, tolerance: float = 1e-10) -> None:
    if isinstance(a, GroupState):
        for name, tensor in a.tensors().items():
            assert_same(tensor.double(), b.tensors()[name].double(), tolerance)
        return
    assert a.shape == b.shape
    if a.numel():
        assert (a - b).norm() <= tolerance * max(a.norm(), 1.0)


def definition(case: Case) -> Tensor:
    """The formulas of the paper, token by token, in plain loops."""
    batch, heads, tokens, _ = case.q.shape
    per = heads // case.k.shape[1]
    out = torch.zeros(batch, heads, tokens, case.v.shape[3], dtype=torch.float64)
    q = case.q / case.q.norm(dim=-1, keepdim=True)
    k = case.k / case.k.norm(dim=-1, keepdim=True)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // per], case.v[b, h // per]
            for t in range(tokens):
                start = case.group * (t // case.group)
                for j in range(start, t + 1):
                    out[b, h, t] += torch.relu(q[b, h, t] @ keys[j]) ** 2 * values[j]
                if case.alpha is not None:
                    memory = sum(
                        (torch.outer(keys[j], values[j]) for j in range(start)),
                        torch.zeros(16, 12, dtype=torch.float64),
                    )
                    out[b, h, t] += case.alpha[h] * (q[b, h, t] @ memory)
                if case.taps is not None:
                    for i in range(min(case.taps.shape[1], t + 1)):
                        out[b, h, t] += case.taps[h, i] * values[t - i]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("taps", [0, 1, 5, 11])
def test_it_is_what_the_paper_defines(backend, alpha, taps):
    case = Case.of(21, group=8, taps=taps, batch=1, alpha=alpha)
    out, _ = case.attend(backend=backend)
    assert_same(out, definition(case))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_is_chunked_is_one_by_one(tokens, backend):
    case = Case.of(tokens, batch=1, heads=2, kv_heads=1)
    whole, end = case.attend(backend=backend)
    for size in (1, 48):
        state, outs = None, []
        for start in range(0, tokens, size):
            out, state = case.attend(start, start + size, state, backend=backend)
            outs.append(out)
        assert_same(whole, torch.cat(outs, dim=2))
        assert_same(end, state)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_backends_agree_with_the_reference(tokens):
    case = Case.of(tokens)
    want, want_state = case.attend(backend="reference")
    for backend in BACKENDS:
        out, state = case.attend(backend=backend)
        assert_same(want, out)
        assert_same(want_state, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_leaves_the_past_alone(backend):
    case = Case.of(130)
    before, _ = case.attend(backend=backend)
    for x in (case.q, case.k, case.v):
        x[:, :, 70:] = torch.randn_like(x[:, :, 70:]) * 100
    after, _ = case.attend(backend=backend)
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert not torch.allclose(before[:, :, 70:], after[:, :, 70:])


@settings(max_examples=40)
@given(data=st.data())
def test_padding_anywhere_changes_nothing(data):
    """Each row of a padded batch, with and without a state, is what it is alone."""
    backend = data.draw(st.sampled_from(BACKENDS))
    case = Case.of(
        30, group=8, taps=data.draw(st.integers(0, 11)), seed=data.draw(st.integers(0, 99))
    )
    columns = st.lists(st.booleans(), min_size=30, max_size=30)
    mask = torch.tensor([data.draw(columns), data.draw(columns)])
    split = data.draw(st.integers(0, 30))
    state = None
    outs = []
    for part in (slice(0, split), slice(split, 30)):
        if part.start < part.stop:
            out, state = case.attend(part.start, part.stop, state, mask[:, part], backend=backend)
            outs.append(out)
    padded = torch.cat(outs, dim=2)
    assert torch.equal(padded * ~mask[:, None, :, None], torch.zeros_like(padded))
    for row in range(2):
        kept = mask[row]
        if not kept.any():
            continue
        alone = Case(
            case.q[row : row + 1, :, kept],
            case.k[row : row + 1, :, kept],
            case.v[row : row + 1, :, kept],
            case.alpha,
            case.taps,
            case.group,
        )
        out, end = alone.attend(backend="reference")
        assert_same(out, padded[row : row + 1, :, kept])
        for name, tensor in end.tensors().items():
            assert_same(tensor.double(), state.tensors()[name][row : row + 1].double())


def random_parents(num_nodes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [
        int(torch.randint(-1, n, (1,), generator=generator)) if n else -1 for n in range(num_nodes)
    ]


def path_to(node: int, parents: list[int]) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", range(8))
def test_a_tree_is_sequential_along_every_path(backend, offset):
    """Trees deeper than a group, from every offset in it, so that paths cross its boundary."""
    case = Case.of(16 + offset, group=8, taps=5)
    _, state = case.attend(backend=backend)
    tree = Case.of(14, group=8, taps=5, seed=offset + 1)
    chain = list(range(-1, 9)) + random_parents(4, offset)
    rows = [random_parents(14, 7 * offset + 3), chain]
    out = ops.attend_tree(
        tree.q, tree.k, tree.v, torch.tensor(rows), state,
        alpha=case.alpha, taps=case.taps, group=8, backend=backend,
    )  # fmt: skip
    crossed = 0
    for row, parents in enumerate(rows):
        for node in range(14):
            path = path_to(node, parents)
            crossed += offset + len(path) > 8
            step, _ = ops.attend(
                tree.q[:, :, path], tree.k[:, :, path], tree.v[:, :, path],
                alpha=case.alpha, taps=case.taps, group=8, state=state, backend="reference",
            )  # fmt: skip
            assert_same(step[row, :, -1], out[row, :, node])
    assert crossed > 0


@settings(max_examples=40)
@given(
    length=st.integers(0, 40),
    num_nodes=st.integers(1, 12),
    group=st.integers(1, 17),
    taps=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_fast_trees_are_the_references(length, num_nodes, group, taps, seed):
    case = Case.of(length + 1, group=group, taps=taps, seed=seed)
    _, state = case.attend(0, length) if length else (None, None)
    if state is None:
        form = ops.Form(group=group, inside="relu2", features=16)
        state = reference.empty_state(case.k, case.v, form=form, taps=case.taps)
    tree = Case.of(num_nodes, group=group, taps=taps, seed=seed + 1)
    parents = torch.tensor([random_parents(num_nodes, seed), random_parents(num_nodes, seed + 5)])
    outs = [
        ops.attend_tree(
            tree.q, tree.k, tree.v, parents, state,
            alpha=case.alpha, taps=case.taps, group=group, backend=backend,
        )
        for backend in ("reference", *BACKENDS)
    ]  # fmt: skip
    for out in outs[1:]:
        assert_same(outs[0], out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", FAST)
def test_gradients(backend, masked, fast):
    case = Case.of(11, group=4, taps=6, batch=1, heads=2, kv_heads=1)
    _, state = Case.of(6, group=4, taps=6, batch=1, heads=2, kv_heads=1, seed=1).attend()
    mask = torch.tensor([[True, False, *[True] * 7, False, True]]) if masked else None

    def call(q, k, v, alpha, taps):
        out, end = ops.attend(
            q, k, v, alpha=alpha, taps=taps, group=4, state=state, mask=mask, backend=backend
        )
        return out, end.memory, end.keys, end.values, end.tail

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.alpha, case.taps)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_give_no_nan(backend):
    case = Case.of(20, group=8, taps=5)
    for x in (case.q, case.k, case.v):
        x[:, :, 3:12] = 0
        x.requires_grad_()
    out, state = case.attend(backend=backend)
    (out.sum() + state.memory.sum()).backward()
    for x in (out, case.q.grad, case.k.grad, case.v.grad):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lower_precision(backend, dtype, tolerance):
    case = Case.of(129)
    want, _ = case.attend()
    low = Case(
        case.q.to(dtype), case.k.to(dtype), case.v.to(dtype),
        case.alpha.to(dtype), case.taps.to(dtype), case.group,
    )  # fmt: skip
    out, state = low.attend(backend=backend)
    assert out.dtype == dtype and state.memory.dtype == torch.float32
    assert_same(want, out.double(), tolerance)


def test_the_given_state_is_left_alone():
    case = Case.of(70)
    _, state = case.attend(0, 60)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for backend in BACKENDS:
        case.attend(60, 70, state, backend=backend)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())


def test_errors_name_the_value():
    case = Case.of(10)
    with pytest.raises(ConfigError, match="cuda-magic.*cpu, reference"):
        case.attend(backend="cuda-magic")
    with pytest.raises(ConfigError, match="at least one token"):
        case.attend(3, 3)
    with pytest.raises(ConfigError, match="multiple"):
        ops.attend(case.q[:, :3], case.k, case.v, alpha=None, taps=None, group=8)
    with pytest.raises(ConfigError, match="alpha must be"):
        ops.attend(case.q, case.k, case.v, alpha=torch.zeros(3), taps=None, group=8)
    _, state = case.attend()
    with pytest.raises(StateError, match="does not fit"):
        ops.attend(case.q, case.k, case.v, alpha=None, taps=None, group=32, state=state)
    with pytest.raises(ConfigError, match="stands before"):
        ops.attend_tree(
            case.q, case.k, case.v, torch.tensor([[0] * 10, [-1] * 10]), state,
            alpha=case.alpha, taps=case.taps, group=64,
        )  # fmt: skip
