"""What a step of training minimises. Knows models and batches; knows nothing of optimizers.

An objective is a module around the student, so that DeepSpeed wraps one thing. The teacher hangs
beside it, unregistered: it is frozen, and neither optimized, sharded nor saved with the student.

Each is called with a `Batch` and returns a loss that is summed over predictions, and their number.
Sums of several batches may be added and divided by all their predictions: a step's loss and
gradient are then the same, however its rows were shared out over forwards and workers.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.medusa import output_matrix
from linearized.models import attention_modules, linear_modules
from linearized.training.batch import IGNORED, Batch

TRAINED = ("all", "layers", "attention")
"""Which of a student's parameters learn: all; all but the embeddings and the output matrix; those
of attention modules."""


class Objective(nn.Module):
    """Predicts the next token. The loss is the cross-entropy, in nats per token."""

    needs_teacher = False

    def __init__(
        self,
        student: nn.Module,
        teacher: PreTrainedModel | None = None,
        *,
        text: float = 0.5,
        temperature: float = 1.0,
        only: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """`text` and `temperature` are those of distillation. Of the parameters that the objective
        trains, `only` these are trained; None: all of them."""
        super().__init__()
        if self.needs_teacher != (teacher is not None):
            wants = "a" if self.needs_teacher else "no"
            raise ConfigError(f"objective {type(self).__name__} takes {wants} teacher")
        self.student = student
        self.text, self.temperature = text, temperature
        self._beside = [teacher.eval().requires_grad_(False)] if teacher is not None else []
        wanted = {id(parameter) for parameter in self.trained()}
        if only is not None:
            wanted &= {id(parameter) for parameter in only}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in wanted)

    @property
    def teacher(self) -> PreTrainedModel:
        return self._beside[0]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that this objective trains."""
        return list(self.student.parameters())

    def count(self, batch: Batch) -> int:
        """Number of predictions over which the loss of this batch is a sum."""
        return batch.predictions()

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        return self.summed(batch), self.count(batch)

    def summed(self, batch: Batch) -> Tensor:
        """The loss, a scalar in float32, summed over predictions."""
        return summed_cross_entropy(self._logits(self.student, batch), batch.labels())

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**batch.inputs(model)).logits
        return logits

    @torch.no_grad()
    def _wanted(self, batch: Batch) -> Tensor:
        return self._logits(self.teacher, batch)


class Transfer(Objective):
    """Attention transfer: each layer's linear attention gets the input of the teacher's layer and
    learns to give its output. Only attention modules are trained. The loss is the squared error in
    a row relative to the teacher's output there, averaged over layers, so that no layer outweighs
    another. (Zhang et al., "LoLCATs", 2024.)"""

    needs_teacher = True

    def trained(self) -> list[nn.Parameter]:
        modules = linear_modules(self.student).values()
        return [parameter for module in modules for parameter in module.parameters()]

    def count(self, batch: Batch) -> int:
        return batch.tokens.numel()

    def summed(self, batch: Batch) -> Tensor:
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def record(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            calls.append((args, kwargs, output[0]))

        students = linear_modules(self.student)
        hooks = [
            self.teacher.get_submodule(name).register_forward_hook(record, with_kwargs=True)
            for name in students
        ]
        try:
            with torch.no_grad():
                self.teacher.base_model(**batch.inputs(self.teacher))
        finally:
            for hook in hooks:
                hook.remove()
        losses = []
        for module, (args, kwargs, wanted) in zip(students.values(), calls, strict=True):
            if batch.segment_ids is not None:
                kwargs = {**kwargs, "segment_ids": batch.segment_ids}
            losses.append(transfer_errors(module, args, kwargs, wanted))
        return torch.stack(losses).mean(0).sum() * batch.tokens.shape[1]


def transfer_errors(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor
) -> Tensor:
    """[B], the squared error of an attention module's output for the arguments that a teacher's
    module was given, relative to what that gave, `wanted` [B, T, C]."""
    given = module(*args, **{**kwargs, "attention_mask": None})[0]
    wanted = wanted.float()
    error = (given.float() - wanted).square().mean((1, 2))
    return error / wanted.square().mean((1, 2))


def transfer_error(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor
) -> Tensor:
    """`transfer_errors`, averaged over rows."""
    return transfer_errors(module, args, kwargs, wanted).mean()


class Distillation(Objective):
    """A share of the loss, `text`, is the cross-entropy on the text, the rest the Kullback–Leibler
    divergence from the teacher's distribution, in nats per token. The teacher may be any model with
    the same vocabulary."""

    needs_teacher = True

    def summed(self, batch: Batch) -> Tensor:
        logits, labels = self._logits(self.student, batch), batch.labels()
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.text > 0:
            loss = loss + self.text * summed_cross_entropy(logits, labels)
        if self.text < 1:
            far = summed_divergence(logits, self._wanted(batch), labels, self.temperature)
            loss = loss + (1 - self.text) * far
        return loss


class Imitation(Objective):
    """Learns to say what the teacher says, right or wrong. The loss is the Kullback–Leibler
    divergence from its distribution alone, in nats per token. Drafts are trained so. (Zhou et al.,
    "DistillSpec", ICLR 2024.)"""

    needs_teacher = True

    def summed(self, batch: Batch) -> Tensor:
        logits, wanted = self._logits(self.student, batch), self._wanted(batch)
        return summed_divergence(logits, wanted, batch.labels(), self.temperature)


class Medusa(Objective):
    """Trains heads on the teacher that guess what it will say after the next token. The teacher
    stays as it is. The loss is the divergence from the teacher's own distribution there; Cai et al.
    ("Medusa", 2.2.1) use the cross-entropy on the text. Each head weighs 0.8 times as much as the
    one before it, as in their work."""

    needs_teacher = True
    DECAY = 0.8

    def summed(self, batch: Batch) -> Tensor:
        matrix, labels = output_matrix(self.teacher), batch.labels()
        with torch.no_grad():
            states = self.teacher.base_model(**batch.inputs(self.teacher)).last_hidden_state
            wanted = F.linear(states, matrix)
        heads: list[Tensor] = self.student(states, matrix)
        losses = [
            self.DECAY**head
            * summed_divergence(
                logits[:, : -1 - head], wanted[:, 1 + head :], labels[:, 1 + head :]
            )
            for head, logits in enumerate(heads)
        ]
        return torch.stack(losses).sum() / sum(self.DECAY**head for head in range(len(heads)))


OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": Objective,
    "transfer": Transfer,
    "distillation": Distillation,
    "imitation": Imitation,
    "medusa": Medusa,
}


def chosen(student: nn.Module, which: str) -> list[nn.Parameter]:
    """The parameters that one of TRAINED means. Those that linearizing added are always among
    them."""
    parameters = list(student.parameters())
    if which == "all" or not isinstance(student, PreTrainedModel):
        return parameters
    if which == "attention":
        inside = {id(p) for module in attention_modules(student) for p in module.parameters()}
        return [p for p in parameters if id(p) in inside]
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    outside = {id(p) for end in ends if end is not None for p in end.parameters()}
    return [p for p in parameters if id(p) not in outside]


def summed_divergence(
    logits: Tensor, wanted: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """The Kullback–Leibler divergence of `logits` from `wanted`, both [B, T, V], in float32, summed
    over the positions from which a token of `labels` [B, T] is predicted. Both are divided by the
    temperature, and the result is multiplied with its square, so that gradients keep their size.
    (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.)"""
    kept = labels[:, 1:] != IGNORED
    found, target = (
        (x[:, :-1][kept].float() / temperature).log_softmax(-1) for x in (logits, wanted)
    )
    return F.kl_div(found, target, log_target=True, reduction="sum") * temperature**2


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of `labels` [B, T] under `logits` [B, T, V] one place before, in
    float32, summed over those that are not IGNORED."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The negative log-likelihood of the next token under `logits` [B, T, V], in float32, averaged
    over the B·(T-1) predictions."""
    return summed_cross_entropy(logits, tokens) / tokens[:, 1:].numel()
