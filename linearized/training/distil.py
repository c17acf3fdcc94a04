"""Distillation in one process: a linearized model learns to say what its softmax teacher says.
Knows models and token rows; knows no engine, no cluster.

The loss is the Kullback–Leibler divergence from the teacher's distribution, if asked for with a
share of the cross-entropy on the text beside it. It is worked out from hidden states, so that the
logits of a large vocabulary are never there as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearized.errors import ConfigError, DataError
from linearized.medusa import output_matrix
from linearized.training.divergence import linear_divergence
from linearized.training.objective import TRAINED, chosen
from linearized.training.optim import Descent, Optim

Report = Callable[[int, float], None]
"""Is told after each step how many there were, and the loss in nats a token."""


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    optim: Optim,
    trained: str = "layers",
    text: float = 0.0,
    micro: int = 1,
    report: Report | None = None,
) -> None:
    """One step a batch of tokens [B, T]; gradients are added up over `micro` rows at a time. The
    student must not share the weights that it trains with the teacher. The parameters that
    linearizing added learn in any case.

    Raises:
        ConfigError: `trained` is none of `TRAINED`, or such a weight is the teacher's, too.
        DataError: the loss is no number any more.
    """
    parameters = choose(student, teacher, trained)
    descent = Descent(optim, student, len(batches))
    teacher.eval().requires_grad_(False)
    student.train()
    loss_of = _loss_of(student, teacher, text)
    for step, tokens in enumerate(batches):
        tokens = tokens.to(student.device)
        total, count = 0.0, tokens.numel()
        for rows in tokens.split(micro):
            loss = loss_of(rows)
            (loss / count).backward()
            total += float(loss.detach())
        norm = descent.clip(parameters)
        if not bool(norm.isfinite()):
            raise DataError(
                f"the gradient is {float(norm)} at step {step}; lower the learning rate"
            )
        descent.step()
        if report is not None:
            report(step + 1, total / count)
    student.eval().requires_grad_(True)


def choose(student: PreTrainedModel, teacher: PreTrainedModel, trained: str) -> list[nn.Parameter]:
    """Let these parameters require a gradient, and no others."""
    if trained not in TRAINED:
        raise ConfigError(f"trained must be one of {', '.join(TRAINED)}, got {trained!r}")
    student.requires_grad_(False)
    found = chosen(student, trained)
    taught = {p.data_ptr() for p in teacher.parameters()}
    if any(p.data_ptr() in taught for p in found):
        raise ConfigError(
            f"trained={trained!r} would train weights that the teacher has in the same memory; "
            "give the student a copy of its own"
        )
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def _loss_of(
    student: PreTrainedModel, teacher: PreTrainedModel, text: float
) -> Callable[[Tensor], Tensor]:
    """The loss of rows [B, T], summed over their B·T positions."""
    if _is_plain(student) and _is_plain(teacher):
        return lambda tokens: loss_from_hidden(student, teacher, tokens, text)
    return lambda tokens: loss_from_logits(student, teacher, tokens, text)


def loss_from_hidden(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, text: float
) -> Tensor:
    with torch.no_grad():
        wanted = teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return linear_divergence(
        hidden.flatten(0, 1), output_matrix(student), wanted.flatten(0, 1), output_matrix(teacher),
        F.pad(tokens[:, 1:], (0, 1), value=-100).flatten(), text=text,
    )  # fmt: skip


def loss_from_logits(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, text: float
) -> Tensor:
    with torch.no_grad():
        wanted = teacher(input_ids=tokens, use_cache=False).logits
    logits = student(input_ids=tokens, use_cache=False).logits.float()
    apart = F.kl_div(
        logits.log_softmax(-1), wanted.float().log_softmax(-1), log_target=True, reduction="sum"
    )
    told = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return (1 - text) * apart + text * told


@torch.no_grad()
def _is_plain(model: PreTrainedModel) -> bool:
    """Are its logits the product of the last hidden state and the output matrix, and no more?"""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    tokens = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    logits = model(input_ids=tokens, use_cache=False).logits
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    product = F.linear(hidden, head.weight)
    if product.shape != logits.shape:
        return False
    error = (product.float() - logits.float()).norm() / logits.float().norm().clamp(min=1e-6)
    return bool(error < 1e-2)
