"""Prompts side by side are read as each alone would be."""

from __future__ import annotations

import random

import pytest
import torch

import linearized
from linearized.speculative import Sampling, Text
from linearized.speculative.pool import Pool
from linearized.speculative.reading import Reading


def text_of(draw, length):
    prompt = [draw.randrange(1, 60) for _ in range(length)]
    return Text(prompt, sampling=Sampling(), max_new_tokens=5)


def begun(model, lengths, draw):
    pool = Pool(model, len(lengths))
    reading = Reading(model, pool)
    texts = [text_of(draw, length) for length in lengths]
    for text in texts:
        pool.add(text)
        reading.add(text, 0)
    return pool, reading, texts


@pytest.mark.parametrize("chunk", [1, 7, 40, 500])
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_states_are_those_of_each_alone(linear, llama, chunk, kind):
    model = linear(group=8)
    if kind == "hybrid":
        config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
        model = linearized.linearize(llama().double(), config)
    pool, reading, texts = begun(model, [9, 30, 1, 28, 17, 30, 2], random.Random(chunk))
    pool.reserve(40)
    read = []
    for _ in range(200):
        new, failed = reading.go_on(chunk, behind=len(read))
        assert not failed
        read += new
        assert pool.keys[: len(read)] == read, "behind those that were read before"
        if not reading.texts:
            break
    assert {*read} == {*texts}
    for text in texts:
        alone = linearized.new_state(model)
        if len(text.tokens) > 1:
            linearized.extend(model, torch.tensor([text.tokens[:-1]]), alone)
        for name, tensor in pool.row(text).layers.tensors().items():
            torch.testing.assert_close(tensor, alone.layers.tensors()[name])
        if alone.history is not None and len(text.tokens) > 1:
            count = len(text.tokens) - 1
            mine = pool.row(text).history.keys[:, :, :, :count]
            torch.testing.assert_close(mine, alone.history.keys[:, :, :, :count])


def test_equal_prompts_are_read_in_one_forward(linear, monkeypatch):
    model = linear(group=8)
    shapes = []
    real = linearized.extend

    def counted(model, tokens, *args, **settings):
        shapes.append(tuple(tokens.shape))
        return real(model, tokens, *args, **settings)

    monkeypatch.setattr("linearized.speculative.reading.extend", counted)
    _, reading, texts = begun(model, [21, 21, 15, 21], random.Random(0))
    read, _ = reading.go_on(60, behind=0)
    assert shapes == [(3, 20)] and len(read) == 3
    read += reading.go_on(60, behind=3)[0]
    assert shapes[1:] == [(1, 20)] and {*read} == {*texts}


def test_a_prompt_that_cannot_be_read_leaves_the_others(linear, monkeypatch, caplog):
    model = linear(group=8)
    real = linearized.extend

    def fails(model, tokens, *args, **settings):
        if (tokens == 60).any():
            raise IndexError("out of positions")
        return real(model, tokens, *args, **settings)

    monkeypatch.setattr("linearized.speculative.reading.extend", fails)
    _, reading, texts = begun(model, [9, 9, 9], random.Random(0))
    texts[1].tokens[4] = 60
    read, failed = reading.go_on(100, behind=0)
    assert {*read} == {texts[0], texts[2]} and [*failed] == [texts[1]]
    assert not reading.texts


def test_a_text_that_is_dropped_is_not_read(linear):
    _, reading, texts = begun(linear(group=8), [9, 9, 9], random.Random(0))
    reading.drop(texts[0])
    assert reading.texts == texts[1:]
    read, _ = reading.go_on(100, behind=0)
    assert {*read} == {*texts[1:]}
