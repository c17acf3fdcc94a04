"""Recall tasks ask what they say, and can be answered from their text alone."""

from __future__ import annotations

import pytest
import torch

from linearized.errors import ConfigError
from linearized.evaluation.recall import IGNORED, answer, answers, mqar, passkey, spoken


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_key_is_asked_once_and_has_one_answer():
    tokens, labels = mqar(50, 64, pairs=7, vocab=40, generator=seeded())
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        told = dict(zip(row[0:14:2], row[1:14:2], strict=True))
        assert len(told) == 7 and max(told) < 20 <= min(told.values())
        asked = [i for i, label in enumerate(wanted) if label != IGNORED]
        assert len(asked) == 7 and asked[0] >= 14
        assert {row[i]: wanted[i] for i in asked} == told
        assert all(row[i] == 0 for i in range(14, 64) if i not in asked)
    assert torch.equal(tokens, mqar(50, 64, pairs=7, vocab=40, generator=seeded())[0])
    with pytest.raises(ConfigError, match="20 pairs do not fit 64 tokens"):
        mqar(1, 64, pairs=20, vocab=100, generator=seeded())


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_passkey_is_stated_and_asked(depth):
    def encode(text: str) -> list[int]:
        return list(text.encode())

    filler = torch.full((400,), ord("x"))
    tokens, size = passkey(encode, filler, depth=depth, generator=seeded())
    text = bytes(tokens.tolist()).decode()
    assert len(tokens) == 400
    question, answer = text[:-size], text[-size:].strip()
    assert answer.isdigit() and len(answer) == 5
    assert f"The pass key is {answer}." in question and question.endswith("The pass key is")
    found = question.index("\nThe pass key is")
    assert found == round(depth * text.count("x"))
    with pytest.raises(ConfigError, match="50 tokens has no room"):
        passkey(encode, filler[:50], depth=0, generator=seeded())


def test_answers_are_counted_where_something_is_asked(llama):
    tokens, labels = mqar(3, 40, pairs=4, vocab=30, generator=seeded())
    words = list(range(31, 60))
    spoken_tokens, spoken_labels = spoken(tokens, labels, words, 7)
    assert set(spoken_tokens[tokens == 0].tolist()) == {7}
    assert torch.equal(spoken_tokens[tokens > 0], tokens[tokens > 0] + 30)
    assert torch.equal(spoken_labels == IGNORED, labels == IGNORED)
    model = llama()
    right, nats, asked = answers(model, spoken_tokens, spoken_labels)
    with torch.no_grad():
        logits = model(input_ids=spoken_tokens, use_cache=False).logits
    where = spoken_labels != IGNORED
    assert asked == 12
    assert right == int((logits.argmax(-1) == spoken_labels)[where].sum())
    want = torch.nn.functional.cross_entropy(logits[where], spoken_labels[where], reduction="sum")
    assert nats == pytest.approx(float(want), rel=1e-4)


def test_an_answer_is_the_end_of_a_text(llama):
    model = llama()
    tokens = torch.randint(1, 61, (20,), generator=seeded())
    nats, said = answer(model, tokens, 3)
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, 16:19]
    want = torch.nn.functional.cross_entropy(logits, tokens[-3:])
    assert nats == pytest.approx(float(want), rel=1e-4)
    assert said == bool((logits.argmax(-1) == tokens[-3:]).all())
