"""A choice in the making: log-probabilities are shown with the text of their tokens."""

from __future__ import annotations

import pytest

from linearized.speculative import Alternatives, Sampling
from serve_apps.generation import Delta, Finished, Generation, Started
from serve_apps.http.choices import Choice, Part
from serve_apps.http.tokens import Tokenizer

LOGPROBS = Alternatives(-1.0, ())


@pytest.fixture
def tokens(folder):
    found = Tokenizer(folder)
    yield found
    found.close()


def choice(tokens, *, echo="", **values):
    job = Generation(prompt=(5,), max_tokens=9, sampling=Sampling(stop_ids={9}), **values)
    made = Choice(0, job, tokens, echo=echo)
    return made, made.start(Started())


def delta(text, *ids):
    return Delta(text=text, tokens=ids, logprobs=(LOGPROBS,) * len(ids))


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_what_is_held_back_of_a_text_is_held_back_of_its_tokens(tokens, tokenizer):
    a, b, c = (ids(tokenizer, one)[0] for one in "abc")
    made, _ = choice(tokens, stop=("bc",))
    assert [entry.token for entry in made.add(delta("a", a, b)).entries] == [a]
    part = made.add(delta("ba", a))  # it was no stop string
    assert [entry.token for entry in part.entries] == [b, a]
    assert made.add(delta("", b)).entries == ()
    assert made.add(delta("", c)).entries == ()
    part = made.finish(Finished(reason="stop", rounds=4))
    assert (part.entries, part.reason) == ((), "stop")


def test_the_token_that_ends_a_text_is_named(tokens, tokenizer):
    a = ids(tokenizer, "a")[0]
    cases = [((), 0, True), (("x",), 0, True), (("x",), 9, True), (("<|endoftext|>",), 0, False)]
    for stop, last, named in cases:
        made, _ = choice(tokens, stop=stop)
        made.add(delta("a", a, last))
        part = made.finish(Finished(reason="stop", rounds=1))
        assert [entry.token for entry in part.entries] == ([last] if named else [])


def test_half_a_character_has_the_offset_of_the_whole(tokens, tokenizer):
    pieces = ids(tokenizer, "é")
    assert len(pieces) == 2
    made, start = choice(tokens, echo="ab")
    assert start.text == "ab"
    assert made.add(delta("", pieces[0])).entries == ()
    found = made.add(delta("éa", pieces[1], ids(tokenizer, "a")[0])).entries
    assert [entry.offset for entry in found] == [2, 2, 3]


def test_parts_make_the_whole():
    parts = [Part(index=3, text="a"), Part(index=3, text="b"), Part(index=3, reason="stop")]
    assert Part.join(parts) == Part(index=3, text="ab", reason="stop")
