"""What a step of training minimises. Knows models and tokens; knows nothing of optimizers.

An objective is a module around the student, so that DeepSpeed wraps one thing. The teacher hangs
beside it, unregistered: it is frozen, and neither optimized, sharded nor saved with the student.
Each returns a scalar loss for tokens [B, T].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.medusa import output_matrix
from linearized.models import linear_modules


class Objective(nn.Module):
    """Predicts the next token. The loss is the cross-entropy, in nats per token."""

    needs_teacher = False

    def __init__(self, student: nn.Module, teacher: PreTrainedModel | None = None) -> None:
        super().__init__()
        if self.needs_teacher != (teacher is not None):
            wants = "a" if self.needs_teacher else "no"
            raise ConfigError(f"objective {type(self).__name__} takes {wants} teacher")
        self.student = student
        self._beside = [teacher.eval().requires_grad_(False)] if teacher is not None else []
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained():
            parameter.requires_grad_(True)

    @property
    def teacher(self) -> PreTrainedModel:
        return self._beside[0]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that this objective trains."""
        return list(self.student.parameters())

    def forward(self, tokens: Tensor) -> Tensor:
        return cross_entropy(self.student(input_ids=tokens, use_cache=False).logits, tokens)


class Transfer(Objective):
    """Attention transfer: each layer's linear attention gets the input of the teacher's layer and
    learns to give its output. Only attention modules are trained. The loss is the squared error
    relative to the teacher's output, averaged over layers, so that no layer outweighs another.
    (Zhang et al., "LoLCATs", 2024.)"""

    needs_teacher = True

    def trained(self) -> list[nn.Parameter]:
        modules = linear_modules(self.student).values()
        return [p for module in modules for p in module.parameters()]

    def forward(self, tokens: Tensor) -> Tensor:
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
                self.teacher.base_model(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        losses = []
        for module, (args, kwargs, wanted) in zip(students.values(), calls, strict=True):
            losses.append(transfer_error(module, args, kwargs, wanted))
        return torch.stack(losses).mean()


def transfer_error(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Tensor
) -> Tensor:
    """The squared error of an attention module's output for the arguments that a teacher's module
    was given, relative to what that gave, `wanted`."""
    given = module(*args, **{**kwargs, "attention_mask": None})[0]
    wanted = wanted.float()
    return F.mse_loss(given.float(), wanted) / wanted.square().mean()


class Distillation(Objective):
    """Half of the loss is the cross-entropy on the text, half the Kullback–Leibler divergence from
    the teacher's distribution, in nats per token. The teacher may be any model with the same
    vocabulary."""

    needs_teacher = True

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.student(input_ids=tokens, use_cache=False).logits
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits
        return (cross_entropy(logits, tokens) + divergence(logits, wanted)) / 2


class Imitation(Objective):
    """Learns to say what the teacher says, right or wrong. The loss is the Kullback–Leibler
    divergence from its distribution alone, in nats per token. Drafts are trained so. (Zhou et al.,
    "DistillSpec", ICLR 2024.)"""

    needs_teacher = True

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits
        return divergence(self.student(input_ids=tokens, use_cache=False).logits, wanted)


class Medusa(Objective):
    """Trains heads on the teacher that guess what it will say after the next token. The teacher
    stays as it is. The loss is the divergence from the teacher's own distribution there; Cai et al.
    ("Medusa", 2.2.1) use the cross-entropy on the text. Each head weighs 0.8 times as much as the
    one before it, as in their work."""

    needs_teacher = True
    DECAY = 0.8

    def forward(self, tokens: Tensor) -> Tensor:
        matrix = output_matrix(self.teacher)
        with torch.no_grad():
            hidden = self.teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = F.linear(hidden, matrix)
        heads: list[Tensor] = self.student(hidden, matrix)
        losses = [
            self.DECAY**head * divergence(logits[:, : -1 - head], wanted[:, 1 + head :])
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


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """The Kullback–Leibler divergence of `logits` from `wanted`, both [B, T, V], in float32,
    averaged over B and T."""
    return F.kl_div(
        logits.float().log_softmax(-1).flatten(0, 1),
        wanted.float().log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The negative log-likelihood of the next token under `logits` [B, T, V], in float32, averaged
    over the B·(T-1) predictions."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
