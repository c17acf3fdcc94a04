"""Objectives: what they measure, what they train, and that training lowers them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import linearized
from linearized.errors import ConfigError
from linearized.medusa import MedusaHeads
from linearized.models import attention_modules, new_parameters
from linearized.training.batch import Batch
from linearized.training.objective import (
    TRAINED,
    Distillation,
    Imitation,
    Medusa,
    Objective,
    Transfer,
    chosen,
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


def mean(objective: Objective, batch: Batch | None = None) -> torch.Tensor:
    summed, count = objective(batch or Batch(tokens()))
    return summed / count


def train(objective: Objective, steps: int, lr: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(Optim(lr=lr).groups(objective))
    losses = []
    for _ in range(steps):
        loss = mean(objective)
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
            error = (a - b).square().mean((1, 2)) / a.square().mean((1, 2))
            want.append(error.mean().item())
        loss = mean(Transfer(student, teacher))
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


@pytest.mark.parametrize("text", [0.0, 0.25, 1.0])
def test_distillation_is_part_text_part_teacher(pair, text):
    student, teacher = pair
    with torch.no_grad():
        loss = mean(Distillation(student, teacher, text=text))
        p = teacher(input_ids=tokens()).logits[:, :-1].softmax(-1)
        q = student(input_ids=tokens()).logits[:, :-1].softmax(-1)
        far = float((p * (p / q).log()).sum(-1).mean())
        near = float(cross_entropy(student(input_ids=tokens()).logits, tokens()))
        imitation = mean(Imitation(student, teacher))
    assert float(loss) == pytest.approx(text * near + (1 - text) * far, rel=1e-4)
    assert float(imitation) == pytest.approx(far, rel=1e-4)


def test_temperature_softens_both_and_keeps_the_size_of_gradients(pair):
    student, teacher = pair
    with torch.no_grad():
        loss = mean(Imitation(student, teacher, temperature=2.0))
        p = (teacher(input_ids=tokens()).logits[:, :-1] / 2).softmax(-1)
        q = (student(input_ids=tokens()).logits[:, :-1] / 2).softmax(-1)
    assert float(loss) == pytest.approx(4 * float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def documents(batch: int = 4, length: int = 40) -> Batch:
    """Rows of several documents, with tokens that are not learned, no two rows alike."""
    places = torch.arange(length).expand(batch, -1)
    lengths = torch.tensor([7, 11, 40, 13])[:batch, None]
    trained = (places % lengths != 0) & (places % 5 != 2)
    trained[0, : length // 2] = False
    return Batch(tokens(batch, length), places // lengths, trained)


ALL = [Objective, Transfer, Distillation, Imitation, Medusa]


@pytest.mark.parametrize("objective", ALL)
@pytest.mark.parametrize("parts", [2, 4])
def test_loss_and_gradient_are_the_same_however_rows_are_shared_out(pair, objective, parts):
    """transformers#37766, pytorch/torchtitan#1842: means of means weigh tokens unevenly. Splits
    stand for micro-batches and for ranks alike."""
    student, teacher = (model.double() for model in pair)
    if objective is Medusa:
        student = MedusaHeads(heads=2, hidden=32, vocab_size=61, target="x").double()
    made = objective(student, teacher if objective.needs_teacher else None)
    found = []
    for split in (1, parts):
        pieces = [made(piece) for piece in documents().split(split)]
        total = sum(count for _, count in pieces)
        loss = sum(summed for summed, _ in pieces) / total
        loss.backward()
        gradient = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        student.zero_grad()
        found.append((loss.detach(), gradient))
    (loss, gradient), (other, others) = found
    assert loss == pytest.approx(other, rel=1e-6) and len(gradient) == len(others) > 0
    for x, y in zip(gradient, others, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6 * float(x.abs().max()))


@pytest.mark.parametrize("objective", ALL)
def test_documents_of_a_row_teach_what_they_would_alone(pair, objective):
    """fla-org/flash-linear-attention#838, NVIDIA-NeMo/Automodel#2147: in a student's linear
    attention and convolution, in a teacher's softmax, and in the loss."""
    student, teacher = (model.double() for model in pair)
    for parameter in new_parameters(student):
        torch.nn.init.normal_(parameter)
    if objective is Medusa:
        student = MedusaHeads(heads=1, hidden=32, vocab_size=61, target="x").double()
        torch.nn.init.normal_(student.blocks[0].weight)
    made = objective(student, teacher if objective.needs_teacher else None)
    joined = tokens(1, 40)
    segments = torch.arange(40)[None] // 20
    trained = torch.ones(1, 40, dtype=torch.bool)
    trained[:, [0, 20]] = False
    if objective is Transfer:  # its errors are relative to a row
        made.summed = lambda batch: squared(made, batch)
    with torch.no_grad():
        together = made.summed(Batch(joined, segments, trained))
        alone = [made.summed(Batch(part)) for part in joined.split(20, dim=1)]
    if objective is Medusa:  # the last guess of the first document is of the second
        assert torch.isfinite(together)
        return
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-6)


def squared(made: Transfer, batch: Batch) -> torch.Tensor:
    """The squared error of the layers' outputs, summed."""
    errors: list[torch.Tensor] = []

    def kept(module, args, kwargs, wanted):
        given = module(*args, **{**kwargs, "attention_mask": None})[0]
        errors.append((given - wanted).square().sum())
        return torch.ones(len(wanted))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearized.training.objective.transfer_errors", kept)
        Transfer.summed(made, batch)
    return torch.stack(errors).sum()


def test_only_some_parameters_are_trained_where_that_is_asked(pair):
    student, teacher = pair
    only = [student.get_input_embeddings().weight, *new_parameters(student)]
    made = Transfer(student, teacher, only=only)
    trained = {id(p) for p in made.parameters() if p.requires_grad}
    assert trained == {id(p) for p in new_parameters(student)}


def test_which_weights_learn_goes_by_name(pair):
    student, _ = pair
    embedding = student.get_input_embeddings().weight
    attention = {id(p) for module in attention_modules(student) for p in module.parameters()}
    found = {which: {id(p) for p in chosen(student, which)} for which in TRAINED}
    assert found["all"] == {id(p) for p in student.parameters()}
    assert found["all"] - found["layers"] == {id(embedding)}
    assert found["attention"] == attention


@pytest.mark.parametrize("objective", [Objective, Transfer, Distillation, Imitation])
def test_bfloat16_loses_little(pair, objective):
    """As on a GPU: student and teacher in bfloat16, the loss in float32."""
    student, teacher = pair
    given = teacher if objective.needs_teacher else None
    with torch.no_grad():
        want = mean(objective(student, given))
        low = mean(objective(student.bfloat16(), given and given.bfloat16()))
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
