"""Prompts side by side are read as each alone would be."""

from __future__ import annotations

import random

import pytest
import torch

import linearized
from linearized.errors import ConfigError
from linearized.speculative import Engine, Prefixes, Sampling, Text
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


class Watch:
    """A clock that only reading moves on."""

    def __init__(self, monkeypatch, fixed: float, each: float) -> None:
        self.now, self.pieces = 0.0, []
        real = linearized.extend

        def slow(model, tokens, *args, **settings):
            self.now += fixed + each * tokens.numel()
            self.pieces.append(tokens.numel())
            return real(model, tokens, *args, **settings)

        monkeypatch.setattr("linearized.speculative.reading.extend", slow)
        monkeypatch.setattr("linearized.speculative.engine.clock_of", lambda device: self.read)

    def read(self) -> float:
        return self.now


@pytest.mark.parametrize("patience", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("lengths", [[3000], [150, 400, 90, 2000], [40] * 30])
def test_texts_wait_no_longer_than_they_are_asked_to(linear, monkeypatch, patience, lengths):
    """Between two of their rounds, once it is known how long reading takes; and prompts are read
    as fast as that allows."""
    model, draw = linear(group=8), random.Random(0)
    watch = Watch(monkeypatch, fixed=0.02, each=0.001)
    engine = Engine(model, rows=4, patience=patience)
    waiting = Text([1] * 80, sampling=Sampling(), max_new_tokens=3000)
    engine.add(waiting)
    engine.step()
    for length in lengths:
        text = text_of(draw, length)
        text.max_new_tokens = 1
        engine.add(text)
    waits, sizes = [], []
    while len(engine.texts) > 1:
        began, before = watch.now, len(watch.pieces)
        gained = engine.step()
        assert any(text is waiting for text, _ in gained), "a round each"
        waits.append(watch.now - began)
        sizes.append(sum(watch.pieces[before:]))
    late = [wait for wait in waits[4:] if wait > 1.01 * patience]
    assert not late, "but for the first ones, from which it learns"
    if len(lengths) == 1:
        assert sum(sizes[8:-1]) / max(len(sizes[8:-1]), 1) > 0.7 * (patience - 0.02) / 0.001


def test_prompts_are_read_at_once_where_nobody_waits(linear, monkeypatch):
    watch = Watch(monkeypatch, fixed=0.02, each=0.001)
    engine = Engine(linear(group=8), patience=0.01)
    engine.add(Text([1] * 1025, sampling=Sampling(), max_new_tokens=3))
    engine.step()
    engine.step()
    assert watch.pieces == [512, 512] and engine.decoding


def test_something_is_read_however_little_time_there_is(linear, monkeypatch):
    Watch(monkeypatch, fixed=9.0, each=1.0)
    model, texts = linear(group=8), []
    engine = Engine(model, patience=0.001, rows=2)
    for prompt in ([1] * 9, [2] * 300):
        texts.append(Text(prompt, sampling=Sampling(), max_new_tokens=30))
        engine.add(texts[-1])
        engine.step()
    rounds = 0
    while engine.reading:
        rounds += 1
        engine.step()
    assert rounds <= 19


@pytest.mark.parametrize("patience", [0, -1.0, float("nan")])
def test_a_patience_that_is_none_is_refused(linear, patience):
    with pytest.raises(ConfigError, match="patience must be above 0"):
        Engine(linear(), patience=patience)


# Log-probabilities of prompts


def scored(engine, prompts, count=2, length=3, **settings):
    texts = [
        Text(
            prompt,
            sampling=Sampling(),
            max_new_tokens=length,
            prompt_logprobs=count,
            **settings,
        )
        for prompt in prompts
    ]
    pieces = []
    for text in texts:
        engine.add(text)
    while engine.busy:
        pieces += engine.step()
    return texts, pieces


def alone(model, prompt):
    text = Text(prompt, sampling=Sampling(), max_new_tokens=3)
    engine = Engine(model, rows=1)
    engine.add(text)
    while engine.busy:
        engine.step()
    return text


def check_scores(model, text, count):
    logits = model(torch.tensor([text.tokens[: text.num_prompt]]), use_cache=False).logits[0]
    log_p = logits.double().log_softmax(-1)
    found = text.prompt_alternatives
    assert len(found) == text.num_prompt and found[0] is None
    for i, one in enumerate(found[1:]):
        want = log_p[i]
        torch.testing.assert_close(one.logprob, float(want[text.tokens[i + 1]]))
        best = want.topk(count)
        assert [token for token, _ in one.top] == best.indices.tolist()
        torch.testing.assert_close([p for _, p in one.top], best.values.tolist())


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@torch.no_grad()
def test_prompts_tokens_have_log_probabilities(linear, llama, chunk, kind):
    """Also side by side, amid other texts, and after texts that are known."""
    model, draw = linear(group=8), random.Random(1)
    if kind == "hybrid":
        config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
        model = linearized.linearize(llama().double(), config)
    prompts = [text_of(draw, n).tokens for n in (9, 30, 1, 29)]
    prompts.append(prompts[1])
    want = [text.new_tokens for text in (alone(model, prompt) for prompt in prompts)]
    for prefixes in (None, Prefixes(1 << 30, every=8)):
        engine = Engine(model, chunk=chunk, rows=4, prefixes=prefixes)
        engine.add(Text(prompts[1], sampling=Sampling(), max_new_tokens=9))
        for count in (0, 3):
            texts, _ = scored(engine, prompts, count)
            for text in texts:
                check_scores(model, text, count)
                assert text.cached_tokens == 0
            assert [text.new_tokens for text in texts] == want


@torch.no_grad()
def test_a_prompt_is_scored_though_nothing_is_to_follow(linear):
    model = linear(group=8)
    prompts = [[*range(1, n)] for n in (2, 3, 20)]
    texts, pieces = scored(Engine(model), prompts, length=0)
    for text in texts:
        check_scores(model, text, 2)
        assert text.finished == "length" and not text.new_tokens
    assert [text for text, piece in pieces if piece.finished == "length"] == texts[1:]
    assert all(piece.tokens == () for _, piece in pieces)


def test_scores_take_bounded_memory(linear, monkeypatch):
    """Of long prompts and large vocabularies no more than some pieces of logits at a time."""
    monkeypatch.setattr("linearized.speculative.reading.LOGITS", 61 * 12)
    monkeypatch.setattr("linearized.speculative.text.BLOCK", 61 * 5)
    sizes, real = [], linearized.extend

    def watched(*args, **settings):
        logits = real(*args, **settings)
        sizes.append(logits.shape[0] * logits.shape[1])
        return logits

    monkeypatch.setattr("linearized.speculative.reading.extend", watched)
    model = linear(group=8)
    prompts = [[n % 59 + 1 for n in range(length)] for length in (100, 100, 6, 6)]
    texts, _ = scored(Engine(model), prompts)
    assert max(sizes) <= 12
    with torch.no_grad():
        for text in texts:
            check_scores(model, text, 2)


@torch.no_grad()
def test_a_text_that_moves_amid_its_prompt_is_scored_as_a_whole(linear):
    model = linear(group=8)
    prompt = [n % 59 + 1 for n in range(40)]
    for kept in (True, False):
        engine, other = Engine(model, chunk=13), Engine(model, chunk=13)
        text = Text(prompt, sampling=Sampling(), max_new_tokens=4, prompt_logprobs=1)
        engine.add(text)
        engine.step()
        state = engine.remove(text)
        assert int(state.length[0]) == 13 and text.is_unscored
        if not kept:  # all that a new copy of the text knows is its tokens
            text = Text(prompt, sampling=Sampling(), max_new_tokens=4, prompt_logprobs=1)
        other.add(text, state)
        while other.busy:
            other.step()
        check_scores(model, text, 1)
    later = Text(text.tokens, sampling=Sampling(), max_new_tokens=6, prompt_logprobs=1,
                 num_prompt=40)  # fmt: skip
    engine.add(later)
    while engine.busy:
        engine.step()
    check_scores(model, later, 1)


def test_a_prompt_whose_scores_are_no_numbers_ends_alone(linear):
    model = linear(group=8)
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(head)
    texts, pieces = scored(Engine(model), [[1, 2, 3, 4, 5], [4, 60, 7, 8, 9], [7, 8, 9, 5, 4]])
    assert [text.finished for text in texts] == ["length", "error", "length"]
    assert "NaN logits for position" in str(texts[1].error)
    assert [piece.finished for text, piece in pieces if text is texts[1]] == ["error"]
