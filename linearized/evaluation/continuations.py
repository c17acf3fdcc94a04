"""How probable continuations of texts are: what multiple choice, last-word prediction and
lm-evaluation-harness ask of a model. Knows token ids; knows nothing of tasks.

Texts are read together, padded on the right, where a causal model sees nothing of it: a score does
not depend on its neighbours. Logits are made for the tokens that are asked about, and for no
others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from linearized.errors import DataError
from linearized.evaluation.logits import Reading

Pair = tuple[Sequence[int], Sequence[int]]
"""A context, and a continuation of it. Neither is empty."""


@dataclass(frozen=True, slots=True)
class Score:
    nats: float
    """Log-likelihood of the continuation."""
    greedy: bool
    """Would the model say just this?"""


def scores(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 4096,
    longest: int | None = None,
    report: Callable[[int], None] | None = None,
) -> list[Score]:
    """Scores of continuations, in the order of `pairs`. At most `batch_tokens` tokens are read at
    once, padding included, or one text; texts of similar lengths go together. Of a text longer than
    `longest` the last tokens are read. `report` is told how many are done.

    Raises:
        DataError: a context or a continuation without tokens.
    """
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            what = "continuation" if len(context) else "context"
            raise DataError(f"{what} {number} has no tokens; leave this question out")
    found: list[Score | None] = [None] * len(pairs)
    done = 0
    for batch in _batches(pairs, batch_tokens, longest):
        for index, score in zip(batch, _scores(model, [pairs[i] for i in batch], longest),
                                strict=True):  # fmt: skip
            found[index] = score
        done += len(batch)
        if report is not None:
            report(done)
    return [score for score in found if score is not None]


def split(encode: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, as the two are tokenized together. What a
    tokenizer joins across the border goes to the continuation: spaces at the end of the context, or
    bytes of characters. `encode` gives the ids of a text."""
    whole, alone = encode(context + continuation), encode(context.rstrip())
    pairs = enumerate(zip(whole, alone, strict=False))
    size = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(alone)))
    return whole[:size], whole[size:]


def _batches(pairs: Sequence[Pair], batch_tokens: int, longest: int | None) -> list[list[int]]:
    """Indices of texts to read together, the longest first: what does not fit in memory fails at
    once."""
    lengths = [_length(pair, longest) for pair in pairs]
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(pairs)), key=lambda i: (-lengths[i], i)):
        if room < 1:
            batches.append([])
            room = max(1, batch_tokens // lengths[index])
        batches[-1].append(index)
        room -= 1
    return batches


def _length(pair: Pair, longest: int | None) -> int:
    """Tokens that are read of a text. Its last token is only asked about."""
    length = len(pair[0]) + len(pair[1]) - 1
    return length if longest is None else min(length, longest)


@torch.no_grad()
def _scores(model: PreTrainedModel, pairs: Sequence[Pair], longest: int | None) -> list[Score]:
    rows, asked, wanted, sizes = [], [], [], []
    width = max(_length(pair, longest) for pair in pairs)
    for row, pair in enumerate(pairs):
        length = _length(pair, longest)
        ids = torch.tensor([*pair[0], *pair[1]], dtype=torch.int64)
        size = min(len(pair[1]), length)
        rows.append(ids[-1 - length : -1])
        asked.append(torch.arange(length - size, length) + row * width)
        wanted.append(ids[-size:])
        sizes.append(size)
    tokens = pad_sequence(rows, batch_first=True)
    targets = torch.cat(wanted).to(model.device)
    nats, greedy = _asked(Reading(model, tokens), torch.cat(asked), targets)
    parts = zip(nats.split(sizes), greedy.split(sizes), strict=True)
    return [Score(float(x.double().sum()), bool(same.all())) for x, same in parts]


def _asked(reading: Reading, asked: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihoods [N] of the tokens wanted [N], and are they the most probable ones?"""
    nats, greedy = [], []
    for part, logits in reading.chunks(asked):
        ids = wanted[part]
        nats.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == ids)
    return torch.cat(nats), torch.cat(greedy)
