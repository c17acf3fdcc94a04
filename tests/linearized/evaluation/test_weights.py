"""The weights of parts, layer by layer."""

from __future__ import annotations

import pytest
import torch

import linearized
from linearized.evaluation.weights import by_layer
from linearized.models import linear_modules


def test_they_are_those_of_the_layers(llama):
    model = linearized.linearize(llama(), linearized.LinearConfig(attention="grouped", taps=3))
    assert by_layer(model) == {0: {"far": 0, "taps": 0}, 1: {"far": 0, "taps": 0}}
    second = list(linear_modules(model).values())[1].linear_attention
    with torch.no_grad():
        second.alpha[:] = torch.tensor([-1.0, 1.0, 2.0, 0.0])
        second.taps[1] = torch.tensor([1.0, -1.0, 2.0])
    assert by_layer(model) == {0: {"far": 0, "taps": 0}, 1: {"far": 1.0, "taps": 1.0}}


def test_only_what_a_layer_has(llama):
    named = linearized.LinearConfig.named("anchored", layers=[1], augment=False)
    found = by_layer(linearized.linearize(llama(), named))
    assert found == {1: {"far": pytest.approx(0.1), "bound": pytest.approx(256, rel=1e-3)}}
    relu = linearized.LinearConfig(attention="relu", augment=False)
    assert by_layer(linearized.linearize(llama(), relu)) == {}
    assert by_layer(llama()) == {}
