"""Parameter groups and the learning-rate curve."""

from __future__ import annotations

import pytest
import torch

from linearized.errors import ConfigError
from linearized.models import new_parameters
from linearized.training.optim import Optim


def test_every_trained_parameter_is_in_one_group(linear):
    model = linear()
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = {group["name"]: group for group in Optim(lr=1e-3, new_lr=2e-2).groups(model)}
    assert set(groups) == {"matrices", "vectors", "new"}
    found = [id(p) for group in groups.values() for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in groups["new"]["params"]} == {id(p) for p in new_parameters(model)}
    assert groups["new"]["lr"] == 2e-2 and groups["matrices"]["lr"] == 1e-3
    assert all(p.ndim >= 2 for p in groups["matrices"]["params"])
    decays = {name: group["weight_decay"] > 0 for name, group in groups.items()}
    assert decays == {"matrices": True, "vectors": False, "new": False}


def test_a_softmax_model_has_no_new_parameters(llama):
    assert {group["name"] for group in Optim(lr=1e-3).groups(llama())} == {"matrices", "vectors"}


def test_the_rate_warms_up_and_falls_to_a_tenth():
    optim = Optim(lr=1e-3, warmup=10)
    scales = [optim.scale(step, 100) for step in range(101)]
    rising, falling = scales[:10], scales[10:]
    assert rising == sorted(rising) and rising[0] > 0
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(1) and falling[-1] == pytest.approx(0.1)
    assert optim.scale(1000, 100) == pytest.approx(0.1)


def test_a_floor_of_one_keeps_the_rate():
    optim = Optim(lr=1e-3, warmup=10, floor=1.0)
    assert [optim.scale(step, 100) for step in (10, 50, 100)] == [1, 1, 1]


@pytest.mark.parametrize(
    "settings", [{"lr": 0}, {"new_lr": -1}, {"clip": 0}, {"warmup": -1}, {"floor": 1.1}]
)
def test_what_cannot_work_is_named(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"{name} must be"):
        Optim(**{"lr": 1e-3, **settings})


def test_a_new_parameter_moves_by_its_own_rate(linear):
    """At a fine-tuning rate α would starve."""
    model = linear(dtype=torch.float32)
    for parameter in new_parameters(model):
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(Optim(lr=2e-5, new_lr=1e-2).groups(model))
    tokens = torch.randint(1, 60, (2, 40))
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    assert max(float(p.detach().abs().max()) for p in new_parameters(model)) > 0.02
