"""One text: which drafted tokens it takes, where it ends, and what it says about them."""

from __future__ import annotations

import math

import pytest
import torch

from linearized.errors import ConfigError
from linearized.speculative import Sampling, Text, TokenTree

TREE = TokenTree(tokens=(0, 1, 2, 1, 3), parents=(-1, -1, 1, 2, 0))
"""1 2 1 is its longest path."""


def logits(places: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(places, size, generator=torch.Generator().manual_seed(seed)) * 2


def text(sampling: Sampling = Sampling(), **settings) -> Text:  # noqa: B008
    return Text([4, 0], sampling=sampling, **{"max_new_tokens": 20, **settings})


def takes(row: torch.Tensor, token: int, threshold: float, temperature: float) -> bool:
    """Medusa's rule, written out."""
    p = (row.double() / temperature).softmax(0).tolist()
    entropy = -sum(x * math.log(x) for x in p)
    return p[token] > min(threshold, math.sqrt(threshold) * math.exp(-entropy))


@pytest.mark.parametrize("seed", range(30))
def test_typical_acceptance_is_medusas(seed):
    sampling = Sampling(temperature=0.7, typical=0.3, seed=seed)
    given = logits(1 + len(TREE), seed=seed)

    def sampled(behind: int, depth: int) -> int:
        """As ever, there."""
        alone = Text([4] * (2 + depth), sampling=sampling, max_new_tokens=1)
        return alone.choose(given[behind : behind + 1], TokenTree.empty)[1][0]

    accepted = [
        takes(given[parent + 1], token, 0.3, 0.7) or sampled(parent + 1, depth - 1) == token
        for token, parent, depth in zip(TREE.tokens, TREE.parents, TREE.depths, strict=True)
    ]
    path, new = text(sampling).choose(given, TREE)
    assert path == TREE.deepest(accepted)
    assert new[:-1] == [TREE.tokens[node] for node in path]
    assert new[-1] == sampled(path[-1] + 1 if path else 0, len(path))


@pytest.mark.parametrize("typical", [0.05, 0.3, 1.0])
def test_typical_acceptance_takes_more_than_exact_sampling(typical):
    """Never less of a tree, whatever the threshold."""
    more = 0
    for seed in range(50):
        given = logits(1 + len(TREE), seed=seed)
        exact, lossy = (
            len(text(Sampling(temperature=1.0, typical=one, seed=seed)).choose(given, TREE)[0])
            for one in (0.0, typical)
        )
        assert lossy >= exact
        more += lossy > exact
    assert more


def test_log_probabilities_are_the_models_own():
    """Whatever temperature and bias say; behind the root first, then behind each accepted node."""
    given = logits(1 + len(TREE))
    one = text(Sampling(temperature=2.0, logit_bias={1: 5.0}), logprobs=2)
    piece = one.take([1, 2, 3], TREE, [1, 2], given)
    log_p = given.double().log_softmax(1)
    for place, token, said in zip((0, 2, 3), piece.tokens, piece.logprobs, strict=True):
        assert said.logprob == pytest.approx(float(log_p[place, token]))
        best = log_p[place].topk(2)
        assert [token for token, _ in said.top] == best.indices.tolist()
        assert [value for _, value in said.top] == pytest.approx(best.values.tolist())


def test_a_text_ends_where_it_must():
    given = logits(1 + len(TREE))
    short = text(max_new_tokens=2)
    piece = short.take([1, 2, 3], TREE, [1, 2], given)
    assert (piece.tokens, piece.finished, short.finished) == ((1, 2), "length", "length")
    assert short.accepted.total() == 2 and short.drafted == {1: 2, 2: 2, 3: 1}
    stopping = text(Sampling(stop_ids=frozenset({2})))
    piece = stopping.take([1, 2, 3], TREE, [1, 2], given)
    assert (piece.tokens, piece.finished, stopping.new_tokens) == ((1, 2), "stop", [1, 2])
    going_on = text()
    assert going_on.take([1], TREE, [], given).finished is None and going_on.finished is None


def letters(tokens: list[int]) -> str:
    return "".join("abcde"[token] for token in tokens)


def test_a_text_goes_on_where_another_stopped():
    """What is there counts: towards stop strings, min_tokens, the length."""
    empty, given = TokenTree.empty, logits(1)
    for min_tokens, finished in ((0, "stop"), (1, "stop"), (2, None)):
        one = Text(
            [0, 1, 2], num_prompt=1, sampling=Sampling(min_tokens=min_tokens), max_new_tokens=9,
            stop=["cd"], decode=letters,
        )  # fmt: skip
        piece = one.take([3], empty, [], given)
        assert piece.finished == finished, min_tokens
    whole = Text([0], sampling=Sampling(), max_new_tokens=9, stop=["cd"], decode=letters)
    said = [whole.take([token], empty, [], given).text for token in (1, 2, 3)]
    assert said == ["b", "", ""] and whole.finished == "stop"
    rest = {"num_prompt": 1, "sampling": Sampling(stop_ids={3})}
    assert Text([0, 1, 3], max_new_tokens=9, **rest).finished == "stop"
    assert Text([3], max_new_tokens=9, sampling=Sampling(stop_ids={3})).finished is None
    assert Text([0, 1, 2], max_new_tokens=2, **rest).finished == "length"
    known = Text([0, 2, 3], **{**rest, "sampling": Sampling()}, max_new_tokens=9, stop=["cd"],
                 decode=letters)  # fmt: skip
    assert known.finished == "stop"


def test_a_text_that_cannot_be_decoded_ends():
    def decode(tokens: list[int]) -> str:
        if 3 in tokens:
            raise ValueError("no such letter")
        return letters(tokens)

    one = text(decode=decode)
    assert one.take([1], TokenTree.empty, [], logits(1)).text == "b"
    piece = one.take([2, 3], TREE, [1], logits(1 + len(TREE)))
    assert (piece.tokens, piece.finished, one.finished) == ((), "error", "error")
    assert one.tokens == [4, 0, 1] and "no such letter" in str(one.error)


def test_stop_strings_are_not_empty():
    with pytest.raises(ConfigError, match="must not be empty"):
        text(stop=["a", ""], decode=letters)
