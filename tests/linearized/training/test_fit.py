"""Fitting layer by layer: what it trains, what it measures, and that errors fall."""

from __future__ import annotations

import pytest
import torch

from linearized import LinearConfig
from linearized.models import linear_modules
from linearized.training.batch import Batch
from linearized.training.fit import errors, fit, student_of
from linearized.training.objective import Transfer
from linearized.training.optim import Optim

CONFIG = LinearConfig(attention="hedgehog", group=8, taps=5, window=1, sinks=2, bound=8)
OPTIM = Optim(lr=1e-3, new_lr=3e-2, warmup=2)


def rows(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (1, 60), generator=generator) for _ in range(count)]


def test_errors_fall_and_only_attention_learns(llama):
    teacher = llama()
    student = student_of(teacher, CONFIG)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    teachers = {name: x.clone() for name, x in teacher.state_dict().items()}
    first = errors(student, teacher, rows(3, seed=1))
    told = []
    fit(student, teacher, rows(30), optim=OPTIM, report=lambda step, of: told.append((step, of)))
    last = errors(student, teacher, rows(3, seed=1))
    assert list(first) == list(linear_modules(student)) and len(first) == 2
    assert all(last[name] < 0.8 * first[name] for name in first)
    assert [step for step, _ in told] == list(range(1, 31)) and told[0][1].keys() == first.keys()
    for name, x in student.state_dict().items():
        assert torch.equal(x, before[name]) == ("self_attn" not in name), name
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, teachers[name])
    assert all(x.requires_grad for x in student.parameters()) and not student.training


def test_what_is_no_attention_is_shared(llama):
    teacher = llama()
    student = student_of(teacher, CONFIG)
    for name, x in teacher.named_parameters():
        same = student.get_parameter(name).data_ptr() == x.data_ptr()
        assert same == ("self_attn" not in name), name


def test_autocast_around_all_steps_shows_each_step_the_weights_of_then(llama):
    """Autocast keeps copies of weights in half precision until its outermost block ends."""
    teacher = llama()
    found = []
    for whole in (True, False):
        student = student_of(teacher, CONFIG)
        told: list[float] = []

        def report(step: int, of: dict[str, float], told: list[float] = told, whole=whole) -> None:
            told.append(sum(of.values()))
            if not whole:
                torch.clear_autocast_cache()

        with torch.autocast("cpu", torch.bfloat16):
            fit(student, teacher, rows(6), optim=OPTIM, report=report)
            told.append(sum(errors(student, teacher, rows(1, seed=1)).values()))
        found.append(told)
    assert found[0] == found[1]


def test_it_is_the_objective_transfer(llama):
    teacher = llama()
    student = student_of(teacher, CONFIG)
    tokens = rows(1)[0]
    summed, count = Transfer(student, teacher)(Batch(tokens[:1]))
    mean = sum(errors(student, teacher, [tokens[:1]]).values()) / 2
    assert float(summed.detach()) / count == pytest.approx(mean, rel=1e-5)
