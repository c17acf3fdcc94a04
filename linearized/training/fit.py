"""Attention transfer in one process: every linear attention learns to give what the softmax layer
in its place gives. Knows models and token rows; knows no engine, no cluster.

Layers learn apart from each other, each from the teacher's own input to it, so that one forward of
the teacher teaches all of them, and no layer's gradient has to be kept for another's. (Zhang et
al., "LoLCATs", 2024.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearized.config import LinearConfig
from linearized.models import linear_modules, linearize
from linearized.slots import attention_modules
from linearized.training.objective import transfer_error
from linearized.training.optim import Descent, Optim

Report = Callable[[int, dict[str, float]], None]
"""Is told after each step how many there were, and the error of each layer."""


def student_of(
    teacher: PreTrainedModel, config: LinearConfig, *, shared: bool = True
) -> PreTrainedModel:
    """A linearized copy with attention weights of its own. All other weights are the teacher's, in
    memory, too; unless `shared` is False."""
    own = {id(p) for module in attention_modules(teacher) for p in module.parameters()}
    others = [x for x in (*teacher.parameters(), *teacher.buffers()) if id(x) not in own]
    copied = copy.deepcopy(teacher, {id(x): x for x in others} if shared else None)
    return linearize(copied, config)


def fit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    optim: Optim,
    report: Report | None = None,
) -> None:
    """One step a batch of tokens [B, T]. Trains the attention modules of `student`: the loss of a
    layer is the squared error of its output, relative to the teacher's output."""
    modules = linear_modules(student)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for module in modules.values():
        module.requires_grad_(True)
    descent = Descent(optim, student, len(batches), betas=(0.9, 0.99))
    teacher.eval()
    student.train()
    with Lesson(student, teacher) as lesson:
        for step, tokens in enumerate(batches):
            errors = lesson(tokens, learns=True)
            for module in modules.values():
                descent.clip(module.parameters())
            descent.step()
            if report is not None:
                report(step + 1, errors)
    student.eval().requires_grad_(True)


@torch.no_grad()
def errors(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Tensor]
) -> dict[str, float]:
    """The error of each layer, by the name of its attention module, averaged over batches."""
    with Lesson(student.eval(), teacher.eval()) as lesson:
        found = [lesson(tokens) for tokens in batches]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


class Lesson:
    """A forward of the teacher in which each of its attention modules shows its input and output
    to the student's."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self._teacher = teacher
        self._errors: dict[str, float] = {}
        self._learns = False
        self._hooks = [
            teacher.get_submodule(name).register_forward_hook(
                self._shown(name, module), with_kwargs=True
            )
            for name, module in linear_modules(student).items()
        ]

    def __enter__(self) -> Lesson:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, tokens: Tensor, *, learns: bool = False) -> dict[str, float]:
        """The layers' errors. With `learns`, their gradients are added up."""
        self._errors, self._learns = {}, learns
        with torch.no_grad():
            self._teacher.base_model(input_ids=tokens.to(self._teacher.device), use_cache=False)
        return self._errors

    def _shown(self, name: str, student: nn.Module) -> Callable[..., None]:
        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with torch.set_grad_enabled(self._learns):
                loss = transfer_error(student, args, kwargs, output[0])
                if self._learns:
                    loss.backward()
            self._errors[name] = float(loss)

        return show
