"""Speculation never changes the text, whoever drafts."""

from __future__ import annotations

import random

import pytest
import torch

import linearized
from linearized.errors import ConfigError, ModelError, RequestError
from linearized.speculative import ModelDrafter, NgramDrafter, Sampling, Sequence, TokenTree

PROMPT = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8]


class Knowing:
    """Drafts what plain decoding will say, as far as `right` goes, then something else."""

    def __init__(self, text: list[int], *, right: int, wrong: int = 0) -> None:
        self.text, self.right, self.wrong = text, right, wrong

    def propose(self, tokens, sampling):
        rest = self.text[len(tokens) : len(tokens) + self.right]
        return TokenTree.chain(rest + [(rest or [0])[-1] + 1] * self.wrong)


class Random:
    """Draws trees of any shape, often empty."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab, self.random = vocab, random.Random(seed)

    def propose(self, tokens, sampling):
        size = self.random.choice([0, 0, 1, 2, 5, 13])
        return TokenTree(
            tuple(self.random.randrange(self.vocab) for _ in range(size)),
            tuple(self.random.randrange(-1, n) for n in range(size)),
        )


class Branching(Knowing):
    """The right continuation as one branch among wrong ones."""

    def propose(self, tokens, sampling):
        rest = self.text[len(tokens) : len(tokens) + self.right]
        guesses, parents, last = [], [], -1
        for token in rest:
            guesses += [(token + 1) % 61, token]
            parents += [last, last]
            last = len(guesses) - 1
        return TokenTree(tuple(guesses), tuple(parents))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 21])
def test_the_text_is_the_same_for_every_drafter(linear, temperature, length):
    """Groups of 8 and 40 new tokens: rounds begin at every offset and cross boundaries."""
    model = linear(group=8, taps=5)
    prompt = (PROMPT * 3)[:length]
    settings = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.95, "seed": 5}
    plain = linearized.generate(model, prompt, **settings)
    text = prompt + plain
    drafters = {
        "right": Knowing(text, right=5),
        "long": Knowing(text, right=20),
        "wrong": Knowing(text, right=0, wrong=3),
        "half right": Knowing(text, right=2, wrong=2),
        "branching": Branching(text, right=4),
        "random": Random(61, seed=1),
        "ngram": "ngram",
        "itself": model,
        "another": linear(group=4, taps=3, layers=1, seed=3),
        "unsure": ModelDrafter(linear(layers=1, seed=3), depth=6, width=3, floor=0.9),
    }
    for name, drafter in drafters.items():
        assert linearized.generate(model, prompt, drafter=drafter, **settings) == plain, name


@pytest.mark.parametrize("seed", range(12))
def test_the_text_is_the_same_in_float32(linear, seed):
    model = linear(dtype=torch.float32, group=8, taps=5, seed=seed)
    prompt = [seed + 1, 2, 3]
    plain = linearized.generate(model, prompt, max_new_tokens=40)
    for drafter in (Knowing(prompt + plain, right=6), Random(61, seed), "ngram", model):
        assert linearized.generate(model, prompt, max_new_tokens=40, drafter=drafter) == plain


def test_a_right_draft_saves_rounds(linear):
    model = linear(group=8)
    sampling = Sampling()
    plain = linearized.generate(model, PROMPT, max_new_tokens=40, stop_ids=())
    drafters = [
        (Knowing(PROMPT + plain, right=4), 8, 32),
        (Knowing(PROMPT + plain, right=0), 40, 0),
        (ModelDrafter(model, depth=4, width=1, floor=0.0), 8, 32),
    ]
    for drafter, rounds, accepted in drafters:
        text = Sequence(model, PROMPT, sampling=sampling, max_new_tokens=40)
        while not text.prefill():
            pass
        while text.finished is None:
            text.step(drafter.propose(text.tokens, sampling))
        assert text.new_tokens == plain
        assert (text.rounds, text.accepted) == (rounds, accepted)


def test_sampled_draft_and_target_share_their_noise(linear):
    """A draft equal to the target guesses its random choices too."""
    model = linear(group=8)
    sampling = Sampling(temperature=1.0, seed=9)
    text = Sequence(model, PROMPT, sampling=sampling, max_new_tokens=40)
    drafter = ModelDrafter(model, depth=4, width=1, floor=0.0)
    assert text.prefill()
    while text.finished is None:
        text.step(drafter.propose(text.tokens, sampling))
    assert text.accepted == 32


def test_end_of_text_inside_a_tree(linear):
    model = linear(group=8)
    plain = linearized.generate(model, PROMPT, max_new_tokens=30, stop_ids=())
    for stop in (plain[4], plain[11]):
        want = plain[: plain.index(stop) + 1]
        for drafter in (None, Knowing(PROMPT + plain, right=8), "ngram"):
            out = linearized.generate(
                model, PROMPT, max_new_tokens=30, stop_ids=[stop], drafter=drafter
            )
            assert out == want


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_max_new_tokens_inside_a_tree(linear, limit):
    model = linear(group=8)
    plain = linearized.generate(model, PROMPT, max_new_tokens=30, stop_ids=())
    drafter = Knowing(PROMPT + plain, right=8)
    out = linearized.generate(model, PROMPT, max_new_tokens=limit, drafter=drafter, stop_ids=())
    assert out == plain[:limit]


def test_prompts_longer_than_a_chunk(linear, monkeypatch):
    monkeypatch.setattr("linearized.speculative.sequence.PREFILL_CHUNK", 7)
    model = linear(group=8)
    prompt = PROMPT * 4
    text = Sequence(model, prompt, sampling=Sampling(), max_new_tokens=5)
    calls = 1
    while not text.prefill():
        calls += 1
    assert calls == 6
    monkeypatch.undo()
    while text.finished is None:
        text.step()
    assert text.new_tokens == linearized.generate(model, prompt, max_new_tokens=5)


def test_several_prompts_and_a_callback(linear):
    model = linear()
    seen: dict[int, list[int]] = {0: [], 1: []}
    out = linearized.generate(
        model, [PROMPT, PROMPT[:3]], max_new_tokens=9, drafter="ngram",
        on_tokens=lambda index, new: seen[index].extend(new),
    )  # fmt: skip
    assert out == [seen[0], seen[1]]
    assert out[1] == linearized.generate(model, PROMPT[:3], max_new_tokens=9)


def test_a_drafter_is_handed_another_text(linear):
    """Its memory is of one text; it notices that this is another."""
    model = linear()
    for drafter in (ModelDrafter(model), NgramDrafter()):
        sampling = Sampling()
        first = drafter.propose(PROMPT * 2, sampling)
        drafter.propose([1, 2, 1, 2, 1], sampling)
        assert drafter.propose(PROMPT * 2, sampling) == first
        assert drafter.propose(PROMPT * 2, sampling) == first


def test_ngram_finds_the_latest_continuation():
    drafter = NgramDrafter(depth=3)
    sampling = Sampling()
    assert drafter.propose([1, 2, 3, 9, 1, 2], sampling).tokens == (3, 9, 1)
    assert drafter.propose([1, 2, 3, 9, 1, 2, 4, 4, 1, 2], sampling).tokens == (4, 4, 1)
    assert drafter.propose([1, 2, 3], NgramDrafter) == TokenTree.empty


def test_errors_name_the_value(linear, llama):
    model = linear()
    with pytest.raises(RequestError, match="empty"):
        linearized.generate(model, [], max_new_tokens=3)
    with pytest.raises(RequestError, match="61 is outside the vocabulary of 61"):
        linearized.generate(model, [1, 61], max_new_tokens=3)
    with pytest.raises(RequestError, match="-3"):
        linearized.generate(model, [1], max_new_tokens=-3)
    with pytest.raises(ConfigError, match="medusa"):
        linearized.generate(model, [1], max_new_tokens=3, drafter="medusa")
    with pytest.raises(ConfigError, match="97.*61"):
        linearized.generate(model, [1], max_new_tokens=3, drafter=linear(vocab=97))
    with pytest.raises(ModelError, match="not linearized"):
        linearized.generate(llama(), [1], max_new_tokens=3)
