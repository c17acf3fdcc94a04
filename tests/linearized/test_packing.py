"""Packed weights give the same numbers, and are never out of date."""

from __future__ import annotations

import copy
import pickle

import torch

import linearized
from linearized.packing import pack, unpack


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def test_a_packed_model_is_the_same_model(linear):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (2, 90))
    want = logits(model, tokens)
    size = pack(model)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert size == sum(weight.nbytes for weight in weights)
    assert torch.allclose(logits(model, tokens), want, atol=1e-4)
    assert all(m.forward._packed is not None for m in model.modules() if type(m) is torch.nn.Linear)
    state = linearized.new_state(model, batch_size=2)
    parts = [linearized.extend(model, part, state) for part in tokens.split(1, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), want, atol=1e-3)
    unpack(model)
    assert torch.equal(logits(model, tokens), want)


def test_shapes_and_biases():
    layer = torch.nn.Linear(24, 40)
    shapes = [(24,), (1, 24), (2, 24), (1, 3, 24), (4, 24), (2, 3, 24), (2, 0, 24)]
    rows = [*map(torch.randn, shapes), torch.randn(24, 5).t()]
    with torch.no_grad():
        want = [layer(x) for x in rows]
        pack(layer)
        for x, y in zip(rows, want, strict=True):
            assert layer(x).shape == y.shape
            assert torch.allclose(layer(x), y, atol=1e-5)


def test_written_weights_are_laid_out_anew(linear):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (1, 9))
    pack(model)
    before = logits(model, tokens)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
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


def test_copies_and_files_of_a_packed_model(linear, tmp_path):
    model = linear(dtype=torch.float32)
    tokens = torch.randint(1, 50, (1, 9))
    pack(model)
    want = logits(model, tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(logits(twin, tokens), want)
    layer = torch.nn.Linear(8, 8)
    pack(layer)
    with torch.no_grad():
        x = torch.randn(2, 8)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    twin.save_pretrained(tmp_path)
    loaded = linearized.load(tmp_path)
    assert torch.allclose(logits(loaded, tokens), want, atol=1e-4)
