"""What is known of texts that were read before, and texts that go on from it: they say what they
would say without."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linearized
from linearized.errors import ConfigError, StateError
from linearized.near import Near
from linearized.speculative import (
    Drafter,
    Engine,
    NgramDrafter,
    Prefixes,
    Sampling,
    Text,
    TokenTree,
)
from linearized.state import DecodeState, GroupState, History, new_stamps

PLENTY = 1 << 30
KINDS = ["grouped", "hedgehog", "hybrid"]


def a_model(kind, linear, llama):
    if kind == "grouped":
        return linear(group=8, taps=5)
    if kind == "hedgehog":
        return linear(near="hedgehog", group=4)  # with a window and sinks
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
    return linearized.linearize(llama().double(), config)


@pytest.fixture(params=KINDS)
def model(request, linear, llama):
    return a_model(request.param, linear, llama)


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def says(engine: Engine, prompt, sampling=Sampling(), length=12, **more) -> Text:  # noqa: B008
    text = Text(prompt, sampling=sampling, max_new_tokens=length, **more)
    engine.add(text)
    run(engine)
    return text


class Knows(Drafter):
    """How texts go on, and beyond their ends."""

    depth = 6

    def __init__(self) -> None:
        self.whole: list[list[int]] = []

    def propose(self, asks):
        return [TokenTree.chain(self._next(ask.text.tokens)[: ask.depth]) for ask in asks]

    def _next(self, tokens):
        found = (one[len(tokens) :] for one in self.whole if one[: len(tokens)] == tokens)
        return next(found, [])


# The tree of what is known


def an_empty(*, hybrid: bool) -> DecodeState:
    """State, of no real model."""
    layers = GroupState.empty(
        2, 1, heads=1, features=2, key_width=2, value_width=3, tail_width=2, near=Near(2), taps=2,
        dtype=torch.float32,
    )  # fmt: skip
    history = History.empty(1, 1, 2, 3, 3, dtype=torch.float32) if hybrid else None
    return DecodeState(layers, "model", history, stamp=new_stamps(1))


EMPTIES = [an_empty(hybrid=False), an_empty(hybrid=True)]


def coded(empty, tokens):
    """A state that tells which tokens it has read, as does each place of its history."""
    state, places = empty.clone(), [hash(tuple(tokens[: i + 1])) % 997 for i in range(len(tokens))]
    state.length.fill_(len(tokens))
    state.layers.memory.fill_(hash(tuple(tokens)) % 991)
    if state.history is None:
        return state
    code = torch.tensor([*places, *[-1.0] * 3], dtype=state.history.keys.dtype)  # and some room
    keys = code[:, None].expand(*state.history.keys.shape[:3], -1, state.history.keys.shape[4])
    return replace(state, history=History(keys.clone(), -keys, torch.tensor([len(tokens)])))


class Plain:
    """The same, as a list."""

    def __init__(self, empty, most: int) -> None:
        self.most, self.kept, history = most, [], empty.history
        self.each = empty.nbytes
        self.row = 4
        if history is not None:
            layers, _, heads, _, width = history.keys.shape
            self.row += 2 * layers * heads * width * history.keys.itemsize

    @property
    def nbytes(self) -> int:
        distinct = {key[: i + 1] for key in self.kept for i in range(len(key))}
        return len(self.kept) * self.each + len(distinct) * self.row

    def put(self, key) -> bool:
        if not key or self.each + len(key) * self.row > self.most:
            return False
        self.touch(key)
        while self.nbytes > self.most:
            self.kept.pop(0)
        return True

    def find(self, key) -> tuple[int, int]:
        hits = [one for one in self.kept if key[: len(one)] == one]
        known = max((common(one, key) for one in self.kept), default=0)
        if hits:
            self.touch(max(hits, key=len))
        return max(map(len, hits), default=0), known

    def touch(self, key) -> None:
        self.kept = [one for one in self.kept if one != key] + [key]


def common(one, other) -> int:
    size = 0
    while size < min(len(one), len(other)) and one[size] == other[size]:
        size += 1
    return size


runs = st.lists(st.sampled_from([(0,), (1,), (0, 1, 1), (1, 1, 0, 0, 1)]), max_size=6).map(
    lambda parts: tuple(token for part in parts for token in part)
)


@given(
    st.booleans(),
    st.integers(1, 5),
    st.lists(st.tuples(st.booleans(), runs), max_size=40),
)
@settings(max_examples=150)
def test_the_longest_known_prefix_is_found_in_the_bytes_that_are_allowed(hybrid, room, calls):
    empty = EMPTIES[hybrid]
    plain = Plain(empty, room * empty.nbytes + 40 * (4 if not hybrid else 60))
    prefixes = Prefixes(plain.most)
    prefixes.join(empty)
    for puts, tokens in calls:
        if puts:
            assert prefixes.put(tokens, coded(empty, tokens)) == plain.put(tokens)
        else:
            found = prefixes.find(tokens)
            assert (found.length, found.known) == plain.find(tokens)
            if found.length:
                want = coded(empty, tokens[: found.length])
                assert found.state.to_bytes() == want.to_bytes()
        assert prefixes.nbytes == plain.nbytes <= plain.most and len(prefixes) == len(plain.kept)


def test_what_goes_leaves_nothing_behind():
    for empty in EMPTIES:
        prefixes = Prefixes(PLENTY)
        prefixes.join(empty)
        draw = random.Random(0)
        for n in range(60):
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            prefixes.put(tokens, coded(empty, tokens), owner=str(n % 3))
        prefixes.max_bytes = prefixes._nbytes // 7
        prefixes.put([5], coded(empty, [5]), owner="other")
        for node in prefixes._recent:
            assert node.state is not None
            for one in node.path():
                assert one.state is not None or len(one.children) > 1, "nobody needs it"
        prefixes.max_bytes = empty.nbytes + 60
        prefixes.put([6], coded(empty, [6]), owner="last")
        assert len(prefixes) == 1 and [*prefixes._roots] == ["last"]
        prefixes.clear()
        assert prefixes.nbytes == len(prefixes) == 0 and prefixes.find([6], owner="last").known == 0


def test_long_texts_are_found_in_no_time():
    """Work that grows with the text once, not with the number of those that are known."""
    prefixes = Prefixes(PLENTY)
    prefixes.join(EMPTIES[0])
    tokens = [n % 59 for n in range(32768)]
    state = coded(EMPTIES[0], [1])
    for n in range(1024, 32769, 1024):
        state.length.fill_(n)
        prefixes.put(tokens[:n], state)
    walked = []
    walk = prefixes._walk
    prefixes._walk = lambda *given: (walked.append(step) or step for step in walk(*given))
    assert prefixes.find(tokens).length == 32768
    assert len(walked) == 32 and sum(count for _, count in walked) == 32768


def test_a_snapshot_is_one_of_its_tokens_and_of_its_model(linear, llama):
    model = linear(group=8)
    state = linearized.new_state(model)
    linearized.extend(model, torch.tensor([[1, 2, 3]]), state)
    prefixes = Prefixes(PLENTY)
    with pytest.raises(ConfigError, match="no engine has these prefixes"):
        prefixes.put([1, 2, 3], state)
    prefixes.join(linearized.new_state(model))
    with pytest.raises(StateError, match=r"read \[3\] is none of 2 tokens"):
        prefixes.put([1, 2], state)
    with pytest.raises(StateError, match="is none of 3 tokens"):
        prefixes.put([1, 2, 3], linearized.new_state(model, 2))
    with pytest.raises(StateError, match="belongs to model"):
        prefixes.put([1, 2, 3], linearized.new_state(linear(seed=1)))
    for other in (linear(group=8, seed=1), linear(group=8, dtype=torch.float32)):
        with pytest.raises(ConfigError, match="give each model its own"):
            Engine(other, prefixes=prefixes)
    for settings_ in ({"max_bytes": 0}, {"max_bytes": 2.5}, {"max_bytes": 9, "every": 0}):
        with pytest.raises(ConfigError, match="at least 1, and whole"):
            Prefixes(**settings_)
    assert not Prefixes.put(prefixes, [], linearized.new_state(model)) and not len(prefixes)


def test_what_is_kept_is_a_copy(linear):
    model = linear(group=8)
    prefixes, state = Prefixes(PLENTY), linearized.new_state(model)
    prefixes.join(state)
    linearized.extend(model, torch.tensor([[1, 2, 3]]), state)
    blob = state.to_bytes()
    prefixes.put([1, 2, 3], state)
    linearized.extend(model, torch.tensor([[4]]), state)
    assert prefixes.find([1, 2, 3, 4]).state.to_bytes() == blob


# Texts


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 17, 40])
def test_the_same_prompt_again_is_not_read(model, monkeypatch, length):
    """Of any length. (vllm#40696: prompts shorter than a block are never found.)"""
    prompt = [n * 7 % 60 for n in range(length)]
    sampling = Sampling(temperature=0.9, seed=4)
    cold = says(Engine(model), prompt, sampling)
    engine = Engine(model, prefixes=Prefixes(PLENTY), rows=2)
    first = says(engine, prompt, sampling)
    monkeypatch.setattr("linearized.speculative.reading.extend", None)
    again = says(engine, prompt, sampling)
    assert first.new_tokens == again.new_tokens == cold.new_tokens
    assert (first.cached_tokens, again.cached_tokens) == (0, length - 1)


def test_a_prefix_that_was_seen_twice_is_reused_to_its_last_token(model):
    shared = [n * 5 % 60 for n in range(16)]
    prompts = [[*shared, n, n + 1, n + 2] for n in (11, 22, 33, 44)]
    engine = Engine(model, prefixes=Prefixes(PLENTY))
    found = [says(engine, prompt) for prompt in prompts]
    assert [text.cached_tokens for text in found] == [0, 0, 16, 16]
    want = [says(Engine(model), prompt) for prompt in prompts]
    assert [text.new_tokens for text in found] == [text.new_tokens for text in want]


def test_a_prompt_that_parts_from_another_goes_on_from_a_place_before(model):
    one = [n * 5 % 60 for n in range(50)]
    other = [*one[:39], 1, 2, 3, 4]
    engine = Engine(model, prefixes=Prefixes(PLENTY, every=10))
    says(engine, one)
    found = says(engine, other)
    assert found.cached_tokens == 30
    assert found.new_tokens == says(Engine(model), other).new_tokens
    assert says(engine, [*one[:39], 5]).cached_tokens == 39


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("ends", ["length", "stop", "amid"])
def test_a_chats_next_turn_reads_what_is_new(model, drafted, ends):
    """Also where a draft went on behind the end of the answer."""
    prompt = [n * 5 % 60 for n in range(21)]
    whole = says(Engine(model), prompt, length=30)
    stop = {"length": 0, "stop": whole.new_tokens[6], "amid": whole.new_tokens[4]}[ends]
    sampling = Sampling(stop_ids=frozenset([stop] if ends != "length" else []))
    knows = Knows()
    knows.whole.append(whole.tokens)
    engine = Engine(model, prefixes=Prefixes(PLENTY), drafters=[knows] if drafted else [])
    first = says(engine, prompt, sampling)
    assert first.finished == ("length" if ends == "length" else "stop")
    assert bool(first.accepted) == drafted
    turn = [*first.tokens, 9, 8, 7]
    second = says(engine, turn)
    assert second.cached_tokens == len(first.tokens) - 1
    assert second.new_tokens == says(Engine(model), turn).new_tokens


def test_an_answer_that_ends_amid_a_draft_by_its_words_leaves_no_wrong_state(linear):
    """The state holds tokens that the text does not."""
    model = linear(group=8)

    def decode(tokens):
        return "".join(f"<{token}>" for token in tokens)

    prompt = [n * 5 % 60 for n in range(21)]
    whole = says(Engine(model), prompt, length=30)
    knows = Knows()
    knows.whole.append(whole.tokens)
    engine = Engine(model, prefixes=Prefixes(PLENTY), drafters=[knows])
    stop = (f"<{whole.new_tokens[9]}>",)
    first = says(engine, prompt, length=30, decode=decode, stop=stop)
    assert first.finished == "stop" and first.accepted
    for turn in ([*first.tokens, 9, 8, 7], whole.tokens):
        assert says(engine, turn).new_tokens == says(Engine(model), turn).new_tokens


def test_owners_do_not_learn_of_each_other(linear):
    model = linear(group=8)
    prompt = [n * 5 % 60 for n in range(30)]
    engine = Engine(model, prefixes=Prefixes(PLENTY), rows=3)
    found = [says(engine, prompt, owner=name).cached_tokens for name in "abab"] + [
        says(engine, prompt).cached_tokens
    ]
    assert found == [0, 0, 29, 29, 0]
    side = [Text(prompt, sampling=Sampling(), max_new_tokens=3, owner=name) for name in "cd"]
    for text in side:
        engine.add(text)
    run(engine)
    assert [text.cached_tokens for text in side] == [0, 0]


def test_choices_of_one_prompt_read_it_once(model, monkeypatch):
    prompt = [n * 5 % 60 for n in range(30)]
    sampled = [Sampling(temperature=0.9, seed=3, choice=n) for n in range(4)]
    want = [says(Engine(model), prompt, one).new_tokens for one in sampled]
    read = []
    real = linearized.extend

    def counted(model, tokens, *args, **more):
        read.append(tokens.numel())
        return real(model, tokens, *args, **more)

    monkeypatch.setattr("linearized.speculative.reading.extend", counted)
    engine = Engine(model, prefixes=Prefixes(PLENTY), rows=4)
    texts = [Text(prompt, sampling=one, max_new_tokens=12) for one in sampled]
    for text in texts:
        engine.add(text)
    run(engine)
    assert [text.new_tokens for text in texts] == want
    assert sum(read) == 29 and [text.cached_tokens for text in texts] == [0, 29, 29, 29]


def test_a_text_moves_with_its_state(model):
    prompt = [n * 5 % 60 for n in range(30)]
    want = says(Engine(model), prompt).new_tokens
    one, other = Prefixes(PLENTY), Prefixes(PLENTY)
    engine = Engine(model, prefixes=one)
    text = Text(prompt, sampling=Sampling(), max_new_tokens=12, owner="me")
    engine.add(text)
    while text.num_new < 4:
        engine.step()
    assert one.export(prompt, owner="you") is None
    blob = one.export(text.tokens, owner="me")
    second = Engine(model, prefixes=other)
    assert other.load(blob, text.tokens, owner="me") == 29
    moved = Text(text.tokens, sampling=Sampling(), max_new_tokens=12, num_prompt=30, owner="me")
    second.add(moved)
    run(second)
    assert moved.new_tokens == want and moved.cached_tokens == 29
    state = engine.remove(text)
    assert other.put(text.tokens[:-1], state, owner="me")
    later = Text(text.tokens, sampling=Sampling(), max_new_tokens=12, num_prompt=30, owner="me")
    second.add(later)
    run(second)
    assert later.new_tokens == want and later.cached_tokens == 30, "of the prompt"


def test_bytes_of_another_text_are_refused(linear):
    model = linear(group=8)
    one, other = Prefixes(PLENTY), Prefixes(PLENTY)
    says(Engine(model, prefixes=one), [1, 2, 3, 4])
    blob = one.export([1, 2, 3, 4])
    with pytest.raises(ConfigError, match="no engine"):
        other.load(blob, [1, 2, 3, 4])
    Engine(model, prefixes=other)
    state = linearized.DecodeState.from_bytes(blob)
    for bytes_, tokens, words in (
        (blob, [1, 2, 4], "no state behind the first 3"),
        (blob, [1, 2], "no state behind"),
        (state.to_bytes(), [1, 2, 3], "no state behind"),
        (blob[:-1], [1, 2, 3], "damaged"),
        (b"garbage", [1, 2, 3], "not a decode state"),
        (linearized.new_state(linear(seed=1)).to_bytes(), [], "belongs to model"),
        (replace(state, layers=replace(state.layers, memory=state.layers.memory[:1])).to_bytes(),
         [1, 2, 3], "damaged"),
    ):  # fmt: skip
        with pytest.raises(StateError, match=words):
            other.load(bytes_, tokens)
    assert not len(other) and other.load(blob, [1, 2, 3, 9, 9]) == 3
    tiny = Prefixes(100)
    Engine(model, prefixes=tiny)
    assert tiny.load(blob, [1, 2, 3]) == 0


@pytest.mark.parametrize("where", ["put", "find", "copy"])
def test_texts_do_without_what_cannot_be_kept_or_found(model, monkeypatch, caplog, where):
    prompts = [[n * 5 % 60 for n in range(length)] for length in (30, 30, 41)]
    want = [says(Engine(model), prompt).new_tokens for prompt in prompts]
    prefixes = Prefixes(PLENTY, every=10)
    engine = Engine(model, prefixes=prefixes)

    def fails(*args, **more):
        raise MemoryError

    if where == "copy":
        broken = linearized.new_state(model, 2)

        def find(tokens, owner):
            found = Prefixes.find(prefixes, tokens, owner=owner)
            return replace(found, state=broken) if found.state is not None else found

        monkeypatch.setattr(prefixes, "find", find)
    else:
        monkeypatch.setattr(prefixes, where, fails)
    found = [says(engine, prompt) for prompt in prompts]
    assert [text.new_tokens for text in found] == want
    assert not any(text.cached_tokens for text in found) and caplog.records


def test_a_rehearsal_leaves_nothing(linear):
    model = linear(group=8)
    prefixes = Prefixes(PLENTY)
    engine = Engine(model, prefixes=prefixes, drafters=[NgramDrafter()])
    engine.plan(engine.measure())
    assert not len(prefixes)
    says(engine, [1, 2, 3, 4])
    assert len(prefixes) == 2


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_cold_runs(linear, llama, kind, seed):
    """Whatever came before, is drafted, kept, evicted, shared, or moved. (vllm#53912, vllm#53505: a
    prefix cache beside speculation corrupts texts of models whose state is recurrent; vllm#55600:
    a hit restores the state of somebody else.)"""
    model = a_model(kind, linear, llama)
    draw = random.Random(seed)
    knows = Knows()
    room = linearized.new_state(model).nbytes * draw.choice([3, 9, 1000]) + 100_000
    caches = [Prefixes(room, every=draw.choice([4, 7, 1024])) for _ in range(2)]
    engines = [
        Engine(
            model, drafters=[knows], rows=draw.choice([1, 3]), prefixes=cache,
            chunk=draw.choice([None, 5]),
        )
        for cache in caches
    ]  # fmt: skip
    known, hits = [[draw.randrange(60) for _ in range(25)]], 0
    for _ in range(8):
        texts = []
        for _ in range(draw.randrange(1, 4)):
            before = draw.choice(known)
            start = before[: draw.randrange(1, len(before) + 1)]
            prompt = [*start, *(draw.randrange(60) for _ in range(draw.randrange(4)))][:60]
            temperature = draw.choice([0.0, 0.9])
            sampling = Sampling(temperature=temperature, seed=draw.randrange(99))
            cold = says(Engine(model), prompt, sampling, length=14)
            knows.whole.append(cold.tokens)
            if draw.random() < 0.4:
                stops = frozenset(draw.sample(cold.new_tokens, 1))
                sampling = replace(sampling, stop_ids=stops)
                cold = says(Engine(model), prompt, sampling, length=14)
            text = Text(prompt, sampling=sampling, max_new_tokens=14, owner=draw.choice("ab"))
            texts.append((text, cold.new_tokens))
            engines[0].add(text)
            known.append(cold.tokens)
        here, there = engines
        while here.busy:
            here.step()
            if here.texts and draw.random() < 0.1:
                moved = draw.choice(here.texts)
                state = here.remove(moved)
                there.add(moved, state if draw.random() < 0.5 else None)
                there.step()
            if draw.random() < 0.2:
                tokens, owner = draw.choice(known), draw.choice("ab")
                blob = caches[0].export(tokens, owner=owner)
                if blob is not None:
                    caches[1].load(blob, tokens, owner=owner)
        run(there)
        engines.reverse()
        caches.reverse()
        assert [text.new_tokens for text, _ in texts] == [want for _, want in texts]
        assert all(cache.nbytes <= cache.max_bytes for cache in caches)
        hits += sum(text.cached_tokens > 0 for text, _ in texts)
    assert hits > 3
