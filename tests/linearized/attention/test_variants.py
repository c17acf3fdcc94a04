"""Every variant against its definition in plain loops, and its own laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linearized import ops
from linearized.attention import VARIANTS, CrossAttention, Place
from linearized.attention.base import LinearAttention
from linearized.attention.yoso import _slope
from linearized.config import ATTENTIONS, LinearConfig
from linearized.errors import ConfigError
from linearized.tree import ancestors

GROUP, TAPS, WIDTH, VALUES = 8, 5, 6, 4
WINDOWED = ["grouped, windowed", "hedgehog, windowed", "local, windowed"]
"""With groups of 3, a window of 1 group, 2 sinks, and a bound."""
CAUSAL = [*ATTENTIONS, *WINDOWED]
KINDS = [
    (name, kind)
    for name in CAUSAL
    for kind in ("causal", "bidirectional", "cross")
    if kind != "bidirectional" or name not in WINDOWED
]
# Along random directions in seconds; each entry of the Jacobian in minutes.
FAST = [True, pytest.param(False, marks=pytest.mark.slow)]


def module(
    attention: str, kind: str = "causal", *, augment: bool = True, seed: int = 0, **settings: Any
) -> LinearAttention:
    """Of 4 query and 2 key/value heads, with random parameters, float64."""
    windowed = attention in WINDOWED
    attention = attention.split(",")[0]
    if windowed:
        settings = {"group": 3, "window": 1, "sinks": 2, **settings}
        settings["bound"] = 4.0 if attention == "hedgehog" else None
    config = LinearConfig(
        attention=attention, augment=augment, taps=TAPS,
        **{"group": GROUP, "features": 10, "hashes": 6, "bits": 3, "period": 7, **settings},
    )  # fmt: skip
    place = Place(
        layer=1, heads=4, kv_heads=2, width=WIDTH, value_width=VALUES, kind=kind,
        dtype=torch.float64,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = VARIANTS[attention](config, place)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def inputs(tokens: int, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        normal(batch, 4, tokens, WIDTH),
        normal(batch, 2, tokens, WIDTH),
        normal(batch, 2, tokens, VALUES),
    )


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * max(float(b.detach().norm()), 1.0)


def definition(m: LinearAttention, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`VARIANTS.md`, one query at a time, for each kind of attention."""
    kind, scaling = m.place.kind, WIDTH**-0.5
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    out = torch.zeros(batch, heads, num_queries, VALUES, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(num_queries):
                seen = range(t + 1) if kind == "causal" else range(num_keys)
                keys, values = k[b, h // 2], v[b, h // 2]
                out[b, h, t] = answer(m, name, q[b, h, t], keys, values, h, t, seen, scaling)
                if m.taps is not None:
                    middle = 0 if kind == "causal" else TAPS - 1
                    for column, weight in enumerate(m.taps[h]):
                        j = t - (column - middle)
                        if 0 <= j < num_keys and j in seen:
                            out[b, h, t] += weight * values[j]
    return out


def answer(m, name, q, keys, values, h, t, seen, scaling) -> Tensor:
    cross, windowed = m.place.kind == "cross", name in WINDOWED
    name, group = name.split(",")[0], 3 if windowed else GROUP
    window, sinks = (1, 2) if windowed else (0, 0)
    near = [j for j in seen if j // group == t // group and not cross]
    if windowed and not cross:
        near = [j for j in seen if t // group - j // group <= window or j < sinks]
    far = [j for j in seen if j not in near]
    unit = ops.unit
    if name in ("local", "grouped", "global"):
        total = torch.zeros(VALUES, dtype=torch.float64)
        if name != "global" and not cross:
            for j in near:
                total += torch.relu(unit(q) @ unit(keys[j])) ** 2 * values[j]
        if name != "local" or cross:
            reach = seen if name == "global" and m.place.kind == "bidirectional" else far
            scale = 1 if m.alpha is None else m.alpha[h]
            for j in reach:
                total += scale * (unit(q) @ unit(keys[j])) * values[j]
        return total
    if name == "linformer":
        projected = m.projection.t()
        big_k = sum(torch.outer(projected[j % 7], keys[j]) for j in seen)
        big_v = sum(torch.outer(projected[j % 7], values[j]) for j in seen)
        return (scaling * (big_k @ q)).softmax(0) @ big_v
    if name == "hedgehog":
        features = lambda x, w: torch.cat([(x @ w).softmax(0), (-x @ w).softmax(0)])  # noqa: E731
        weights = torch.zeros(len(keys), dtype=torch.float64)
        if near:
            scores = torch.stack([scaling * q @ keys[j] for j in near])
            weights[near] = (scores - scores.max()).exp()
        for j in far:
            pair = features(q, m.query_map[h]) @ features(keys[j], m.key_map[h // 2])
            weights[j] = m.log_alpha[h].exp() * pair
            if windowed and not cross:
                weights[j] *= min(1, m.log_bound[h].exp() / len(far))
        return weights @ values / weights.sum()
    weights = torch.zeros(len(keys), dtype=torch.float64)
    for j in seen:
        x, y = q, keys[j]
        if name == "relu":
            weights[j] = (x.relu() + 1e-3) @ (y.relu() + 1e-3)
        elif name == "transnormer":
            elu = torch.nn.functional.elu
            weights[j] = (1 + elu(x)) @ (1 + elu(y))
        elif name == "rfa":
            turn = m.omega @ (unit(x) - unit(y))
            weights[j] = turn.cos().mean()
        elif name == "performer":
            x, y = x * scaling**0.5, y * scaling**0.5
            weights[j] = (m.omega @ (x + y) - (x @ x + y @ y) / 2).exp().mean()
        elif name == "yoso":
            sides = torch.einsum("hbd,xd->xhb", m.planes, torch.stack([x, y])) > 0
            weights[j] = (sides[0] == sides[1]).all(-1).double().mean()
    total = weights @ values
    if name == "transnormer":
        return m.gain[h] * total * (total.square().mean() + 1e-6).rsqrt()
    least = {"relu": 1e-6, "rfa": math.exp(-2), "performer": 0.0, "yoso": 1 / 6}[name]
    return total / weights.sum().clamp(min=least)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("name,kind", [(name, kind) for name, kind in KINDS if kind != "cross"])
@torch.no_grad()
def test_it_is_what_its_page_says(name, kind, augment):
    made = module(name, kind, augment=augment)
    q, k, v = inputs(21)
    assert_close(made(q, k, v)[0], definition(made, name, q, k, v))


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_cross_attention_takes_any_lengths(name):
    made = module(name, "cross")
    assert made.taps is None
    cross = CrossAttention(made)
    q, _, _ = inputs(5)
    _, k, v = inputs(21, seed=2)
    out, memory = cross(q, k, v)
    assert_close(out, definition(made, name, q, k, v))
    again, _ = cross(q, torch.full_like(k, torch.nan), v, memory=memory)
    assert torch.equal(out, again)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, 9:] = False
    masked, _ = cross(q, k, v, mask=mask)
    alone, _ = cross(q[:1], k[:1, :, :9], v[:1, :, :9])
    assert_close(masked[:1], alone)
    assert_close(masked[1:], out[1:])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_prefill_is_chunks_is_a_chain_of_nodes(name, backend):
    made = module(name)
    made.backend = backend
    q, k, v = inputs(29)
    whole, _, _ = made(q, k, v)
    for size in (1, 6, 17):
        state = made.empty_state(2, dtype=torch.float64, device=torch.device("cpu"))
        for start in range(0, 29, size):
            part = slice(start, start + size)
            args = q[:, :, part], k[:, :, part], v[:, :, part]
            out, keys, values = made(*args, state=state)
            assert_close(out, whole[:, :, part])
            chain = torch.arange(-1, out.shape[2] - 1).expand(2, -1)
            visible = ancestors(chain)
            layout = ops.Layout.of(visible, state.length, near=state.near, taps=state.taps)
            assert_close(made(*args, state=state, layout=layout)[0], whole[:, :, part])
            ops.fold_(state, keys, values, backend=backend)


@pytest.mark.parametrize("name,kind", [(name, kind) for name, kind in KINDS if kind != "cross"])
def test_each_document_of_a_row_is_as_alone(name, kind):
    """With padding between and around them, outputs and gradients."""
    made = module(name, kind)
    q, k, v = (x.requires_grad_() for x in inputs(60))
    segments = torch.tensor([[0] * 9 + [1] * 33 + [2] * 18, [3] * 41 + [0] * 19])
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, :4] = mask[0, 9:11] = mask[0, 20:23] = mask[1, 55:] = False
    packed, _, _ = made(q, k, v, segments=segments, mask=mask)
    grad = torch.randn_like(packed)
    together = torch.autograd.grad(packed, (q, k, v), grad, allow_unused=True)
    assert torch.equal(packed * ~mask[:, None, :, None], torch.zeros_like(packed))
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 0)):
        kept = (segments[row] == number) & mask[row]
        parts = [x[row : row + 1, :, kept].detach().requires_grad_() for x in (q, k, v)]
        alone, _, _ = made(*parts)
        assert_close(packed[row : row + 1, :, kept], alone)
        own = grad[row : row + 1, :, kept]
        apart = torch.autograd.grad(alone, parts, own, allow_unused=True)
        for one, all_of_them in zip(apart, together, strict=True):
            if one is not None:
                assert_close(all_of_them[row : row + 1, :, kept], one)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_leaves_the_past_alone(name):
    made = module(name)
    q, k, v = inputs(40)
    before, _, _ = made(q, k, v)
    for x in (q, k, v):
        x[:, :, 25:] = torch.randn_like(x[:, :, 25:]) * 10
    after, _, _ = made(q, k, v)
    assert torch.equal(before[:, :, :25], after[:, :, :25])
    assert not torch.allclose(before[:, :, 25:], after[:, :, 25:])


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("name,kind", [(name, kind) for name, kind in KINDS if name != "yoso"])
def test_gradients(name, kind, fast):
    made = module(name, kind)
    cross = CrossAttention(made)
    parameters = list(made.parameters())
    given = [x.requires_grad_() for x in inputs(10, batch=1)]

    def call(*values: Tensor) -> Tensor:
        return cross(*values[:3])[0] if kind == "cross" else made(*values[:3])[0]

    assert torch.autograd.gradcheck(call, (*given, *parameters), nondet_tol=0.0, fast_mode=fast)


def test_gradients_of_yoso_are_those_of_the_expected_weights():
    made = module("yoso", augment=False)
    q, k, v = (x.requires_grad_() for x in inputs(300, batch=1))  # more than one block
    values = torch.nn.functional.pad(v, (1, 0), value=1.0).detach()
    grad = torch.randn(1, 4, 300, VALUES + 1, dtype=torch.float64)
    zero = torch.zeros_like(grad)
    got = torch.autograd.grad(made.with_gradient(zero, q, k, values), (q, k), grad)
    cosine = ops.unit(q) @ ops.unit(k).repeat_interleave(2, dim=1).transpose(-1, -2)
    weights = (1 - cosine.arccos() / torch.pi) ** 3
    sums = weights.tril() @ values.repeat_interleave(2, dim=1)
    for one, want in zip(got, torch.autograd.grad(sums, (q, k), grad), strict=True):
        assert_close(one, want, 1e-2)  # but for the bounded slope next to ±1
    out, _, _ = made(q, k, v)
    out.square().sum().backward()
    assert all(x.grad is not None and x.grad.norm() > 0 for x in (q, k, v))


def test_the_slope_of_yoso():
    x = torch.linspace(-0.99, 0.99, 50, dtype=torch.float64).requires_grad_()
    ((1 - x.arccos() / torch.pi) ** 4).sum().backward()
    assert torch.allclose(_slope(x.detach(), 4), x.grad)
    assert torch.isfinite(_slope(torch.tensor([-1.0, 1.0]), 4)).all()


@torch.no_grad()
def test_random_features_approach_what_they_stand_for():
    """More of them, closer: performer to softmax, rfa to its Gaussian kernel, yoso to the power of
    the angle."""
    q, k, v = inputs(30, seed=3)
    q, k = q / 2, k / 2  # the variance of performer's features is exponential in the norms
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    softmax = torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True)
    cosine = ops.unit(q) @ ops.unit(keys).transpose(-1, -2)

    def averaged(weights: Tensor) -> Tensor:
        weights = weights.tril()
        return weights @ values / weights.sum(-1, keepdim=True)

    wants = {
        "performer": softmax,
        "rfa": averaged((cosine - 1).exp()),
        "yoso": averaged((1 - cosine.arccos() / torch.pi) ** 2),
    }
    for name, want in wants.items():
        errors = [
            float((module(name, augment=False, **size)(q, k, v)[0] - want).norm() / want.norm())
            for size in (
                {"features": 16, "hashes": 16, "bits": 2},
                {"features": 4096, "hashes": 4096, "bits": 2},
            )
        ]
        assert errors[1] < errors[0] / 3, name
        assert errors[1] < 0.2, name


def test_random_numbers_come_from_the_seed_and_the_layer():
    def drawn(name: str, seed: int, layer: int) -> Tensor:
        torch.manual_seed(layer + 10 * seed)  # must not matter
        config = LinearConfig(attention=name, seed=seed)
        place = Place(layer=layer, heads=2, kv_heads=2, width=8, value_width=8)
        made = VARIANTS[name](config, place)
        return next(iter(made.buffers()), None) if name != "linformer" else made.projection

    for name in ("performer", "rfa", "yoso", "linformer"):
        assert torch.equal(drawn(name, 1, 0), drawn(name, 1, 0))
        assert not torch.equal(drawn(name, 1, 0), drawn(name, 2, 0))
        assert not torch.equal(drawn(name, 1, 0), drawn(name, 1, 1))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "yoso"])
@torch.no_grad()
def test_lower_precision(name, dtype, tolerance):
    """Outputs in the model's type, sums in float32. (A hash of YOSO changes by a whole step.)"""
    made = module(name)
    q, k, v = (x.to(torch.bfloat16).double() for x in inputs(150))
    want, _, _ = made(q, k, v)
    out, _, _ = made.to(dtype)(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    assert_close(out.double(), want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name,kind", KINDS)
def test_autocast(name, kind, dtype):
    """Weights of any type, sums in float32, outputs and gradients of each tensor's own type."""
    made = module(name, kind).to(dtype)
    attention = CrossAttention(made) if kind == "cross" else made
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in inputs(20))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)[0]
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    wide = module(name, kind).to(dtype).float()
    attention = CrossAttention(wide) if kind == "cross" else wide
    want = attention(q.float(), k.float(), v.float())[0]
    assert_close(out.double(), want.double(), 4e-3)
    for x in (v, *(p for p in made.parameters() if p.requires_grad)):
        assert x.grad is not None and x.grad.dtype == x.dtype and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_decoding_inside_autocast(name):
    """The state stays in the model's type, whatever it is folded."""
    made = module(name).to(torch.bfloat16)
    q, k, v = (x.to(torch.bfloat16) for x in inputs(20))
    state = made.empty_state(2, dtype=torch.bfloat16, device=torch.device("cpu"))
    types = {name: tensor.dtype for name, tensor in state.tensors().items()}
    outs = []
    with torch.autocast("cpu", torch.bfloat16):
        whole = made(q, k, v)[0]
        for part in (slice(0, 1), slice(1, 14), slice(14, 20)):
            out, keys, values = made(q[:, :, part], k[:, :, part], v[:, :, part], state=state)
            ops.fold_(state, keys, values)
            outs.append(out)
    assert {name: tensor.dtype for name, tensor in state.tensors().items()} == types
    assert_close(torch.cat(outs, dim=2).double(), whole.double(), 3e-2)


@pytest.mark.parametrize("name", CAUSAL)
def test_zero_vectors_and_large_ones_give_no_nan(name):
    made = module(name)
    q, k, v = inputs(30)
    for x in (q, k, v):
        x[:, :, 3:12] = 0
        x[:, :, 20:25] *= 1e3
        x.requires_grad_()
    out, _, _ = made(q, k, v)
    out.sum().backward()
    for x in (out, q.grad, k.grad, v.grad):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_state_has_the_size_that_the_page_says(name):
    made = module(name)
    d, e, f = WIDTH, VALUES, made.form.features
    memory, group = {
        "local": (0, d + e),
        "global": (d * e, d + e),
        "grouped": (d * e, d + e),
        "relu": (d * (e + 1), 0),
        "performer": (10 * (e + 1), 0),
        "rfa": (2 * 10 * (e + 1), 0),
        "transnormer": (d * e, 0),
        "yoso": ((6 << 3) * (e + 1), 0),
        "linformer": (10 * (d + e), 0),
        "hedgehog": (2 * d * (e + 1), 3 * d + e + 1),
    }[name.split(",")[0]]
    state = made.empty_state(1, dtype=torch.float32, device=torch.device("cpu"))
    assert state.memory.numel() == 2 * memory
    assert state.tail.numel() == 2 * (TAPS - 1) * e
    slots = state.keys.numel() + state.values.numel()
    if group:
        assert slots == 2 * (2 + 2 * 3 if name in WINDOWED else GROUP) * group
    else:
        assert state.group == 1 and slots == 2 * (f + state.values.shape[-1])


def test_errors_name_the_value():
    for settings, message in (
        ({"features": 0}, "features.*0"),
        ({"bits": 17}, "bits.*17"),
        ({"seed": -1}, "seed.*-1"),
        ({"layers": "all"}, "layers.*'all'"),
        ({"layers": [0, -1]}, r"layers.*-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            LinearConfig(attention="grouped", **settings)
    config = LinearConfig(attention="grouped", layers=[3, 1, 3])
    assert config.layers == (1, 3)
    assert LinearConfig.from_dict(config.to_dict()) == config
