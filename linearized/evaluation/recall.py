"""What a model can look up in its own text, long after it read it. Knows tokens, and models as
they are called.

MQAR (Arora et al., "Zoology", 2023): pairs of a key and a value, then the keys again in another
order, each to be answered by its value. Passkey (Mohtashami and Jaggi, "Landmark Attention", 2023):
a number in a sentence somewhere in a long text, asked for at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from linearized.errors import ConfigError
from linearized.evaluation.logits import Reading

IGNORED = -100
"""A label that says that nothing is asked here."""

STATED = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
ASKED = "\nWhat is the pass key? The pass key is"


def mqar(
    rows: int, length: int, *, pairs: int, vocab: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens and labels, [rows, length]. The first 2·pairs tokens are keys and values in turn, keys
    from the lower half of 1 … vocab-1, values from the upper half. Then every key comes once more,
    at a random even place, and its label there is its value. All other tokens are 0."""
    half = vocab // 2
    room = (length - 2 * pairs) // 2
    if not 0 < pairs <= min(room, half - 1):
        raise ConfigError(f"{pairs} pairs do not fit {length} tokens of {vocab} kinds")
    keys = _drawn(rows, half - 1, pairs, generator) + 1
    values = torch.randint(half, vocab, (rows, pairs), generator=generator)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + 2 * _drawn(rows, room, pairs, generator)
    tokens.scatter_(1, places, keys)
    labels.scatter_(1, places, values)
    return tokens, labels


def passkey(
    encode: Callable[[str], list[int]],
    filler: Tensor,
    *,
    depth: float,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Tokens [T] as many as `filler` has, and how many of them, the last ones, are the answer: a
    number of five digits that is stated `depth` (0 … 1) of the way into the filler."""
    key = str(int(torch.randint(10_000, 100_000, (), generator=generator)))
    stated, asked = encode(STATED.format(key=key)), encode(ASKED)
    answer = encode(f"{ASKED} {key}")[len(asked) :]
    room = len(filler) - len(stated) - len(asked) - len(answer)
    if room < 1:
        raise ConfigError(
            f"a filler of {len(filler)} tokens has no room for a pass key; use longer rows"
        )
    at = round(depth * room)
    parts = [filler[:at].tolist(), stated, filler[at:room].tolist(), asked, answer]
    return torch.tensor([token for part in parts for token in part]), len(answer)


@torch.no_grad()
def answer(model: PreTrainedModel, tokens: Tensor, size: int) -> tuple[float, bool]:
    """Nats a token of the last `size` of [T] tokens, and would the model say just these?"""
    labels = torch.full_like(tokens, IGNORED)
    labels[-1 - size : -1] = tokens[-size:]
    right, nats, _ = answers(model, tokens[None], labels[None])
    return nats / size, right == size


@torch.no_grad()
def answers(model: PreTrainedModel, tokens: Tensor, labels: Tensor) -> tuple[int, float, int]:
    """How many questions of [B, T] tokens and labels a model answers, the nats of the right
    answers, and how many questions there are."""
    places = (labels != IGNORED).flatten().nonzero()[:, 0].to(model.device)
    wanted = labels.to(model.device).flatten()[places]
    right, nats = 0, 0.0
    for part, logits in Reading(model, tokens).chunks(places):
        right += int((logits.argmax(-1) == wanted[part]).sum())
        nats += float(F.cross_entropy(logits, wanted[part], reduction="sum"))
    return right, nats, len(wanted)


def spoken(
    tokens: Tensor, labels: Tensor, words: Sequence[int], filler: int
) -> tuple[Tensor, Tensor]:
    """Rows of `mqar` in the tokens of a model that has learnt a language: `words` stand for 1 …
    vocab-1, `filler` for 0."""
    table = torch.tensor([filler, *words], dtype=torch.int64)
    asked = labels != IGNORED
    return table[tokens], torch.where(asked, table[labels.clamp(min=0)], IGNORED)


def _drawn(rows: int, of: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count] different numbers from 0 … of-1 in each row, in random order."""
    return torch.rand(rows, of, generator=generator).argsort(1)[:, :count]
