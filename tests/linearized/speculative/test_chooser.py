"""Choices of a whole round are those of each text alone, bit by bit."""

from __future__ import annotations

import math
import random

import pytest
import torch

from linearized.speculative import Sampling, Text, TokenTree
from linearized.speculative.chooser import Place, choose, scored
from linearized.speculative.sampling import NO_TOKEN

VOCAB = 300
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, seed=1),
    Sampling(temperature=0.8, seed=1, choice=3),
    Sampling(temperature=1.5, top_k=7, seed=2),
    Sampling(temperature=0.3, top_p=0.9, seed=3),
    Sampling(temperature=1.0, top_k=50, top_p=0.5, min_p=0.02, seed=4),
    Sampling(temperature=1.0, min_p=0.3, seed=5),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(temperature=0.7, presence_penalty=0.5, logit_bias={5: 2.0}, seed=6),
    Sampling(min_tokens=9, stop_ids=frozenset({1, 2})),
    Sampling(temperature=0.9, typical=0.2, seed=7),
    Sampling(temperature=1e-300, top_p=1e-9, seed=8),
]


def tree(draw: random.Random) -> TokenTree:
    size = draw.choice([0, 1, 4, 9])
    return TokenTree(
        tuple(draw.randrange(VOCAB) for _ in range(size)),
        tuple(draw.randrange(-1, n) for n in range(size)),
    )


def texts(draw: random.Random, count: int) -> list[Text]:
    return [
        Text(
            [draw.randrange(VOCAB) for _ in range(draw.choice([1, 5, 30]))],
            sampling=draw.choice(SAMPLINGS),
            max_new_tokens=50,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_choices_are_those_of_each_text_alone(seed, dtype, monkeypatch):
    """Many of the logits are equal, in bfloat16 most."""
    draw = random.Random(seed)
    monkeypatch.setattr(
        "linearized.speculative.chooser.BLOCK", draw.choice([1, 7 * VOCAB, 1 << 22])
    )
    monkeypatch.setattr("linearized.speculative.sampling.PREFIXES", (5, 40))
    group = texts(draw, draw.choice([1, 3, 8]))
    trees = [tree(draw) for _ in group]
    width = 1 + max(map(len, trees))
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(group), width, VOCAB, generator=made, dtype=torch.float64)
    logits = (logits * draw.choice([1, 3])).to(dtype)
    for number, one in enumerate(trees):  # what is beyond a tree is nobody's
        logits[number, 1 + len(one) :] = math.nan
    # Right guesses, as there are in a good tree.
    found = choose(logits, group, trees)
    for row, (text, its) in enumerate(zip(group, trees, strict=True)):
        text.rest()
        want = text.choose(logits[row, : 1 + len(its)], its)
        assert (found[row].path, found[row].new) == want


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_each_text_alone(seed):
    draw = random.Random(seed)
    group = texts(draw, 5)
    places = [
        Place(text, tuple(draw.randrange(VOCAB) for _ in range(length)))
        for text in group
        for length in (0, 1, 3)
    ]
    logits = torch.randn(40, VOCAB)
    rows = draw.sample(range(40), len(places))
    seen = 0
    for part, scores in scored(logits, rows, places):
        for number, got in zip(part, scores, strict=True):
            text, path = places[number].text, places[number].path
            text.rest()
            want = text.sampler.scores(logits[rows[number]][None], text.tokens, [path])[0]
            assert torch.equal(got, want.to(got.dtype))
            seen += 1
    assert seen == len(places)


def test_accepted_nodes_are_followed():
    logits = torch.full((2, 3, 9), -1.0)
    for place, token in ((0, 4), (1, 5), (2, 6)):
        logits[:, place, token] = 1.0
    group = [Text([1], sampling=Sampling(), max_new_tokens=9) for _ in range(2)]
    right, wrong = choose(logits, group, [TokenTree.chain([4, 5]), TokenTree.chain([3, 5])])
    assert (right.path, right.new) == ([0, 1], [4, 5, 6])
    assert (wrong.path, wrong.new) == ([], [4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)])
def test_where_logits_are_no_numbers_there_is_no_token(bad, sampling):
    logits = torch.randn(3, 2, 9)
    logits[:, 0, 4] = 100.0
    logits[1, 0, 7] = bad  # where it chooses
    logits[2, 1, 7] = bad  # behind a guess that is wrong
    group = [Text([1], sampling=sampling, max_new_tokens=9) for _ in range(3)]
    found = choose(
        logits, group, [TokenTree.chain([4]), TokenTree.chain([4]), TokenTree.chain([3])]
    )
    assert [choice.new[-1] for choice in found] == [found[0].new[-1], NO_TOKEN, 4]
    assert found[1].new == [NO_TOKEN] and NO_TOKEN not in found[0].new
