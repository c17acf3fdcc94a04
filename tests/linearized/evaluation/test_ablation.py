"""Parts are taken out, and put back."""

from __future__ import annotations

import pytest
import torch

import linearized
from linearized import LinearConfig
from linearized.evaluation import ablation
from linearized.models import new_parameters


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 41)[None], use_cache=False).logits


def made(llama, **settings):
    model = linearized.linearize(llama(), LinearConfig(**{"group": 8, "taps": 5, **settings}))
    for parameter in new_parameters(model):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("attention", ["grouped", "hedgehog"])
def test_the_far_part(llama, attention):
    model = made(llama, attention=attention, sinks=2)
    whole = logits(model)
    assert ablation.has_far_part(model)
    with ablation.without_far_part(model):
        found = logits(model)
        assert torch.equal(found[:, :8], whole[:, :8])  # where there is none
        assert not torch.allclose(found, whole)
        for module in linearized.models.linear_modules(model).values():
            assert not module.linear_attention.scale().any()
    assert torch.equal(logits(model), whole)


def test_the_convolution(llama):
    model = made(llama, attention="grouped")
    whole = logits(model)
    plain = made(llama, attention="grouped", augment=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert ablation.has_convolution(model) and not ablation.has_convolution(plain)
    with pytest.raises(KeyError), ablation.without_convolution(model):
        torch.testing.assert_close(logits(model), logits(plain))
        raise KeyError
    assert torch.equal(logits(model), whole)


def test_layers_back_to_softmax(llama):
    model, softmax = made(llama, attention="hedgehog"), llama()
    whole = logits(model)
    with ablation.softmax_in(model, [0, 1]):
        torch.testing.assert_close(logits(model), logits(softmax), rtol=1e-4, atol=1e-4)
    with ablation.softmax_in(model, [1]):
        one = logits(model)
    assert not torch.allclose(one, whole) and not torch.allclose(one, logits(softmax))
    assert torch.equal(logits(model), whole)


def test_what_has_no_such_part(llama):
    assert not ablation.has_far_part(made(llama, attention="local"))
    assert not ablation.has_far_part(made(llama, attention="relu"))


def test_parts_are_named(llama):
    model = made(llama, attention="grouped")
    whole = logits(model)
    assert list(ablation.parts(model)) == ["far part off", "convolution off"]
    for part in ablation.parts(model).values():
        with part():
            assert not torch.allclose(logits(model), whole)
    assert torch.equal(logits(model), whole)
    assert list(ablation.parts(made(llama, attention="relu"))) == ["convolution off"]
    assert ablation.parts(made(llama, attention="local", augment=False)) == {}
