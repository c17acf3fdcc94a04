"""The Triton kernels against the formulas pair by pair, interpreted on a CPU or on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    # Triton decides as a kernel is defined, and linearized defines its kernels on first use.
    os.environ["TRITON_INTERPRET"] = "1"

import linearized  # noqa: E402
from linearized.errors import ConfigError  # noqa: E402
from linearized.near import Near  # noqa: E402
from linearized.ops import kernels  # noqa: E402
from linearized.ops.form import Form  # noqa: E402
from linearized.ops.grid import Grid  # noqa: E402
from linearized.ops.kernels import launch, sequence  # noqa: E402
from linearized.ops.layout import Layout  # noqa: E402
from linearized.state import GroupState  # noqa: E402
from linearized.tree import ancestors  # noqa: E402

if not CUDA:
    del os.environ["TRITON_INTERPRET"]

NAMES = ("q", "k", "v", "alpha", "taps", "memory", "before")


@dataclass
class Case:
    """Random inputs of one scan."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    taps: Tensor | None
    memory: Tensor | None
    before: Tensor | None
    start: Tensor | None
    form: Form
    unit: bool

    @classmethod
    def of(
        cls,
        slots: int,
        *,
        group=16,
        inside="relu2",
        across=True,
        unit=True,
        batch=2,
        heads=4,
        kv_heads=2,
        width=24,
        values=20,
        taps=5,
        alpha=True,
        past=False,
        documents=False,
        window=0,
        sinks=0,
        beside=0,
        seed=0,
        device="cpu",
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

        features = beside or (width if across else 0)
        width += beside
        form = Form(group=group, inside=inside, features=features, window=window, sinks=sinks)
        unit_group = group if form.grouped else 64
        num_groups = -(-slots // unit_group)
        start = None
        if documents:
            begins = torch.rand(batch, num_groups, generator=generator) < 0.4
            begins[:, 0] = True
            index = torch.arange(num_groups) * begins
            start = index.cummax(1).values.to(device)
        return cls(
            q=normal(batch, heads, slots, width),
            k=normal(batch, kv_heads, slots, width) * 0.7,
            v=normal(batch, kv_heads, slots, values),
            alpha=normal(heads) if alpha else None,
            taps=normal(heads, taps) if taps else None,
            memory=normal(batch, kv_heads, features, values) if past and features else None,
            before=normal(batch, kv_heads, taps - 1, values) if past and taps > 1 else None,
            start=start,
            form=form,
            unit=unit,
        )

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in NAMES}
        return {name: x for name, x in found.items() if x is not None}

    def leaves(self, dtype: torch.dtype = torch.float64) -> Case:
        def leaf(name: str, x: Tensor) -> Tensor:
            wide = torch.promote_types(dtype, torch.float32) if name == "memory" else dtype
            return x.detach().to(wide).requires_grad_()

        return replace(self, **{name: leaf(name, x) for name, x in self.tensors().items()})

    def scan(self) -> Tensor:
        sinks = None
        if self.form.sinks:
            grid = Grid(self.q.shape[2], self.q.shape[2], start=self.start)
            sinks = tuple(grid.sinks(x, self.form.near, None) for x in (self.k, self.v))
        return sequence.scan(
            self.q, self.k, self.v, form=self.form, unit_norm=self.unit, alpha=self.alpha,
            taps=self.taps, memory=self.memory, before=self.before, start=self.start, sinks=sinks,
        )  # fmt: skip

    def truth(self) -> Tensor:
        return pairwise(self)


def pairwise(case: Case) -> Tensor:
    """The definition: a weight for every pair of slots."""
    form, slots = case.form, case.q.shape[2]
    repeats = case.q.shape[1] // case.k.shape[1]
    group = form.group if form.grouped else 64
    q, k, v = case.q, *(x.repeat_interleave(repeats, 1) for x in (case.k, case.v))
    if case.unit:
        q, k = (hat(x) for x in (q, k))
    heads = q.shape[1]
    alpha = q.new_ones(heads) if case.alpha is None else case.alpha
    alpha = alpha[:, None, None]
    t = torch.arange(slots, device=q.device)
    lag = t[:, None] - t
    start = torch.zeros(len(q), -(-slots // group), dtype=torch.int64, device=q.device)
    start = start if case.start is None else case.start
    begin = start[:, t // group]  # B S
    seen = (lag >= 0) & (t // group >= begin[:, :, None])  # B S S
    seen = seen[:, None]
    near = (t // group)[:, None] - t // group <= form.window
    near = near | (t - group * begin[:, :, None] < form.sinks)[:, None]  # B 1 S S
    skipped = q.shape[3] - form.features
    own = skipped or q.shape[3]
    scores = q[..., :own] @ k[..., :own].transpose(-1, -2)
    across = alpha * (q[..., skipped:] @ k[..., skipped:].transpose(-1, -2))
    largest = scores.masked_fill(~(near & seen), -1e9).amax(-1, keepdim=True)
    inside = {
        "relu2": lambda: scores.clamp(min=0) ** 2,
        "softmax": lambda: (scores - largest).masked_fill(~near, 0).exp(),
        "none": lambda: torch.zeros_like(scores),
        "linear": lambda: alpha * scores,
    }[form.inside]()
    weights = torch.where(near, inside, across) * seen
    if case.taps is not None:
        num_taps = case.taps.shape[1]
        reached = (lag >= 0) & (lag < num_taps)
        weights = weights + case.taps[:, lag.clamp(0, num_taps - 1)] * (reached & seen)
    out = weights @ v
    first = (begin == 0)[:, None, :, None]
    if case.memory is not None:
        memory = case.memory.repeat_interleave(repeats, 1).to(q.dtype)
        out = out + alpha * (q[..., skipped:] @ memory) * first
    if case.before is not None:
        back = t[:, None] + torch.arange(num_taps - 1, 0, -1, device=q.device)  # S M-1
        weights = case.taps[:, back.clamp(max=num_taps - 1)] * (back < num_taps)
        out = out + (weights @ case.before.repeat_interleave(repeats, 1)) * first
    return out


def hat(x: Tensor) -> Tensor:
    norm = x.square().sum(-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0).sqrt()


def gradients(case: Case, out: Tensor, g: Tensor) -> dict[str, Tensor]:
    tensors = case.tensors()
    found = torch.autograd.grad(out, list(tensors.values()), g, allow_unused=True)
    zeros = [
        torch.zeros_like(x) if y is None else y
        for x, y in zip(tensors.values(), found, strict=True)
    ]
    return dict(zip(tensors, zeros, strict=True))


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, by norm."""
    assert found.shape == truth.shape
    difference = (found.double() - truth.double()).norm()
    return float((difference / truth.double().norm().clamp(min=1e-30)).detach())


def check(case: Case, dtype: torch.dtype = torch.float64, within: float = 1e-11) -> None:
    """Outputs and all gradients."""
    exact, fast = case.leaves(), case.leaves(dtype)
    truth, out = exact.truth(), fast.scan()
    assert out.dtype == dtype
    assert distance(out, truth) < within
    g = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    g = g.to(out.device)
    expected = gradients(exact, truth, g)
    for name, found in gradients(fast, out, g.to(dtype)).items():
        assert distance(found, expected[name]) < within, name


SCANS = {
    "one slot": dict(slots=1, past=True),
    "less than a chunk": dict(slots=17),
    "several chunks": dict(slots=100, past=True),
    "one head": dict(slots=33, heads=1, kv_heads=1, batch=1),
    "wide groups": dict(slots=150, group=80, past=True, heads=2),
    "odd groups": dict(slots=100, group=24, documents=True, past=True),
    "groups of one": dict(slots=70, group=1, inside="none"),
    "documents": dict(slots=150, group=16, documents=True, past=True),
    "documents on wide groups": dict(
        slots=290, group=70, documents=True, past=True, seed=2, heads=2
    ),
    "not unit": dict(slots=70, unit=False, past=True),
    "no alpha": dict(slots=70, alpha=False, past=True),
    "no taps": dict(slots=70, taps=0, past=True),
    "one tap": dict(slots=70, taps=1),
    "many taps": dict(slots=150, taps=90, past=True, documents=True),
    "local": dict(slots=70, across=False, past=True),
    "global": dict(slots=100, inside="none", past=True),
    "global wide": dict(slots=100, group=64, inside="none", past=True, taps=0),
    "linear": dict(slots=150, group=1, inside="linear", past=True),
    "window": dict(slots=45, window=1, sinks=4, past=True, heads=2, batch=1),
    "window of documents": dict(
        slots=60, window=1, sinks=3, documents=True, past=True, heads=2, kv_heads=1, seed=1
    ),
    "window of odd groups": dict(
        slots=25, group=5, window=2, sinks=2, heads=2, kv_heads=1, batch=1, taps=15
    ),
    "window of wide groups": dict(
        slots=100, group=40, window=1, sinks=34, heads=1, kv_heads=1, batch=1, taps=0
    ),
    "window beyond the text": dict(slots=20, window=2, sinks=4, heads=2, batch=1),
    "local sinks": dict(slots=40, sinks=16, across=False, heads=2, kv_heads=1, batch=1, unit=False),
    "softmax": dict(slots=35, inside="softmax", unit=False, heads=2, batch=1, taps=0),
    "softmax in a window": dict(
        slots=60,
        inside="softmax",
        beside=70,
        window=1,
        sinks=4,
        unit=False,
        past=True,
        heads=2,
        kv_heads=1,
        batch=1,
    ),
    "softmax of documents": dict(
        slots=60,
        inside="softmax",
        beside=10,
        window=1,
        sinks=4,
        unit=False,
        documents=True,
        heads=2,
        kv_heads=1,
        seed=1,
    ),
    "linear documents": dict(slots=150, group=1, inside="linear", past=True, documents=True),
    "convolution": dict(slots=100, group=1, inside="none", across=False, past=True),
    "convolution without keys": dict(
        slots=70, group=1, inside="none", across=False, past=True, width=0
    ),
}


EXACT = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative distance by norm."""


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SHORTEST", 16)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory that holds NaN until it is written."""

    empty = Tensor.new_empty

    def new_empty(x: Tensor, *shape: Any, **settings: Any) -> Tensor:
        found = empty(x, *shape, **settings)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


interpreted = pytest.mark.skipif(CUDA, reason="a GPU has its own tests below")


@interpreted
@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str, short_segments: None, poison: None) -> None:
    check(Case.of(**SCANS[name]))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scan_in_other_types(dtype: torch.dtype, short_segments: None) -> None:
    window = dict(inside="softmax", beside=8, window=1, sinks=4, unit=False, heads=2, batch=1)
    for case in (Case.of(70, past=True, documents=True), Case.of(40, past=True, **window)):
        rounded = {name: x.to(dtype).double() for name, x in case.tensors().items()}
        check(replace(case, **rounded), dtype, EXACT[dtype])


@interpreted
def test_tiles_narrower_than_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of queries and keys are projected in a pass of their own."""
    tiling = launch.Launch.tiling
    monkeypatch.setattr(launch.Launch, "tiling", lambda *x: {**tiling(*x), "tile": 16})
    check(Case.of(70, past=True))
    check(Case.of(33, unit=False, inside="none"))


@interpreted
def test_rows_of_zeros_and_strides() -> None:
    """An empty slot has a finite gradient, and tensors may lie in memory as they like."""
    case = Case.of(40)
    case.q[:, :, 3] = 0
    case.k[:, :, 5:9] = 0
    check(case)
    around = {name: torch.randn(2, 40, 9, 50, dtype=torch.float64) for name in "qkv"}
    views = {
        name: around[name].transpose(1, 2)[:, : x.shape[1], :, 3 : 3 + x.shape[3]].copy_(x)
        for name, x in case.tensors().items() if name in "qkv"
    }  # fmt: skip
    assert torch.equal(replace(case, **views).scan(), case.scan())
    backwards = {name: x.mT.contiguous().mT for name, x in case.tensors().items() if name in "qkv"}
    assert torch.equal(replace(case, **backwards).scan(), case.scan())


@interpreted
def test_same_bits_twice(short_segments: None) -> None:
    runs = []
    for _ in range(2):
        case = Case.of(70, past=True).leaves(torch.float32)
        out = case.scan()
        runs.append([out, *gradients(case, out, torch.ones_like(out)).values()])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@interpreted
def test_the_future_leaves_the_past_alone() -> None:
    case = Case.of(50)
    before = case.scan()
    for x in (case.q, case.k, case.v):
        x[:, :, 31:] = 100.0
    assert torch.equal(case.scan()[:, :, :31], before[:, :, :31])


@interpreted
def test_operators_are_well_behaved(short_segments: None) -> None:
    """Schema, fake tensors and autograd registration, as torch checks them."""
    case = Case.of(20, batch=1, heads=2, kv_heads=1, past=True, documents=True).leaves()
    inputs = (*(getattr(case, name) for name in NAMES), case.start, 16, "relu2", True, True, True)
    torch.library.opcheck(torch.ops.linearized.scan.default, inputs)
    bare = (case.q, case.k, case.v, None, None, None, None, None, 16, "none", False, False, False)
    torch.library.opcheck(torch.ops.linearized.scan.default, bare)
    case = Case.of(20, batch=1, heads=2, kv_heads=1, documents=True, group=8).leaves()
    sinks = [torch.randn(1, 1, 3, 3, x.shape[3]).to(x).requires_grad_() for x in (case.k, case.v)]
    inputs = (case.q, case.k, case.v, *sinks, case.start, 8, 1, 3, "softmax")
    torch.library.opcheck(torch.ops.linearized.near.default, inputs)


@interpreted
def test_compiles_whole() -> None:
    case = Case.of(20, batch=1, past=True)
    plain, fast = case.leaves(), case.leaves()

    def run(*tensors: Tensor) -> Tensor:
        return replace(case, **dict(zip(NAMES, tensors, strict=True))).scan()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out = compiled(*fast.tensors().values())
    expected = plain.scan()
    assert torch.equal(out, expected)
    g = torch.ones_like(out)
    found, truth = gradients(fast, out, g), gradients(plain, expected, g)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@interpreted
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (dict(inside="laplace", group=16, features=24), "laplace"),
        (dict(inside="none", group=16, features=8), "8"),
        (dict(inside="relu2", group=16, features=24, causal=False), "both directions"),
    ],
)
def test_what_the_kernels_do_not_do(settings: dict, names: str) -> None:
    case = replace(Case.of(20), form=Form(**settings))
    with pytest.raises(ConfigError, match=names):
        case.scan()


@interpreted
def test_the_interpreter_cannot_multiply_bfloat16() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        Case.of(20).leaves(torch.bfloat16).scan()


@interpreted
def test_start_has_a_number_for_every_group() -> None:
    with pytest.raises(ConfigError, match="start"):
        replace(Case.of(20), start=torch.zeros(2, 3, dtype=torch.int64)).scan()


def state_of(k: Tensor, v: Tensor, lengths: list[int], *, near: Near, taps: int) -> GroupState:
    """The state after each row's first tokens, by definition."""
    state = GroupState.empty(
        len(k), heads=k.shape[1], features=k.shape[3], key_width=k.shape[3],
        value_width=v.shape[3], tail_width=v.shape[3], near=near, taps=taps, dtype=k.dtype,
        device=k.device,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        oldest = max(length // near.group - near.window, 0) * near.group
        far = slice(near.sinks, max(oldest, near.sinks))
        state.memory[row] = k[row, :, far].transpose(-1, -2) @ v[row, :, far]
        for p in range(length):
            if p < near.sinks or p >= oldest:
                slot = p if p < near.sinks else near.sinks + p % near.ring
                state.keys[row, :, slot], state.values[row, :, slot] = k[row, :, p], v[row, :, p]
        recent = v[row, :, max(length - taps + 1, 0) : length]
        state.tail[row, :, taps - 1 - recent.shape[1] :] = recent
        state.length[row] = length
    return state


def ancestry(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*ancestry(parents, parents[node]), node]


TREES = {
    "step": dict(nodes=1),
    "step over many heads": dict(nodes=1, heads=6, kv_heads=2, group=64),
    "step without taps": dict(nodes=1, taps=0),
    "step of a wide group": dict(nodes=1, group=256, width=72),
    "tree": dict(nodes=9),
    "tree without alpha": dict(nodes=9, alpha=False),
    "tree of values": dict(nodes=9, inside="none", across=False, group=1, width=0),
    "step of values": dict(nodes=1, inside="none", across=False, group=1, width=0),
    "local tree": dict(nodes=9, across=False),
    "tree of one tap": dict(nodes=9, taps=1),
    "global tree": dict(nodes=9, inside="none"),
    "linear tree": dict(nodes=9, inside="linear", group=1),
    "linear step": dict(nodes=1, inside="linear", group=1),
    "large tree": dict(nodes=70, heads=2, kv_heads=1, width=80, values=96, taps=20),
    "wide group": dict(nodes=20, group=72, lengths=[70, 5]),
    "step in a window": dict(nodes=1, window=1, sinks=4),
    "tree in a window": dict(nodes=9, window=1, sinks=4, lengths=[46, 15]),
    "tree with sinks": dict(nodes=9, group=8, sinks=8, lengths=[39, 2]),
    "local tree in a window": dict(nodes=9, window=2, across=False, lengths=[70, 3]),
    "softmax step": dict(nodes=1, inside="softmax", beside=40),
    "softmax step in a window": dict(nodes=1, inside="softmax", beside=40, window=1, sinks=4),
    "softmax tree": dict(nodes=9, inside="softmax", beside=40, lengths=[31, 2]),
    "softmax tree in a window": dict(
        nodes=34, inside="softmax", beside=40, window=1, sinks=4, lengths=[46, 0], group=8
    ),
    "softmax of features": dict(nodes=9, inside="softmax", window=1, taps=0),
    "features beside": dict(nodes=9, beside=10, sinks=1, lengths=[31, 47]),
}


@interpreted
@pytest.mark.parametrize("name", TREES)
def test_tree(name: str, poison: None) -> None:
    settings = dict(TREES[name])
    nodes, lengths = settings.pop("nodes"), settings.pop("lengths", [29, 16])
    check_tree(settings, nodes, lengths, torch.float64, 1e-11, "cpu")


def check_tree(
    settings: dict[str, Any],
    nodes: int,
    lengths: list[int],
    dtype: torch.dtype,
    within: float,
    device: str,
) -> None:
    """A node is given what its path would be, token by token, from the first."""
    past = max(lengths)
    case = Case.of(**settings | {"slots": past + nodes}, unit=False, device=device)
    case = replace(case, q=hat(case.q), k=hat(case.k))
    case = replace(case, **{name: x.to(dtype).double() for name, x in case.tensors().items()})
    generator = torch.Generator().manual_seed(3)
    parents = [
        [int(torch.randint(-1, max(n, 1), (), generator=generator)) if n % 3 else n - 1
         for n in range(nodes)]
        for _ in lengths
    ]  # fmt: skip
    num_taps = 1 if case.taps is None else case.taps.shape[1]
    near = case.form.near
    state = cast(state_of(case.k, case.v, lengths, near=near, taps=num_taps), dtype)
    state = replace(state, memory=state.memory[:, :, case.k.shape[3] - case.form.features :])
    tree = torch.tensor(parents, device=device)
    layout = Layout.of(ancestors(tree), state.length, near=near, taps=num_taps)
    q, k, v = (x[:, :, past:].to(dtype) for x in (case.q, case.k, case.v))
    out = kernels.attend_tree(
        q, k, v, layout, state, form=case.form, alpha=case.alpha, taps=case.taps
    )
    for row, length in enumerate(lengths):
        for node in range(0, nodes, 1 if nodes < 30 else 7):
            line = [*range(length), *(past + n for n in ancestry(parents[row], node))]
            path = replace(case, **{x: getattr(case, x)[row : row + 1, :, line] for x in "qkv"})
            assert distance(out[row, :, node], pairwise(path)[0, :, -1]) < within


def cast(state: GroupState, dtype: torch.dtype) -> GroupState:
    wide = {"memory": torch.promote_types(dtype, torch.float32), "length": torch.int64}
    tensors = state.tensors()
    return replace(state, **{name: x.to(wide.get(name, dtype)) for name, x in tensors.items()})


def amid(state: GroupState) -> tuple[GroupState, list[Tensor]]:
    """The same state as every second head of larger tensors, which are returned too."""
    tensors = state.tensors()
    length = tensors.pop("length")
    padded = {name: torch.full_like(torch.cat([x, x], dim=1), -1) for name, x in tensors.items()}
    for name, x in tensors.items():
        padded[name][:, 1::2] = x
    views = {name: x[:, 1::2] for name, x in padded.items()}
    return replace(state, **views, length=length), list(padded.values())


FOLDS = {
    "one token": dict(tokens=1, lengths=[3, 8]),
    "a token that closes": dict(tokens=1, lengths=[7, 15]),
    "some tokens": dict(tokens=5, lengths=[0, 6]),
    "several groups": dict(tokens=45, lengths=[3, 8]),
    "more than the tail": dict(tokens=12, lengths=[3, 2]),
    "groups of one": dict(tokens=5, lengths=[0, 4], near=Near(1)),
    "wide": dict(tokens=40, lengths=[0, 60], near=Near(64), width=80, values=40, taps=33),
    "no tail": dict(tokens=11, lengths=[1, 7], taps=1),
    "window": dict(tokens=5, lengths=[30, 5], near=Near(8, 1)),
    "sinks": dict(tokens=9, lengths=[2, 20], near=Near(8, 0, 3)),
    "a text's first groups": dict(tokens=25, lengths=[0, 6], near=Near(8, 2, 4)),
    "many tokens": dict(tokens=90, lengths=[1, 37], near=Near(8, 1, 8)),
    "a wide window": dict(tokens=40, lengths=[70, 39], near=Near(40, 1, 4), width=40),
}


@interpreted
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FOLDS)
def test_fold(name: str, masked: bool) -> None:
    settings = dict(near=Near(8), taps=5, width=6, values=10) | FOLDS[name]
    check_fold(settings, masked, torch.float64, 1e-12, "cpu")


def check_fold(
    settings: dict[str, Any], masked: bool, dtype: torch.dtype, within: float, device: str
) -> None:
    """The state after all tokens is the state after some, and the rest folded in."""
    tokens, lengths, width = settings["tokens"], settings["lengths"], settings["width"]
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, tokens, generator=generator) < 0.6 if masked else None
    kept = [tokens] * 2 if mask is None else mask.sum(1).tolist()

    def normal(columns: int) -> Tensor:
        x = torch.randn(2, 3, 200, columns, generator=generator, dtype=torch.float64)
        return x.to(dtype).double().to(device)

    k, v = normal(width), normal(settings["values"])
    shape = dict(near=settings["near"], taps=settings["taps"])
    state, padded = amid(cast(state_of(k, v, lengths, **shape), dtype))
    after = [length + count for length, count in zip(lengths, kept, strict=True)]
    new_k, new_v = torch.full_like(k[:, :, :tokens], 7.0), torch.full_like(v[:, :, :tokens], 7.0)
    for row in range(2):
        places = slice(None) if mask is None else mask[row]
        new_k[row, :, places] = k[row, :, lengths[row] : after[row]]
        new_v[row, :, places] = v[row, :, lengths[row] : after[row]]
    mask = None if mask is None else mask.to(device)
    kernels.fold_(state, new_k.to(dtype), new_v.to(dtype), mask)
    expected = state_of(k, v, after, **shape)
    for field, tensor in state.tensors().items():
        assert distance(tensor, getattr(expected, field)) < within, field
    assert all(bool((x[:, ::2] == -1).all()) for x in padded)  # what is around is as it was


@interpreted
def test_features_are_the_last_columns() -> None:
    """Keys may have columns for inside the group alone, values such as are not convolved."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, 40, 12, generator=generator, dtype=torch.float64) for _ in "kv")
    full = state_of(k, v, [5, 0], near=Near(8), taps=4)
    state = replace(full, memory=full.memory[:, :, 7:].clone(), tail=full.tail[..., 3:].clone())
    new_k, new_v = k.clone(), v.clone()
    for row, length in enumerate([5, 0]):
        new_k[row, :, : 20 - length] = k[row, :, length:20]
        new_v[row, :, : 20 - length] = v[row, :, length:20]
    kept = torch.arange(20) < torch.tensor([[15], [20]])
    kernels.fold_(state, new_k[:, :, :20], new_v[:, :, :20], kept)
    expected = state_of(k, v, [20, 20], near=Near(8), taps=4)
    assert distance(state.memory, expected.memory[:, :, 7:]) < 1e-12
    assert distance(state.tail, expected.tail[..., 3:]) == 0
    assert distance(state.keys, expected.keys) == 0


REAL = {
    "llama": dict(slots=1000, group=64, width=128, values=128, heads=8, kv_heads=2, taps=32),
    "small heads": dict(slots=777, group=64, width=64, values=64, taps=32),
    "wide heads": dict(slots=300, group=64, width=256, values=256, taps=32),
    "odd heads": dict(slots=500, group=48, width=80, values=96, taps=20),
    "wide groups": dict(slots=700, group=256, width=128, values=128, taps=32),
    "narrow groups": dict(slots=500, group=16, width=128, values=128, taps=32, documents=True),
    "documents": dict(slots=1000, group=64, width=128, values=128, taps=32, documents=True),
    "linear": dict(slots=500, group=1, inside="linear", width=64, values=64, taps=32),
    "window": dict(slots=500, group=64, width=128, values=128, taps=32, window=1, sinks=4),
    "window of documents": dict(
        slots=500, group=16, width=64, values=64, taps=32, window=1, sinks=4, documents=True
    ),
    "hedgehog": dict(
        slots=500,
        group=64,
        width=64,
        beside=128,
        values=65,
        taps=0,
        inside="softmax",
        window=1,
        sinks=4,
        unit=False,
    ),
    "convolution": dict(slots=500, group=1, inside="none", across=False, width=64, values=64),
    "long": dict(slots=9000, group=64, width=64, values=64, taps=32, batch=1, heads=2, kv_heads=1),
}


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", REAL)
def test_scan_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    case = Case.of(**REAL[name], past=True, device="cuda")
    if name == "hedgehog":  # of large scores alone the largest would matter, and its rounding
        case = replace(case, q=case.q / 8)
    rounded = {name: x.to(dtype).double() for name, x in case.tensors().items()}
    check(replace(case, **rounded), dtype, EXACT[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "narrow groups", "wide groups", "window", "hedgehog"])
def test_same_bits_twice_on_a_gpu(name: str) -> None:
    runs = []
    for _ in range(2):
        case = Case.of(**REAL[name], past=True, device="cuda").leaves(torch.bfloat16)
        out = case.scan()
        runs.append([out, *gradients(case, out, torch.ones_like(out)).values()])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nodes", [1, 4, 33, 128])
@pytest.mark.parametrize(
    "shape",
    ["llama", "small heads", "wide heads", "odd heads", "wide groups", "window", "hedgehog"],
)
def test_tree_on_a_gpu(shape: str, nodes: int, dtype: torch.dtype) -> None:
    check_tree(REAL[shape] | {"slots": 300}, nodes, [170, 127], dtype, EXACT[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_fold_on_a_gpu(tokens: int, masked: bool) -> None:
    near = Near(64, 1, 4)
    settings = dict(near=near, taps=32, width=128, values=128, tokens=tokens, lengths=[3, 127])
    check_fold(settings, masked, torch.bfloat16, 5e-3, "cuda")


COMPILED = {
    "documents": ("bfloat16", 90, dict(width=128, values=128, group=16, repeats=4, past=True)),
    "window": ("bfloat16", 80, dict(width=64, values=64, window=1, sinks=4, past=True)),
}
HEDGEHOG = dict(window=1, sinks=4, inside="softmax", repeats=2, past=True)
COMPILED_SLOWLY = {
    f"{dtype} {width} for {capability}": (dtype, capability, dict(width=width, values=width))
    for dtype in ("bfloat16", "float16", "float32")
    for width in (64, 128, 256)
    for capability in (80, 90)
} | {
    "wide groups": ("bfloat16", 90, dict(width=128, values=128, group=256)),
    "odd": ("bfloat16", 90, dict(width=80, values=96, group=48)),
    "linear": ("bfloat16", 90, dict(width=64, values=64, inside="linear")),
    "hedgehog": ("float32", 80, HEDGEHOG | dict(width=64, values=65, beside=128)),
    "wide hedgehog": ("float32", 90, HEDGEHOG | dict(width=128, values=129, beside=256)),
    "wide window": ("bfloat16", 90, dict(width=256, values=256, window=1, sinks=4)),
}
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have."""


@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compile(name: str) -> None:
    compile_all(*COMPILED[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", COMPILED_SLOWLY)
def test_every_kernel_compiles(name: str) -> None:
    compile_all(*COMPILED_SLOWLY[name])


def compile_all(dtype: str, capability: int, settings: dict[str, Any]) -> None:
    """In a process of its own, where nothing is interpreted: no GPU is needed to compile."""
    script = Path(__file__).with_name("compiled.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(linearized.__file__).parents[1])  # those tested here
    done = subprocess.run(
        [sys.executable, str(script), dtype, str(capability), json.dumps(settings)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout)
    walk = {"outputs", "query_gradients", "key_gradients", "value_gradients", "sum_lags"}
    near = {"near_outputs", "near_query_gradients", "near_key_gradients"}
    names = near if "window" in settings else walk
    assert names | {"many", "close", "append"} <= {kernel["name"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
