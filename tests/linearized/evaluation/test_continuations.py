"""Scores of continuations are those of each text alone."""

from __future__ import annotations

import random

import pytest
import torch

import linearized
from linearized.errors import DataError
from linearized.evaluation.continuations import scores, split
from linearized.models import new_parameters

VARIANTS = ["softmax", *linearized.config.ATTENTIONS, "anchored", "hybrid"]


def made(llama, name):
    model = llama()
    if name == "softmax":
        return model
    settings = {"group": 8, "taps": 4, **({"layers": (0,)} if name == "hybrid" else {})}
    kind = "grouped" if name == "hybrid" else name
    linearized.linearize(model, linearized.LinearConfig.named(kind, **settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in new_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def pairs(count=9):
    draw = random.Random(0)
    ids = lambda low, high: [draw.randrange(1, 61) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [(ids(1, 30), ids(1, 6)) for _ in range(count)]


@torch.no_grad()
def alone(model, context, continuation):
    tokens = torch.tensor([[*context, *continuation]])
    logs = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    places = range(len(context) - 1, tokens.shape[1] - 1)
    nats = sum(float(logs[t, tokens[0, t + 1]]) for t in places)
    return nats, all(int(logs[t].argmax()) == int(tokens[0, t + 1]) for t in places)


@pytest.mark.parametrize("name", VARIANTS)
def test_neighbours_and_padding_change_nothing(llama, name):
    """Padding pollutes the state of linear models elsewhere (flash-linear-attention#1272), and a
    batch is read as one here (lm-evaluation-harness#3207)."""
    model, asked = made(llama, name), pairs()
    calls = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))
    found = scores(model, asked, batch_tokens=100)
    hook.remove()
    assert len(calls) < len(asked)
    for score, (context, continuation) in zip(found, asked, strict=True):
        nats, greedy = alone(model, context, continuation)
        assert score.nats == pytest.approx(nats, rel=1e-4, abs=1e-4)
        assert score.greedy == greedy


def test_what_the_model_would_say_is_known(llama):
    model = llama()
    context = [5, 6, 7]
    said = linearized.generate(
        linearized.models.decoder(model), context, max_new_tokens=3, stop_ids=[]
    )
    other = [*said[:2], (said[2] + 1) % 61]
    found = scores(model, [(context, said), (context, other)])
    assert [score.greedy for score in found] == [True, False]


def test_of_a_long_text_the_end_is_read(llama):
    model = llama()
    context, continuation = list(range(1, 41)), [3, 4]
    (found,) = scores(model, [(context, continuation)], longest=10)
    (want,) = scores(model, [(context[-9:], continuation)])
    assert found.nats == pytest.approx(want.nats, abs=1e-5)
    (found,) = scores(model, [([1, 2], context)], longest=10)
    (want,) = scores(model, [(context[-11:-10], context[-10:])])
    assert found.nats == pytest.approx(want.nats, abs=1e-4)


def test_progress_is_told_and_nothing_is_refused(llama):
    told = []
    scores(llama(), pairs(5), batch_tokens=1, report=told.append)
    assert told == [1, 2, 3, 4, 5]
    assert scores(llama(), []) == []
    for pair, what in (([], [1]), "context 0"), (([1], []), "continuation 0"):
        with pytest.raises(DataError, match=f"{what} has no tokens"):
            scores(llama(), [pair])


def test_a_text_is_split_as_it_is_tokenized(tokenizer):
    def encode(text):
        return tokenizer(text)["input_ids"]

    texts = [("the quick", " brown fox"), ("the quick ", "brown fox"), ("日本", "語"), ("", "fox")]
    for context, continuation in texts:
        before, after = split(encode, context, continuation)
        assert before + after == encode(context + continuation)
        alone = encode(context.rstrip())
        assert after and alone[: len(before)] == before
        assert len(before) == len(alone) or context == "日本"
