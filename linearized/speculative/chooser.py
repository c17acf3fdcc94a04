"""The choices of a whole round: which tokens all its texts take, from one pass over all logits.

What a text takes is what `Text.choose` would say, whatever its neighbours are. Greedy texts cost
one argmax and one transfer to the host, all together; texts that sample are filtered and given
their noise together, and travel with them.

B texts, N nodes of the widest tree and its root, V vocabulary, R places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linearized.speculative.sampling import checked, noise, tempered
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree

BLOCK = 1 << 18
"""Scores that are worked out at once on a CPU; more do not fit its caches."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token is to be chosen: behind a text, and a path of guesses on top of it."""

    text: Text
    path: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What `Text.choose` says of one text."""

    path: list[int]
    """The accepted nodes of its tree."""
    new: list[int]
    """Their tokens, and one more."""
    error: Exception | None = None
    """Why there is none."""


def choose(logits: Tensor, texts: Sequence[Text], trees: Sequence[TokenTree]) -> list[Choice]:
    """One choice for each text, from logits [B, N, V] behind its last token and behind each node
    of its tree. Where logits are no numbers, a text's new tokens end with NO_TOKEN."""
    width = logits.shape[1]
    flat = logits.flatten(0, 1)
    chosen = checked(*_best(flat))
    rows: list[int] = []
    places: list[Place] = []
    for number, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        if not text.sampler.is_plain:
            rows += range(number * width, number * width + 1 + len(tree))
            places += [Place(text), *(Place(text, path) for path in tree.paths())]
    for part, scores in scored(flat, rows, places):
        chosen[[rows[i] for i in part]] = checked(*_best(scores))
    ids = chosen.tolist()
    choices = []
    for number, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        first, last = number * width, number * width + 1 + len(tree)
        if text.sampling.typical and len(tree):
            path, new = text.choose(logits[number, : 1 + len(tree)], tree)
        else:
            path, new = tree.walk(ids[first:last])
        choices.append(Choice(path, new))
    return choices


def scored(
    logits: Tensor, rows: Sequence[int], places: Sequence[Place]
) -> Iterator[tuple[range, Tensor]]:
    """What the next tokens at these places are the argmax of: row `rows[i]` of logits [·, V] is of
    place i. In parts, as (which of the places, scores), in float32 at least for texts with biases
    or penalties, and in float64 for those that sample. `Sampler.scores` gives the same."""
    size = BLOCK if logits.device.type == "cpu" else 1 << 24
    for part in _parts(places, max(size // logits.shape[1], 1)):
        some = logits.index_select(
            0, torch.tensor(rows[part.start : part.stop], device=logits.device)
        )
        mine = places[part.start : part.stop]
        if mine[0].text.sampler.is_plain:
            yield part, some
            continue
        adjusted = []
        for start, stop in _runs([place.text for place in mine]):
            text, paths = mine[start].text, [place.path for place in mine[start:stop]]
            adjusted.append(text.sampler.adjusted(some[start:stop], text.tokens, paths))
        kind = adjusted[0].dtype
        for one in adjusted:
            kind = torch.promote_types(kind, one.dtype)
        some = torch.cat([one.to(kind) for one in adjusted]) if len(adjusted) > 1 else adjusted[0]
        if mine[0].text.sampling.temperature:
            spots = [(p.text.sampler, len(p.text.tokens), len(p.path)) for p in mine]
            some = tempered(some, [place.text.sampling for place in mine]).add_(noise(spots, some))
        yield part, some


def _parts(places: Sequence[Place], most: int) -> Iterator[range]:
    """Neighbouring places, so many at most, of texts of one kind: plain, adjusted, sampled."""
    kinds = [(p.text.sampler.is_plain, p.text.sampling.temperature > 0) for p in places]
    for start, stop in _runs(kinds):
        for begin in range(start, stop, most):
            yield range(begin, min(begin + most, stop))


def _runs(values: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Where equal values stand side by side, as (first, behind the last)."""
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            yield start, end
            start = end


def _best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """[R], where the highest score of each row is, the first of equal ones, and what it is. Of
    rows with a NaN: the first NaN."""
    if scores.device.type != "cpu":
        best = scores.max(1)
        return best.indices, best.values
    # NumPy's argmax uses the processor's vectors, torch's does not: 20 times as fast.
    plain = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    indices = torch.from_numpy(plain.detach().numpy().argmax(1))
    return indices, plain.gather(1, indices[:, None])[:, 0]
