"""Packed weights give the same numbers, are never out of date, and take nothing from anybody."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import linearized
from linearized import packing
from linearized.errors import ConfigError
from linearized.head import OutputLinear
from linearized.packing import _Packed, can_pack, is_packed, pack, unpack
from linearized.products import EAGER, Choice, Laid, available

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """Nothing is measured: every weight is laid out, for any number of rows, or as a test says."""
    choice = [Choice.always("onednn")]

    def fastest(layers, dtype, pack):
        return {tuple(layer.weight.shape): choice[0] for layer in layers}

    monkeypatch.setattr(packing, "fastest", fastest)
    return choice


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def test_a_packed_model_is_the_same_model(linear):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (2, 90))
    want = logits(model, tokens)
    size = pack(model)
    assert size == sum(one.weight.nbytes for one in linears(model))
    assert is_packed(model)
    assert torch.allclose(logits(model, tokens), want, atol=1e-4)
    state = linearized.new_state(model, batch_size=2)
    parts = [linearized.extend(model, part, state) for part in tokens.split(1, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), want, atol=1e-3)
    unpack(model)
    assert not is_packed(model)
    assert torch.equal(logits(model, tokens), want)


def test_what_is_measured_is_used(linear, monkeypatch):
    """By the real measurement, whatever it finds."""
    monkeypatch.undo()
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (1, 40))
    want = logits(model, tokens)
    assert can_pack(model)
    size = pack(model)
    assert is_packed(model) == (size > 0)
    found = logits(model, tokens)
    assert torch.allclose(found, want, atol=1e-4)
    assert pack(model) == size
    assert torch.equal(logits(model, tokens), found)


def test_where_eager_torch_is_fastest_nothing_is_kept_or_changed(chosen):
    chosen[0] = Choice()
    layer = nn.Linear(24, 40)
    assert pack(layer) == 0
    assert "forward" not in layer.__dict__
    assert not is_packed(layer)


def test_rows_go_where_they_are_multiplied_fastest(chosen, monkeypatch):
    chosen[0] = Choice((EAGER,) * 3 + ("onednn",) * 3 + (EAGER,) * 3)
    layer = nn.Linear(24, 40)
    assert pack(layer) == layer.weight.nbytes
    counts = []
    multiply = Laid.multiply
    monkeypatch.setattr(
        Laid, "multiply", lambda it, x, bias: (counts.append(len(x)), multiply(it, x, bias))[1]
    )
    with torch.no_grad():
        for rows in (1, 2, 4, 7, 8, 16, 33, 64, 400):
            layer(torch.randn(rows, 24))
    assert counts == [7, 8, 16, 33]


def test_shapes_and_biases():
    layer = nn.Linear(24, 40)
    shapes = [(24,), (1, 24), (2, 24), (1, 3, 24), (4, 24), (2, 3, 24), (2, 0, 24)]
    rows = [*map(torch.randn, shapes), torch.randn(24, 5).t()]
    with torch.no_grad():
        want = [layer(x) for x in rows]
        pack(layer)
        for x, y in zip(rows, want, strict=True):
            assert layer(x).shape == y.shape
            assert torch.allclose(layer(x), y, atol=1e-5)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):  # as eager torch says it
            layer(torch.randn(5, 23))


def test_bfloat16_only_where_it_is_allowed(monkeypatch):
    asked = []

    def fastest(layers, dtype, pack):
        asked.append(dtype)
        return {(40, 64): Choice.always("bfloat16" if dtype == torch.bfloat16 else EAGER)}

    monkeypatch.setattr(packing, "fastest", fastest)
    layer = nn.Linear(64, 40)
    with torch.no_grad():
        x = torch.randn(5, 64)
        want = layer(x)
        assert pack(layer, dtype=torch.bfloat16) == layer.weight.nbytes // 2
        assert layer.weight.dtype == layer(x).dtype == torch.float32
        assert 1e-4 < (layer(x) - want).norm() / want.norm() < 2e-2
        assert pack(OutputLinear(64, 40), dtype=torch.bfloat16) == 0  # logits stay exact
    assert asked[0] == torch.bfloat16
    with pytest.raises(ConfigError, match="float32 or torch.bfloat16, got torch.float16"):
        pack(layer, dtype=torch.float16)


def data_half(layer):
    layer.weight.data.mul_(0.5)


def data_row(layer):
    layer.weight.data[7] = 3.0


def new_data(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def turned(layer):
    layer.weight.data = layer.weight.data.view(24, 40).t()


def numpy(layer):
    layer.weight.detach().numpy()[:] = 1.5


def bias(layer):
    layer.bias.data.add_(1.0)


def loaded(layer):
    layer.load_state_dict(nn.Linear(24, 40).state_dict())


def assigned(layer):
    layer.load_state_dict(nn.Linear(24, 40).state_dict(), assign=True)


def stepped(layer):
    with torch.enable_grad():
        layer(torch.randn(3, 24)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def vector(layer):
    nn.utils.vector_to_parameters(torch.randn(40 * 25), layer.parameters())


def there_and_back(layer):
    layer.double()
    layer.weight.data.mul_(2)
    layer.float()


def transposed(layer):
    layer.weight = nn.Parameter(torch.randn(24, 40).t())


def pruned(layer):
    prune.random_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize(
    "write",
    [
        data_half, data_row, new_data, new_parameter, numpy, bias, loaded, assigned, stepped,
        vector, there_and_back, transposed, turned, pruned,
    ],
)  # fmt: skip
def test_old_weights_are_never_used(write):
    layer = nn.Linear(24, 40)
    x = torch.randn(5, 24)
    with torch.no_grad():
        pack(layer)
        before = layer(x)
        write(layer)
        after = layer(x)
        want = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.allclose(after, want, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-2)


def test_packing_again_sees_what_a_sample_does_not():
    layer = nn.Linear(24, 40)
    x = torch.ones(1, 24)
    with torch.no_grad():
        pack(layer)
        before = layer(x)
        layer.weight.data[5, 11] += 100.0
        pack(layer)
        assert (layer(x) - before).abs().argmax() == 5


def test_written_weights_of_a_model_are_laid_out_anew(linear):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (1, 9))
    pack(model)
    before = logits(model, tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.lm_head.weight.data.mul_(-1)
    after = logits(model, tokens)
    unpack(model)
    assert torch.allclose(after, logits(model, tokens), atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-4)


def test_training_and_other_types_go_the_ordinary_way(linear):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (1, 9))
    model(input_ids=tokens, labels=tokens).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pack(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    assert logits(model.double(), tokens).dtype == torch.float64
    assert pack(model) == 0  # nothing in float32 is left


def test_an_output_matrix_that_becomes_half_precision_still_gives_float32():
    layer = OutputLinear(24, 40)
    with torch.no_grad():
        pack(layer)
        layer.bfloat16()
        assert layer(torch.randn(5, 24).bfloat16()).dtype == torch.float32


def test_autocast_is_not_overruled():
    layer = nn.Linear(24, 40)
    pack(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 24)).dtype == torch.bfloat16


def test_a_forward_that_somebody_else_has_put_there_stays():
    """As libraries of hooks do: they replace `forward` and keep the one that they found."""
    calls = []

    def hooked(old, x):
        calls.append(len(x))
        return old(x)

    before, after, plain = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
    before.forward = functools.partial(hooked, before.forward)
    model = nn.Sequential(before, nn.ReLU(), nn.Linear(40, 24), after, plain)
    foreign = before.forward
    pack(model)
    assert before.forward is foreign
    after.forward = functools.partial(hooked, after.forward)
    wrapped = after.forward
    assert isinstance(plain.forward, _Packed)
    assert is_packed(model)
    x = torch.randn(3, 24)
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
        calls.clear()
        assert torch.allclose(model(x), want, atol=1e-5)
    assert calls == [3, 3]
    unpack(model)
    assert before.forward is foreign and after.forward is wrapped
    assert not is_packed(model)
    assert "forward" not in plain.__dict__
    assert not is_packed(before)


def test_copies_and_files_of_a_packed_model(linear, tmp_path):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (1, 9))
    pack(model)
    want = logits(model, tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(logits(twin, tokens), want)
    layer = nn.Linear(8, 8)
    pack(layer)
    with torch.no_grad():
        x = torch.randn(2, 8)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    twin.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path)
    assert torch.allclose(logits(loaded, tokens), want, atol=1e-4)


def test_tied_weights(linear):
    """The embedding is written, and the output layer shares it."""
    model = linear(dtype=torch.float32)
    model.lm_head.weight = model.model.embed_tokens.weight
    tokens = torch.randint(1, 50, (1, 9))
    pack(model)
    logits(model, tokens)
    model.model.embed_tokens.weight.data.mul_(-3)
    after = logits(model, tokens)
    unpack(model)
    assert torch.allclose(after, logits(model, tokens), atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_in_compiled_programs(chosen, monkeypatch):
    """A program for one row knows its rows, and one for several asks when it runs."""
    chosen[0] = Choice((EAGER,) * 2 + ("onednn",) * 4 + (EAGER,) * 3)
    counts = []
    multiply = Laid.multiply
    monkeypatch.setattr(
        Laid, "multiply", lambda it, x, bias: (counts.append(len(x)), multiply(it, x, bias))[1]
    )
    layer = nn.Linear(24, 40)
    pack(layer)
    program = torch.compile(lambda x: layer(x), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (1, 2, 3, 8, 400):
            x = torch.randn(rows, 24)
            want = nn.functional.linear(x, layer.weight, layer.bias)
            assert torch.allclose(program(x), want, atol=1e-5), rows
        layer.weight.data.mul_(2)
        want = nn.functional.linear(x[:8], layer.weight, layer.bias)
        assert torch.allclose(program(x[:8]), want, atol=1e-5)
    assert counts == [3, 8, 8]
