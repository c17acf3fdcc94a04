"""Objectives: what they measure, what they train, and that training lowers them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import linearized
from linearized.errors import ConfigError
from linearized.models import attention_modules, new_parameters
from linearized.training.objective import (
    Distillation,
    Imitation,
    Objective,
    Transfer,
    cross_entropy,
)
from linearized.training.optim import Optim

CONFIG = linearized.LinearConfig(attention="grouped", group=8, taps=5)


@pytest.fixture
def pair(llama):
    teacher = llama()
    student = copy.deepcopy(teacher)
    return linearized.linearize(student, CONFIG), teacher


def tokens(batch: int = 4, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(0))


def train(objective: Objective, steps: int, lr: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(Optim(lr=lr).groups(objective))
    losses = []
    for _ in range(steps):
        loss = objective(tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_cross_entropy_is_that_of_the_next_token():
    logits = torch.zeros(2, 5, 7)
    assert float(cross_entropy(logits, torch.randint(7, (2, 5)))) == pytest.approx(math.log(7))
    ids = torch.tensor([[1, 2, 3]])
    sure = torch.nn.functional.one_hot(torch.tensor([[2, 3, 0]]), 7) * 50.0
    assert float(cross_entropy(sure, ids)) == pytest.approx(0, abs=1e-6)


def test_transfer_measures_each_layer_on_the_teachers_own_input(pair):
    student, teacher = pair
    with torch.no_grad():
        hidden = teacher.base_model(input_ids=tokens(), output_hidden_states=True).hidden_states
        positions = torch.arange(40)[None]
        rotary = teacher.model.rotary_emb(hidden[0], positions)
        want = []
        for layer, twin, x in zip(
            teacher.model.layers, student.model.layers, hidden[:2], strict=True
        ):
            x = layer.input_layernorm(x)
            a = layer.self_attn(x, position_embeddings=rotary, attention_mask=None)[0]
            b = twin.self_attn(x, position_embeddings=rotary, attention_mask=None)[0]
            want.append(((a - b).square().mean() / a.square().mean()).item())
        loss = Transfer(student, teacher)(tokens())
    assert float(loss) == pytest.approx(sum(want) / 2, rel=1e-4)


def test_transfer_trains_attention_only_and_brings_it_closer(pair):
    student, teacher = pair
    before = copy.deepcopy(student.state_dict())
    losses = train(Transfer(student, teacher), 40, lr=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    attention = {id(p) for module in attention_modules(student) for p in module.parameters()}
    for name, parameter in student.named_parameters():
        assert torch.equal(before[name], parameter) == (id(parameter) not in attention), name


@pytest.mark.parametrize("objective", [Objective, Distillation, Imitation])
def test_whole_model_objectives_train_everything_but_the_teacher(pair, objective):
    student, teacher = pair
    frozen = copy.deepcopy(teacher.state_dict())
    made = objective(student, teacher if objective.needs_teacher else None)
    before = copy.deepcopy(student.state_dict())
    losses = train(made, 30)
    assert losses[-1] < losses[0] - 0.1
    assert not any(torch.equal(before[name], p) for name, p in student.named_parameters())
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    assert all(name.startswith("student.") for name in made.state_dict())


def test_distillation_is_half_text_half_teacher(pair):
    student, teacher = pair
    with torch.no_grad():
        loss = Distillation(student, teacher)(tokens())
        p = teacher(input_ids=tokens()).logits.softmax(-1)
        q = student(input_ids=tokens()).logits.softmax(-1)
        divergence = (p * (p / q).log()).sum(-1).mean()
        text = cross_entropy(student(input_ids=tokens()).logits, tokens())
        imitation = Imitation(student, teacher)(tokens())
    assert float(loss) == pytest.approx(float((text + divergence) / 2), rel=1e-4)
    assert float(imitation) == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.parametrize("objective", [Objective, Transfer, Distillation, Imitation])
def test_bfloat16_loses_little(pair, objective):
    """As on a GPU: student and teacher in bfloat16, the loss in float32."""
    student, teacher = pair
    given = teacher if objective.needs_teacher else None
    with torch.no_grad():
        want = objective(student, given)(tokens())
        low = objective(student.bfloat16(), given and given.bfloat16())(tokens())
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(want), rel=0.05)


def test_a_missing_or_needless_teacher_is_refused(pair):
    student, teacher = pair
    with pytest.raises(ConfigError, match="Transfer takes a teacher"):
        Transfer(student)
    with pytest.raises(ConfigError, match="Objective takes no teacher"):
        Objective(student, teacher)


def test_groups_hold_every_trained_parameter_once(pair):
    student, _ = pair
    groups = {group["name"]: group for group in Optim(lr=1e-3, new_lr=5e-2).groups(student)}
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in student.parameters())
    assert {id(p) for p in groups["new"]["params"]} == {id(p) for p in new_parameters(student)}
    assert groups["new"]["lr"] == 5e-2 and groups["matrices"]["lr"] == 1e-3
    assert groups["new"]["weight_decay"] == groups["vectors"]["weight_decay"] == 0
    assert groups["matrices"]["weight_decay"] > 0


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    optim = Optim(lr=1e-3, warmup=10)
    scales = [optim.scale(step, 100) for step in range(101)]
    assert scales[0] == pytest.approx(1 / 11)
    assert scales[10] == pytest.approx(1.0)
    assert scales[100] == pytest.approx(0.1)
    assert scales[:10] == sorted(scales[:10]) and scales[10:] == sorted(scales[10:], reverse=True)


@pytest.mark.parametrize("setting", ["lr", "new_lr", "clip"])
def test_rates_must_be_positive(setting):
    with pytest.raises(ConfigError, match=f"{setting} must be above 0, got 0"):
        Optim(**{"lr": 1e-3, setting: 0})
