"""Distillation in one process: what learns, that it learns, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from linearized import LinearConfig
from linearized.errors import ConfigError
from linearized.models import attention_modules, new_parameters
from linearized.training import distil as module
from linearized.training.distil import distil
from linearized.training.fit import student_of
from linearized.training.optim import Optim

CONFIG = LinearConfig(attention="hedgehog", group=8, taps=5, window=1, sinks=2, bound=8)
OPTIM = Optim(lr=3e-3, new_lr=3e-2, warmup=2)


def rows(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (2, 40), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("trained", ["all", "layers", "attention"])
def test_losses_fall_and_what_is_asked_for_learns(llama, trained):
    teacher = llama()
    student = student_of(teacher, CONFIG, shared=False)
    before = {name: x.detach().clone() for name, x in student.named_parameters()}
    teachers = {name: x.clone() for name, x in teacher.state_dict().items()}
    losses = []
    distil(
        student, teacher, rows(1) * 12, optim=OPTIM, trained=trained,
        report=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 12 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for name, x in student.named_parameters():
        moves = trained == "all" or "self_attn" in name
        moves = moves or (trained == "layers" and "embed_tokens" not in name)
        assert torch.equal(x, before[name]) != moves, name
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, teachers[name]), name
    assert all(x.requires_grad for x in student.parameters()) and not student.training


def test_rows_at_a_time_make_no_difference(llama):
    teacher = llama()
    found = []
    for micro in (1, 2):
        student = student_of(teacher, CONFIG, shared=False).double()
        distil(student, teacher.double(), rows(3), optim=OPTIM, text=0.5, micro=micro)
        found.append(torch.cat([x.detach().flatten() for x in student.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_autocast_around_all_steps_shows_each_step_the_weights_of_then(llama):
    """Autocast keeps copies of weights in half precision until its outermost block ends."""
    teacher = llama()
    found = []
    for whole in (True, False):
        student = student_of(teacher, CONFIG, shared=False)
        losses: list[float] = []

        def report(step: int, loss: float, losses: list[float] = losses, whole=whole) -> None:
            losses.append(loss)
            if not whole:
                torch.clear_autocast_cache()

        with torch.autocast("cpu", torch.bfloat16):
            distil(student, teacher, rows(6), optim=OPTIM, report=report)
        found.append(losses)
    assert found[0] == found[1]


def test_weights_in_the_teachers_memory_are_not_trained(llama):
    teacher = llama()
    student = student_of(teacher, CONFIG)
    with pytest.raises(ConfigError, match="a copy of its own"):
        distil(student, teacher, rows(1), optim=OPTIM, trained="layers")
    distil(student, teacher, rows(1), optim=OPTIM, trained="attention")


def test_what_learns_has_a_name(llama):
    with pytest.raises(ConfigError, match="all, layers, attention, got 'some'"):
        distil(llama(), llama(), rows(1), optim=OPTIM, trained="some")


def test_new_parameters_learn_with_everything_else_frozen(llama):
    student = student_of(llama(), CONFIG)
    chosen = module.choose(student, llama(seed=1), "attention")
    known = {id(p) for p in chosen}
    assert all(id(p) in known for p in new_parameters(student))
    assert {id(p) for m in attention_modules(student) for p in m.parameters()} == known


@pytest.mark.parametrize("text", [0.0, 0.4, 1.0])
def test_hidden_states_give_the_loss_of_logits(llama, text):
    student, teacher, tokens = llama(), llama(seed=1), rows(1)[0]
    assert module._is_plain(student)
    found = module.loss_from_hidden(student, teacher, tokens, text)
    want = module.loss_from_logits(student, teacher, tokens, text)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)


def test_a_model_that_scales_its_logits_is_not_plain():
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0,
    )  # fmt: skip
    assert not module._is_plain(transformers.GraniteForCausalLM(config).eval())
