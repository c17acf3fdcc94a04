"""One row of a sweep: a softmax model is linearized, trained and measured, in one process. Knows
models and token blocks; knows nothing of Ray.

First each layer's attention learns to give what the softmax layer in its place gives (transfer),
then all weights learn from the text and from the teacher (distillation). All rows of a sweep see
the same tokens in the same order; the softmax model, which has nothing to transfer, is trained on
with as many."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import linearized
from jobs.likelihood import negative_log_likelihood
from linearized.config import LinearConfig
from linearized.errors import ConfigError, DataError
from linearized.evaluation import ablation
from linearized.models import new_state
from linearized.training import fit
from linearized.training.batch import Batch, keep_apart
from linearized.training.blocks import Blocks
from linearized.training.objective import Distillation
from linearized.training.optim import Descent, Optim

SOFTMAX = "softmax"


@dataclass(frozen=True, kw_only=True)
class Trial:
    name: str
    attention: str = "grouped"
    """Name of an attention or of a combination such as `anchored`; `softmax` leaves the model as it
    is."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LinearConfig."""
    hybrid: int = 0
    """One layer in so many keeps softmax, the last of each; 0: none."""
    transfer: int = 50
    """Number of steps of transfer."""
    steps: int = 150
    """Number of steps of distillation."""
    batch: int = 8
    lr: float = 1e-3
    new_lr: float = 1e-2
    """Learning rate of the parameters that linearizing adds."""
    text: float = 0.5
    """Share of the cross-entropy on the text in the loss; the rest is the divergence from the
    teacher."""
    seed: int = 0
    shape: str | None = None
    """`gpt2`, `t5` or `bert`: a small model of this kind, from scratch; for sentences."""
    state_bytes: int | None = None
    """The number of features, or the size of groups, is chosen for a state of at most this size;
    for recall. null leaves the settings as they are."""

    def __post_init__(self) -> None:
        if self.attention != SOFTMAX:
            LinearConfig.named(self.attention, **self.settings)
        elif self.settings or self.hybrid:
            raise ConfigError(f"{self.name}: softmax has no settings")
        if self.transfer < 0 or self.steps < 0 or self.batch < 1 or self.hybrid < 0:
            raise ConfigError(
                f"{self.name}: steps, transfer and hybrid must be at least 0, batch 1"
            )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of a sweep share."""

    data: Path | None = None
    """Folder that jobs.data wrote, with the teacher's tokenizer, or one with sentences."""
    teacher: Path | None = None
    """None: models are trained from scratch."""
    eval_blocks: int = 64
    threads: int = 1


def run(trial: Trial, setting: Setting) -> dict[str, Any]:
    """Train and measure. Perplexities are of held-out blocks.

    Raises:
        DataError: the loss is not a number.
    """
    torch.set_num_threads(setting.threads)
    torch.manual_seed(trial.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert setting.teacher is not None and setting.data is not None
    blocks, held_out = Blocks(setting.data / "train"), Blocks(setting.data / "held_out")
    teacher = linearized.load(setting.teacher).to(device)  # type: ignore[arg-type]
    student = _student(trial, teacher)
    for model in (teacher, student):
        keep_apart(model)
    began = time.perf_counter()
    measured = _spread(held_out, setting.eval_blocks)
    found: dict[str, Any] = {
        **facts(trial, student),
        "teacher": _perplexity(teacher, measured),
        "before": _perplexity(student, measured),
    }
    batches = (
        blocks.batch(step, batch_size=trial.batch, seed=trial.seed) for step in itertools.count()
    )
    steps = trial.transfer + trial.steps
    if trial.attention != SOFTMAX and trial.transfer:
        rows = [batch.tokens for batch in itertools.islice(batches, trial.transfer)]
        optim = Optim(lr=trial.lr, new_lr=trial.new_lr, warmup=min(20, trial.transfer // 5))
        fit.fit(student, teacher, rows, optim=optim)
        found["transferred"] = _perplexity(student, measured)
        steps = trial.steps
    found["losses"] = _distil(trial, student, teacher, itertools.islice(batches, steps), steps)
    found["seconds"] = round(time.perf_counter() - began, 1)
    found["tokens"] = (trial.transfer + trial.steps) * trial.batch * blocks.block
    found["after"] = _perplexity(student, measured)
    found["ratio"] = found["score"] = round(found["after"] / found["teacher"], 5)
    if trial.attention != SOFTMAX:
        found["state_bytes"] = new_state(student).nbytes
        for part, off in ablation.parts(student).items():
            with off():
                found[part] = _perplexity(student, measured)
    return found


def facts(trial: Trial, model: PreTrainedModel) -> dict[str, Any]:
    return {"trial": asdict(trial), "parameters": sum(p.numel() for p in model.parameters())}


def check_loss(trial: Trial, step: int, loss: Tensor) -> float:
    """
    Raises:
        DataError: it is not a number.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"{trial.name}: the loss is {value} at step {step}; lower lr or new_lr")
    return value


def _student(trial: Trial, teacher: PreTrainedModel) -> PreTrainedModel:
    student = copy.deepcopy(teacher)
    if trial.attention == SOFTMAX:
        return student
    settings = dict(trial.settings)
    if trial.hybrid:
        number: int = teacher.config.num_hidden_layers
        every = min(trial.hybrid, number)
        settings["layers"] = [n for n in range(number) if n % every != every - 1]
    return linearized.linearize(student, LinearConfig.named(trial.attention, **settings))


def _distil(
    trial: Trial,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    steps: int,
) -> list[list[float]]:
    """The loss of every tenth step, as [step, loss]."""
    optim = Optim(lr=trial.lr, new_lr=trial.new_lr, warmup=min(20, steps // 5))
    objective = Distillation(student, teacher, text=trial.text)
    descent = Descent(optim, student, steps)
    losses: list[list[float]] = []
    student.train()
    for step, batch in enumerate(batches):
        summed, count = objective(batch.to(teacher.device))
        loss = summed / count
        loss.backward()
        value = check_loss(trial, step, loss)
        descent.clip(student.parameters())
        descent.step()
        if step % 10 == 0 or step == steps - 1:
            losses.append([step, round(value, 4)])
    student.eval()
    return losses


def _spread(held_out: Blocks, count: int) -> list[Batch]:
    """Blocks that are spread over all documents, eight at a time."""
    count = min(count, len(held_out))
    indices = [i * len(held_out) // count for i in range(count)]
    return [held_out.batch_of(indices[i : i + 8]) for i in range(0, count, 8)]


def _perplexity(model: PreTrainedModel, batches: list[Batch]) -> float:
    found = [negative_log_likelihood(model, batch) for batch in batches]
    nats, count = map(sum, zip(*found, strict=True))
    return round(math.exp(nats / count), 4)
