"""How far a model's predictions are from another's, on the same text. Knows models and tokens.

B batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearized.errors import ModelError
from linearized.evaluation.logits import Reading


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over some predictions. Two of them add up to that over both."""

    nats: float
    """The Kullback–Leibler divergence of the student from the teacher, summed."""
    same: int
    """How often the most probable token is the same."""
    count: int
    """Number of predictions."""

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.nats + other.nats, self.same + other.same, self.count + other.count)

    @property
    def divergence(self) -> float:
        """Nats a token."""
        return self.nats / self.count

    @property
    def top1(self) -> float:
        return self.same / self.count


def agreement(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Tensor]
) -> Agreement:
    """Of all predictions in batches of tokens [B, T].

    Raises:
        ModelError: the two have other vocabularies.
    """
    found = [_agreement(student, teacher, tokens) for tokens in batches]
    return sum(found[1:], start=found[0])


@torch.no_grad()
def _agreement(student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor) -> Agreement:
    sizes = [int(m.config.get_text_config().vocab_size) for m in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"a model with {sizes[0]} tokens cannot be compared with one of {sizes[1]} token by "
            "token; name the model that it was made from as its teacher"
        )
    nats, same, count = 0.0, 0, 0
    pairs = zip(Reading(student, tokens).chunks(), Reading(teacher, tokens).chunks(), strict=True)
    for (_, given), (_, wanted) in pairs:
        wanted = wanted.to(given.device)
        q, p = given.log_softmax(-1), wanted.log_softmax(-1)
        nats += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        same += int((given.argmax(-1) == wanted.argmax(-1)).sum())
        count += len(given)
    return Agreement(nats, same, count)
