"""The operator through its public functions with the Triton backend, on a GPU; the same functions
run interpreted on a CPU, in small sizes.

The truth is the reference in float64 on the CPU, and for long texts the chunked backend in float64
there, which other tests hold to the reference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    # Triton decides as a kernel is defined, and linearized defines its kernels on first use.
    os.environ["TRITON_INTERPRET"] = "1"

from linearized import ops  # noqa: E402
from linearized.state import GroupState  # noqa: E402

if CUDA:
    torch.set_num_threads(os.cpu_count() or 1)  # for the truth, worked out on the CPU
else:
    ops.choose("triton")
    del os.environ["TRITON_INTERPRET"]

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are compiled here")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")],
    ),
]
EXACT = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative distance by norm."""
SHAPES = {
    "llama": dict(heads=8, kv_heads=2, width=128, values=128, group=64, taps=32),
    "one head": dict(heads=1, kv_heads=1, width=64, values=64, group=64, taps=32, batch=1),
    "wide heads": dict(heads=2, kv_heads=1, width=256, values=256, group=64, taps=32),
    "odd heads": dict(heads=4, kv_heads=2, width=80, values=96, group=48, taps=20),
    "narrow groups": dict(heads=4, kv_heads=4, width=64, values=64, group=16, taps=5),
    "wide groups": dict(heads=4, kv_heads=1, width=64, values=64, group=256, taps=32),
    "local": dict(heads=4, kv_heads=2, width=64, values=64, group=64, taps=32, alpha=False),
    "without taps": dict(heads=4, kv_heads=2, width=64, values=64, group=64, taps=0),
}
SMALL = dict(heads=2, kv_heads=1, width=24, values=20, group=16, taps=5)


def types(device: str) -> list[torch.dtype]:
    """The interpreter cannot multiply bfloat16, and is slow."""
    if device == "cuda":
        return [torch.float32, torch.float16, torch.bfloat16]
    return [torch.float32]


def per_type(device: str) -> list:
    marks = DEVICES[device == "cuda"].marks
    return [
        pytest.param(device, dtype, marks=marks, id=f"{device}-{dtype}".replace("torch.", ""))
        for dtype in types(device)
    ]


def shapes() -> list:
    """Every shape in bfloat16 on a GPU, two of them in every type: kernels take long to compile."""
    marks = DEVICES[1].marks
    return [
        pytest.param("cuda", dtype, name, marks=marks, id=f"{name}-{dtype}".replace("torch.", ""))
        for dtype in types("cuda")
        for name in SHAPES
        if dtype == torch.bfloat16 or name in ("llama", "odd heads")
    ]


EVERYWHERE = [*per_type("cpu"), *per_type("cuda")]


@dataclass
class Inputs:
    """Random inputs in float64 on the CPU, whose values the dtype can hold."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    taps: Tensor | None
    group: int

    @classmethod
    def of(
        cls,
        tokens: int,
        dtype: torch.dtype,
        *,
        heads: int,
        kv_heads: int,
        width: int,
        values: int,
        group: int,
        taps: int,
        alpha: bool = True,
        batch: int = 2,
        seed: int = 0,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

        return cls(
            q=normal(batch, heads, tokens, width),
            k=normal(batch, kv_heads, tokens, width),
            v=normal(batch, kv_heads, tokens, values),
            alpha=normal(heads) if alpha else None,
            taps=normal(heads, taps) if taps else None,
            group=group,
        )

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        moved = {name: x.to(device, dtype) for name, x in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("q", "k", "v", "alpha", "taps")}
        return {name: x for name, x in found.items() if x is not None}

    def part(self, start: int, stop: int) -> Inputs:
        return replace(self, **{name: getattr(self, name)[:, :, start:stop] for name in "qkv"})

    def mix(self, backend: str, **where: Tensor) -> Tensor:
        return ops.mix(
            self.q, self.k, self.v, alpha=self.alpha, taps=self.taps, group=self.group,
            backend=backend, **where,
        )  # fmt: skip

    def state(self, length: int) -> GroupState:
        """After the first tokens, by the reference."""
        past = self.part(0, length)
        return ops.attend(
            past.q, past.k, past.v, alpha=self.alpha, taps=self.taps, group=self.group,
            backend="reference",
        )[1]  # fmt: skip

    def tree(self, parents: Tensor, state: GroupState, backend: str) -> Tensor:
        return ops.attend_tree(
            self.q, self.k, self.v, parents, state, alpha=self.alpha, taps=self.taps,
            group=self.group, backend=backend,
        )  # fmt: skip


def outputs_and_gradients(inputs: Inputs, backend: str, **where: Tensor) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors().items()}
    out = replace(inputs, **leaves).mix(backend, **where)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(
        out, list(leaves.values()), grad.to(out.device, out.dtype), allow_unused=True
    )
    zeros = [torch.zeros_like(x) if g is None else g
             for x, g in zip(leaves.values(), found, strict=True)]  # fmt: skip
    return {"out": out.detach(), **dict(zip(leaves, zeros, strict=True))}


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, by norm."""
    assert found.shape == truth.shape
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_close(found: dict[str, Tensor], truth: dict[str, Tensor], within: float) -> None:
    far = {name: distance(found[name], truth[name]) for name in truth}
    assert all(value <= within for value in far.values()), far


def cast(state: GroupState, device: str, dtype: torch.dtype) -> GroupState:
    """A copy."""
    kinds = {"memory": torch.promote_types(dtype, torch.float32), "length": torch.int64}
    return replace(state, **{
        name: x.to(device, kinds.get(name, dtype), copy=True)
        for name, x in state.tensors().items()
    })  # fmt: skip


def check_sequence(
    device: str, dtype: torch.dtype, tokens: int, shape: dict, truth: str = "reference"
) -> None:
    """Outputs and all gradients."""
    inputs = Inputs.of(tokens, dtype, **shape)
    wanted = outputs_and_gradients(inputs, truth)
    found = outputs_and_gradients(inputs.to(device, dtype), "triton")
    assert found["out"].dtype == dtype
    assert_close(found, wanted, EXACT[dtype])


def random_tree(rows: int, nodes: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.tensor([
        [int(torch.randint(-1, n, (), generator=generator)) if n % 3 else n - 1
         for n in range(nodes)]
        for _ in range(rows)
    ])  # fmt: skip


def tree_case(
    dtype: torch.dtype, nodes: int, length: int, shape: dict
) -> tuple[Inputs, Tensor, GroupState]:
    inputs = Inputs.of(length + nodes, dtype, **shape)
    state = inputs.state(length)
    state = cast(cast(state, "cpu", dtype), "cpu", torch.float64)  # what the dtype can hold
    return inputs.part(length, length + nodes), random_tree(len(inputs.q), nodes), state


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("tokens", [1, 17, 33])
def test_forward_and_gradients_of_short_texts(device: str, dtype: torch.dtype, tokens: int) -> None:
    check_sequence(device, dtype, tokens, SMALL)


@pytest.mark.parametrize(("device", "dtype", "shape"), shapes())
@pytest.mark.parametrize("tokens", [1, 31, 63, 64, 65, 127, 200, 1000])
def test_forward_and_gradients(device: str, dtype: torch.dtype, shape: str, tokens: int) -> None:
    check_sequence(device, dtype, tokens, SHAPES[shape])


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
def test_long_texts(device: str, dtype: torch.dtype) -> None:
    shape = SHAPES["one head"] if device == "cuda" else SMALL | {"batch": 1}
    check_sequence(device, dtype, 65_536 if device == "cuda" else 150, shape, truth="cpu")


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("how", ["mask", "segments"])
def test_padding_and_documents(device: str, dtype: torch.dtype, how: str) -> None:
    shape = SHAPES["llama"] if device == "cuda" else SMALL
    tokens = 500 if device == "cuda" else 50
    inputs = Inputs.of(tokens, dtype, **shape)
    place = torch.arange(tokens).expand(2, -1)
    first = torch.tensor([[tokens // 7], [tokens // 2]])
    given = {how: place >= first if how == "mask" else (place >= first).long() + place // 33}
    wanted = outputs_and_gradients(inputs, "reference", **given)
    there = {how: given[how].to(device)}
    found = outputs_and_gradients(inputs.to(device, dtype), "triton", **there)
    assert_close(found, wanted, EXACT[dtype])


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
def test_a_text_goes_on_from_a_state(device: str, dtype: torch.dtype) -> None:
    shape = SHAPES["llama"] if device == "cuda" else SMALL
    length, tokens = (200, 300) if device == "cuda" else (21, 40)
    inputs = Inputs.of(tokens, dtype, **shape)
    state = cast(cast(inputs.state(length), "cpu", dtype), "cpu", torch.float64)
    rest = inputs.part(length, tokens)
    with torch.no_grad():
        wanted = rest.mix("reference", state=state)
        found = rest.to(device, dtype).mix("triton", state=cast(state, device, dtype))
    assert distance(found, wanted) <= EXACT[dtype]


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
def test_convolution_alone(device: str, dtype: torch.dtype) -> None:
    shape = SHAPES["llama"] if device == "cuda" else SMALL
    inputs = Inputs.of(300 if device == "cuda" else 40, dtype, **shape)
    there = inputs.to(device, dtype)
    wanted = ops.convolve(inputs.v, inputs.taps, backend="reference")
    found = ops.convolve(there.v, there.taps, backend="triton")
    assert distance(found, wanted) <= EXACT[dtype]


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("nodes", [1, 9])
@pytest.mark.parametrize("length", [3, 29])
def test_small_trees(device: str, dtype: torch.dtype, nodes: int, length: int) -> None:
    check_tree(device, dtype, nodes, length, SMALL)


@pytest.mark.parametrize(("device", "dtype", "shape"), shapes())
@pytest.mark.parametrize("nodes", [1, 16, 33, 128])
@pytest.mark.parametrize("length", [63, 170])
def test_trees(device: str, dtype: torch.dtype, shape: str, nodes: int, length: int) -> None:
    check_tree(device, dtype, nodes, length, SHAPES[shape])


def check_tree(device: str, dtype: torch.dtype, nodes: int, length: int, shape: dict) -> None:
    inputs, parents, state = tree_case(dtype, nodes, length, shape)
    wanted = inputs.tree(parents, state, "reference")
    there = inputs.to(device, dtype)
    found = there.tree(parents.to(device), cast(state, device, dtype), "triton")
    assert distance(found, wanted) <= EXACT[dtype]


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 45])
def test_folding(device: str, dtype: torch.dtype, tokens: int, masked: bool) -> None:
    shape = SHAPES["llama"] if device == "cuda" else SMALL
    length = 3 * shape["group"] // 2
    inputs, _, state = tree_case(dtype, tokens, length, shape)
    mask = None
    if masked:
        mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    there = cast(state, device, dtype)
    ops.fold_(state, inputs.k, inputs.v, mask, backend="reference")
    new = inputs.to(device, dtype)
    ops.fold_(there, new.k, new.v, None if mask is None else mask.to(device), backend="triton")
    assert torch.equal(there.length.cpu(), state.length)
    tensors = {name: x for name, x in state.tensors().items() if name != "length"}
    assert_close(there.tensors(), tensors, EXACT[dtype])


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
def test_same_bits_twice(device: str, dtype: torch.dtype) -> None:
    shape = SHAPES["llama"] if device == "cuda" else SMALL
    tokens, length = (5000, 170) if device == "cuda" else (50, 29)
    inputs = Inputs.of(tokens, dtype, **shape).to(device, dtype)
    one, two = (outputs_and_gradients(inputs, "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    nodes, parents, state = tree_case(dtype, 33 if device == "cuda" else 9, length, shape)
    nodes, parents = nodes.to(device, dtype), parents.to(device)
    states = [cast(state, device, dtype) for _ in range(2)]
    assert torch.equal(*(nodes.tree(parents, each, "triton") for each in states))
    for each in states:
        ops.fold_(each, nodes.k, nodes.v, backend="triton")
    for first, second in zip(*(each.tensors().values() for each in states), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("device", "dtype"), EVERYWHERE)
def test_rows_that_lie_far_apart(device: str, dtype: torch.dtype) -> None:
    """Offsets into the tensors do not fit 32 bits. On the CPU they do, and the rows only lie
    apart."""
    apart = 2**31 + 64 if device == "cuda" else 4096
    if device == "cuda":
        room = torch.cuda.mem_get_info()[0]
        if room < 4 * apart * dtype.itemsize:
            pytest.skip(f"needs {4 * apart * dtype.itemsize / 2**30:.0f} GiB of free memory")
    shape = SHAPES["narrow groups"] | {"heads": 2, "kv_heads": 2} if device == "cuda" else SMALL
    inputs = Inputs.of(130 if device == "cuda" else 50, dtype, **shape)

    def far(x: Tensor) -> Tensor:
        """The same values, each row of the batch `apart` elements behind the one before."""
        storage = torch.empty(apart + x[0].numel(), device=device, dtype=x.dtype)
        strides = torch.empty(x[0].shape, device="meta").stride()
        return storage.as_strided(x.shape, (apart, *strides)).copy_(x)

    wanted = outputs_and_gradients(inputs, "reference")
    there = inputs.to(device, dtype)
    spread = replace(there, **{name: far(getattr(there, name)) for name in "qkv"})
    assert_close(outputs_and_gradients(spread, "triton"), wanted, EXACT[dtype])
    del spread
    nodes, parents, state = tree_case(dtype, 9, 29, shape)
    truth = nodes.tree(parents, state, "reference")
    nodes, past = nodes.to(device, dtype), cast(state, device, dtype)
    spread = {n: x.clone() if n == "length" else far(x) for n, x in past.tensors().items()}
    rows = replace(past, **spread)
    assert distance(nodes.tree(parents.to(device), rows, "triton"), truth) <= EXACT[dtype]
    ops.fold_(rows, nodes.k, nodes.v, backend="triton")
    ops.fold_(past, nodes.k, nodes.v, backend="triton")
    assert_close(rows.tensors(), past.tensors(), 1e-6)


@pytest.mark.parametrize(("device", "dtype"), per_type("cuda"))
def test_outputs_of_more_elements_than_32_bits_count(device: str, dtype: torch.dtype) -> None:
    """The last row of a batch whose outputs, too, lie beyond 2^31 elements."""
    batch, tokens = 17, 65_536
    size = batch * 32 * tokens * 64 * dtype.itemsize
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip(f"needs {7 * size / 2**30:.0f} GiB of free memory")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    q, k, v = (normal(batch, 32, tokens, 64) for _ in range(3))
    inputs = Inputs(q, k, v, normal(32), normal(32, 32), group=64)
    with torch.no_grad():
        out = inputs.mix("triton")
        last = replace(inputs, **{name: getattr(inputs, name)[-1:].clone() for name in "qkv"})
        alone = last.mix("triton")
    assert distance(out[-1:, :, -1000:], alone[:, :, -1000:]) <= 1e-3
