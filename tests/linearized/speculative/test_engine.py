"""Many texts at once: each says what it would say alone."""

from __future__ import annotations

import importlib
import itertools
import random

import pytest
import torch
import transformers

import linearized
from linearized.errors import ConfigError, RequestError
from linearized.speculative import (
    Ask,
    Drafter,
    Engine,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
)
from linearized.speculative.costs import Costs
from linearized.state import PAGE

PROMPT = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8]


class Random(Drafter):
    """Trees of any shape, often empty."""

    depth = 5

    def __init__(self, vocab: int = 61, seed: int = 0) -> None:
        self.vocab, self.random = vocab, random.Random(seed)

    def propose(self, asks):
        return [self._tree() for _ in asks]

    def _tree(self):
        size = self.random.choice([0, 0, 1, 2, 5, 13])
        return TokenTree(
            tuple(self.random.randrange(self.vocab) for _ in range(size)),
            tuple(self.random.randrange(-1, n) for n in range(size)),
        )


def alone(model, prompt, sampling, length=30):
    engine = Engine(model, rows=1)
    text = Text(prompt, sampling=sampling, max_new_tokens=length)
    engine.add(text)
    run(engine)
    return text.new_tokens


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def requests(count: int, seed: int = 0) -> list[tuple[list[int], Sampling]]:
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(61) for _ in range(draw.choice([1, 2, 7, 8, 20, 41]))],
            Sampling(temperature=draw.choice([0.0, 0.9]), top_p=0.95, seed=i),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_do_not_depend_on_their_neighbours(linear, rows):
    """vllm#51226: a seed is ignored if a neighbour has none."""
    model = linear(group=8, taps=5)
    wanted = requests(9)
    want = [alone(model, *request) for request in wanted]
    draft = linear(group=4, taps=3, layers=1, seed=3)
    for drafters in ([], [Random()], [NgramDrafter()], [ModelDrafter(draft, depth=3)]):
        engine = Engine(model, drafters=drafters, rows=rows, chunk=11)
        texts = [Text(p, sampling=s, max_new_tokens=30) for p, s in wanted]
        for text in texts:
            engine.add(text)
        run(engine)
        assert [text.new_tokens for text in texts] == want, drafters


def test_texts_join_and_leave_at_any_round(linear):
    model = linear(group=8, taps=5)
    wanted = requests(12, seed=1)
    want = [alone(model, *request) for request in wanted]
    draw = random.Random(2)
    engine = Engine(model, drafters=[ModelDrafter(model, depth=3), NgramDrafter()], rows=4)
    texts = [Text(p, sampling=s, max_new_tokens=30) for p, s in wanted]
    waiting, away = list(texts), []
    while waiting or away or engine.busy:
        if waiting and draw.random() < 0.3:
            engine.add(waiting.pop())
        if engine.texts and draw.random() < 0.2:
            text = draw.choice(engine.texts)
            state = engine.remove(text)
            away.append((text, state if draw.random() < 0.5 else None))
        if away and draw.random() < 0.5:
            engine.add(*away.pop(draw.randrange(len(away))))
        engine.step()
    assert [text.new_tokens for text in texts] == want


def test_a_state_goes_on_in_another_engine(linear):
    model = linear(group=8)
    sampling = Sampling(temperature=0.8, seed=4)
    want = alone(model, PROMPT, sampling)
    engine = Engine(model)
    text = Text(PROMPT, sampling=sampling, max_new_tokens=30)
    engine.add(text)
    for _ in range(9):
        engine.step()
    blob = engine.remove(text).to_bytes()
    assert not engine.busy
    other = Engine(model)
    other.add(text, linearized.DecodeState.from_bytes(blob))
    run(other)
    assert text.new_tokens == want


def test_a_waiting_text_keeps_its_state(linear):
    model = linear(group=8)
    want = alone(model, PROMPT, Sampling())
    text = Text(PROMPT, sampling=Sampling(), max_new_tokens=30)
    engine = Engine(model)
    engine.add(text)
    for _ in range(9):
        engine.step()
    full = Engine(model, rows=1)
    full.add(Text(PROMPT, sampling=Sampling(), max_new_tokens=5))
    full.step()
    full.add(text, engine.remove(text))
    state = full.remove(text)
    assert int(state.length[0]) == len(text.tokens) - 1
    engine.add(text, state)
    run(engine)
    assert text.new_tokens == want


def test_a_text_that_cannot_be_decoded_ends_alone(linear):
    """Its neighbours, on either side, go on."""
    model = linear(group=8)
    wanted = requests(3, seed=1)
    want = [alone(model, *request) for request in wanted]
    engine = Engine(model, drafters=[Random()])

    calls = itertools.count()

    def decode(tokens: list[int]) -> str:
        if next(calls) > 20:
            raise ValueError("out of letters")
        return " ".join(map(str, tokens))

    texts = [
        Text(p, sampling=s, max_new_tokens=30, decode=decode if i == 1 else None)
        for i, (p, s) in enumerate(wanted)
    ]
    for text in texts:
        engine.add(text)
    run(engine)
    assert [texts[0].new_tokens, texts[2].new_tokens] == [want[0], want[2]]
    done = texts[1].new_tokens
    assert texts[1].finished == "error" and 0 < len(done) < 30 and done == want[1][: len(done)]
    assert str(texts[1].error) == "out of letters"


def test_a_tree_of_which_nothing_pays_is_learnt_from_too(linear):
    """Also where the next drafter is asked instead."""
    model = linear(group=8, dtype=torch.float32)

    class Wrong(Random):
        def propose(self, asks):
            return [TokenTree.chain([1, 2], [0.2, 0.1]) for _ in asks]

    engine = Engine(model, drafters=[Wrong(), NgramDrafter()], rows=1)
    engine.plan(Costs((1, 2), (1, 2, 32), ((1.0, 1.5, 9.0), (1.0, 1.5, 9.0))))
    heard: list[int] = []
    planner = engine._drafting[0].planner
    observe = planner.observe
    planner.observe = lambda *args: (heard.append(len(args[1])), observe(*args))
    engine.add(Text(PROMPT, sampling=Sampling(), max_new_tokens=60))
    run(engine)
    assert 2 in heard


@pytest.mark.parametrize("token", [-1, 61])
def test_unknown_tokens_of_trees_are_left_out(linear, token):
    model = linear(group=8)

    class Odd(Random):
        def propose(self, asks):
            return [TokenTree.chain([3, token]) for _ in asks]

    text = Text(PROMPT, sampling=Sampling(), max_new_tokens=30)
    engine = Engine(model, drafters=[Odd()])
    engine.add(text)
    run(engine)
    assert text.new_tokens == alone(model, PROMPT, Sampling()) and {*text.drafted} == {1}


def test_fallback_order(linear):
    """The second is asked for what the first had nothing for."""
    model = linear(group=8)
    plain = alone(model, PROMPT, Sampling(), 40)

    class First(Drafter):
        depth = 3

        def __init__(self):
            self.texts = []

        def propose(self, asks):
            return [TokenTree.empty if ask.text.num_prompt == 3 else knowing(ask) for ask in asks]

    class Second(First):
        def propose(self, asks):
            self.texts += [ask.text for ask in asks]
            return [TokenTree.empty for ask in asks]

    def knowing(ask: Ask) -> TokenTree:
        done = len(ask.text.new_tokens)
        return TokenTree.chain(plain[done : done + ask.depth])

    second = Second()
    engine = Engine(model, drafters=[First(), second])
    one = Text(PROMPT, sampling=Sampling(), max_new_tokens=40)
    other = Text(PROMPT[:3], sampling=Sampling(), max_new_tokens=40)
    engine.add(one)
    engine.add(other)
    run(engine)
    assert one.new_tokens == plain and one.rounds == 10
    assert set(second.texts) == {other}


def test_a_prompt_is_read_in_pieces_between_rounds(linear):
    model = linear(group=8)
    engine = Engine(model, rows=2, chunk=7)
    first = Text(PROMPT, sampling=Sampling(), max_new_tokens=20)
    engine.add(first)
    while not first.new_tokens:
        engine.step()
    long = Text(PROMPT * 4, sampling=Sampling(), max_new_tokens=5)
    engine.add(long)
    gained = 0
    while not long.new_tokens:
        gained += sum(text is first for text, _ in engine.step())
    assert gained == 6  # 39 tokens, 7 a round; the last piece's round has its first token, too
    run(engine)
    assert long.new_tokens == alone(model, PROMPT * 4, Sampling(), 5)


def test_memory_limits_rows_and_texts(linear, llama):
    model = linear(group=8)
    each = linearized.new_state(model).nbytes
    assert Engine(model, rows=8, memory=3 * each + 1).pool.num_rows == 3
    with pytest.raises(ConfigError, match=f"{each:,} bytes, 100 are allowed"):
        Engine(model, memory=100)
    hybrid = llama()
    linearized.linearize(hybrid, linearized.LinearConfig(attention="grouped", layers=(0,)))
    limit = Engine(hybrid, rows=2).pool.bytes_at(100)
    engine = Engine(hybrid, rows=2, memory=limit, max_nodes=4)
    want = [alone(hybrid, p, Sampling(), 8) for p in (PROMPT, PROMPT * 5)]
    texts = [Text(p, sampling=Sampling(), max_new_tokens=8) for p in (PROMPT, PROMPT * 5)]
    for text in texts:
        engine.add(text)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.pool.first(engine.pool.num_rows).nbytes)
    assert engine.pool.bytes_at(0) < most <= limit
    assert [text.new_tokens for text in texts] == want
    with pytest.raises(RequestError, match="bytes of state"):
        engine.add(Text(PROMPT * 60, sampling=Sampling(), max_new_tokens=8))
    tight = Engine(hybrid, memory=engine.pool.bytes_at(0) // 2, rows=1, max_nodes=4)
    tight.plan(Costs((1,), (1,), ((1.0,),)))  # nothing to rehearse with
    assert not tight.busy


@pytest.mark.parametrize("rows, batches", [(1, [1]), (2, [2, 1]), (8, [8, 2, 1])])
def test_drafters_rehearse_with_all_rows_with_two_and_with_one(linear, rows, batches):
    """A view of two rows of many is another layout of memory, and so another program, where steps
    are compiled."""
    seen = []

    class Looks(Drafter):
        depth = 1

        def propose(self, asks):
            seen.append(len(asks))
            return [TokenTree.empty for _ in asks]

    Engine(linear(), drafters=[Looks()], rows=rows).plan(Costs((1,), (1,), ((1.0,),)))
    assert [*dict.fromkeys(seen)] == batches


@pytest.mark.parametrize("softmax", [False, True])
def test_models_that_keep_softmax(llama, softmax):
    """As a draft, whole; as a target, in some layers."""
    target = llama()
    config = linearized.LinearConfig(attention="grouped", group=8, layers=(1,))
    linearized.linearize(target, config)
    wanted = requests(5, seed=3)
    want = [alone(target, *request) for request in wanted]
    draft = llama(layers=1, seed=3) if softmax else target
    before = {name: p.data_ptr() for name, p in draft.named_parameters()}
    drafter = ModelDrafter(draft, depth=3)
    engine = Engine(target, drafters=[drafter], rows=3)
    texts = [Text(p, sampling=s, max_new_tokens=30) for p, s in wanted]
    for text in texts:
        engine.add(text)
    run(engine)
    assert [text.new_tokens for text in texts] == want
    assert {name: p.data_ptr() for name, p in drafter.model.named_parameters()} == before
    if softmax:
        assert draft.config._attn_implementation != "linearized"


def test_a_draft_that_is_the_target_is_always_right(linear, llama):
    """Its trees are committed from what it has verified, and read on where they end."""
    for model in (linear(group=8), linearized.models.decoder(llama())):
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=9)):
            text = Text(PROMPT, sampling=sampling, max_new_tokens=41)
            engine = Engine(model, drafters=[ModelDrafter(model, depth=4, width=1, floor=0.0)])
            engine.add(text)
            run(engine)
            assert text.rounds == 9 and text.accepted.total() == 32, text.accepted


class Failing(Random):
    def __init__(self, where: str, after: int = 3) -> None:
        super().__init__()
        self.where, self.after, self.calls = where, after, 0
        self.forgotten: list[Text] = []

    def propose(self, asks):
        self.calls += 1
        if self.where == "propose" and self.calls >= self.after:
            raise MemoryError
        if self.where == "too few":
            return []
        return super().propose(asks)

    def forget(self, text):
        self.forgotten.append(text)
        if self.where == "forget":
            raise MemoryError


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("where", ["propose", "too few", "forget"])
def test_a_drafter_that_fails_is_not_asked_again(linear, caplog, where, planned):
    """Texts go on without it; all drafters hear of those that have ended."""
    model = linear(group=8)
    wanted = [([1, 2, 3], 3), ([4, 5], 12), ([4, 5], 12)]
    want = [alone(model, prompt, Sampling(), length) for prompt, length in wanted]
    stop = want[1][4]
    for stops in ((), (stop,)):
        failing, other = Failing(where), Failing("nowhere")
        engine = Engine(model, drafters=[failing, other], rows=3)
        if planned:
            engine.plan(Costs((1,), (1,), ((1.0,),)))
        sampling = Sampling(stop_ids=frozenset(stops))
        texts = [Text(p, sampling=sampling, max_new_tokens=n) for p, n in wanted]
        for text in texts:
            engine.add(text)
        run(engine)
        ends = [cut(tokens, stop) for tokens in want] if stops else want
        assert [text.new_tokens for text in texts] == ends
        assert set(texts) <= set(failing.forgotten) and set(texts) <= set(other.forgotten)
        assert not len(engine.pool)
        asked = failing.calls
        engine.add(Text([4, 5], sampling=sampling, max_new_tokens=12))
        run(engine)
        assert failing.calls == asked
    assert caplog.text.count("Failing could not") == 2


def test_a_draft_that_cannot_let_go_keeps_no_row(linear, monkeypatch):
    model = linear(group=8)
    drafter = ModelDrafter(model, depth=3)
    engine = Engine(model, drafters=[drafter], rows=2)
    texts = [Text(PROMPT, sampling=Sampling(), max_new_tokens=20) for _ in range(2)]
    for text in texts:
        engine.add(text)
    for _ in range(3):
        engine.step()

    def commit(*args):
        raise MemoryError

    monkeypatch.setattr("linearized.speculative.drafters.model.accept", commit)
    run(engine)
    assert not len(drafter._pool) and not drafter._read
    assert {tuple(text.new_tokens) for text in texts} == {
        tuple(alone(model, PROMPT, Sampling(), 20))
    }


def gpt2(positions: int = 64) -> transformers.PreTrainedModel:
    """Its positions are a table."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=positions, n_embd=32, n_layer=2, n_head=4,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval().double()
    linearized.linearize(model, linearized.LinearConfig(attention="grouped", group=8))
    return model


def test_texts_longer_than_the_models_positions_are_refused():
    model = gpt2()
    want = alone(model, [5] * 44, Sampling(), 20)
    engine = Engine(model, drafters=[Random(), ModelDrafter(gpt2(32))])
    longest = Text([5] * 44, sampling=Sampling(), max_new_tokens=20)
    engine.add(longest)
    engine.step()
    for prompt, length, param in ((44, 21, "max_tokens"), (65, 1, "prompt")):
        with pytest.raises(RequestError, match="positions for 64 tokens, .* shorten one") as found:
            engine.add(Text([5] * prompt, sampling=Sampling(), max_new_tokens=length))
        assert found.value.param == param
    run(engine)
    assert longest.new_tokens == want and len(longest.tokens) == 64
    tiny = Engine(gpt2(16), drafters=[Random()])
    tiny.plan(Costs((1,), (1,), ((1.0,),)))  # nothing to rehearse with


def test_a_tree_that_leads_beyond_the_positions_is_left_out(caplog):
    """A guess may be wrong in any way."""
    model = gpt2(32)

    class Deep(Random):
        def propose(self, asks):
            return [TokenTree.chain([1] * 13) for _ in asks]

    engine = Engine(model, drafters=[Deep()])
    texts = [Text([5] * n, sampling=Sampling(), max_new_tokens=12) for n in (20, 3)]
    want = [alone(model, [5] * n, Sampling(), 12) for n in (20, 3)]
    for text in texts:
        engine.add(text)
    run(engine)
    assert [text.new_tokens for text in texts] == want


@pytest.mark.parametrize("where", ["reading.extend", "engine.step"])
def test_a_text_that_cannot_be_read_or_verified_ends_alone(linear, monkeypatch, caplog, where):
    model = linear(group=8)
    bad = 60
    module, _, name = where.partition(".")
    real = getattr(importlib.import_module(f"linearized.speculative.{module}"), name)

    def fails(model, given, *args, **settings):
        if bad in getattr(given, "tokens", given):
            raise IndexError("out of positions")
        return real(model, given, *args, **settings)

    sampled = Sampling(temperature=0.9, logit_bias={bad: -100.0}, seed=3)
    want = [alone(model, p, sampled, 20) for p in ([1, 2, 3], [7, 8])]
    monkeypatch.setattr(f"linearized.speculative.{where}", fails)
    engine = Engine(model, drafters=[Random(vocab=60)], rows=3, chunk=3)
    broken = [4, bad, 4] if name == "extend" else [4, 4, bad]
    prompts = ([1, 2, 3], broken, [7, 8])
    texts = [Text(p, sampling=sampled, max_new_tokens=20) for p in prompts]
    for text in texts:
        engine.add(text)
    pieces = []
    while engine.busy:
        pieces += engine.step()
    assert [texts[0].new_tokens, texts[2].new_tokens] == want
    assert texts[1].finished == "error" and str(texts[1].error) == "out of positions"
    assert [(t, p.finished) for t, p in pieces if t is texts[1]] == [(texts[1], "error")]
    assert not len(engine.pool)


def test_a_text_that_cannot_be_chosen_for_ends_alone(linear, monkeypatch, caplog):
    model = linear(group=8)
    sampled = Sampling(temperature=0.9, seed=3)
    want = alone(model, PROMPT, sampled)
    good = Text(PROMPT, sampling=sampled, max_new_tokens=30)
    bad = Text(PROMPT, sampling=sampled, max_new_tokens=30)

    def adjusted(*args):
        raise ValueError("no such penalty")

    monkeypatch.setattr(bad.sampler, "adjusted", adjusted)
    engine = Engine(model, drafters=[Random()], rows=2)
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert bad.finished == "error" and str(bad.error) == "no such penalty"
    assert good.new_tokens == want


def test_a_text_whose_state_does_not_fit_ends_alone(linear, monkeypatch):
    model = linear(group=8)
    engine = Engine(model, rows=2)
    add = engine.pool.add

    def fails(text, state=None):
        if len(text.tokens) == 5:
            raise MemoryError("no room")
        add(text, state)

    monkeypatch.setattr(engine.pool, "add", fails)
    bad = Text([1] * 5, sampling=Sampling(), max_new_tokens=5)
    good = Text(PROMPT, sampling=Sampling(), max_new_tokens=30)
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert bad.finished == "error" and str(bad.error) == "no room"
    assert good.new_tokens == alone(model, PROMPT, Sampling())


def test_texts_whose_logits_are_no_numbers_end_with_an_error(linear):
    model = linear(group=8)
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num(0.1))
    engine = Engine(model, rows=2)
    bad = Text([3, 60], sampling=Sampling(), max_new_tokens=20)
    good = Text(PROMPT, sampling=Sampling(logit_bias={60: -1e4}), max_new_tokens=20)
    engine.add(bad)
    engine.add(good)
    run(engine)
    assert bad.finished == "error" and not bad.new_tokens and "NaN" in str(bad.error)
    assert good.finished == "length"


def cut(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def test_a_text_is_added_once(linear):
    model = linear(group=8)
    text = Text(PROMPT, sampling=Sampling(), max_new_tokens=30)
    engine = Engine(model, rows=2)
    engine.add(text)
    for _ in range(3):
        with pytest.raises(ConfigError, match="in the engine already"):
            engine.add(text)
        engine.step()
    run(engine)
    assert text.new_tokens == alone(model, PROMPT, Sampling())


def test_an_ended_text_keeps_its_tokens_alone(linear):
    """Thousands of them may be kept, for vocabularies of 100,000."""
    model = linear(group=8)
    sampling = Sampling(temperature=0.9, frequency_penalty=0.5)
    text = Text(PROMPT, sampling=sampling, max_new_tokens=9)
    engine = Engine(model, drafters=[ModelDrafter(model, depth=3)])
    engine.add(text)
    engine.step()
    assert text.sampler._noise and text.sampler._counts
    run(engine)
    assert not text.sampler._noise and not text.sampler._counts


def test_a_hybrids_state_leaves_the_engine_without_its_room(llama):
    hybrid = llama().double()
    config = linearized.LinearConfig(attention="grouped", group=8, layers=(0,))
    linearized.linearize(hybrid, config)
    want = alone(hybrid, [1, 2, 3], Sampling(), 20)
    engine = Engine(hybrid, rows=2)
    text = Text([1, 2, 3], sampling=Sampling(), max_new_tokens=20)
    engine.add(Text([1] * 500, sampling=Sampling(), max_new_tokens=500))
    engine.add(text)
    while len(text.new_tokens) < 4:
        engine.step()
    state = engine.remove(text)
    assert state.history.room == PAGE, "not the room of its neighbour"
    assert state.history.filled.tolist() == [len(text.tokens) - 1]
    limit = Engine(hybrid, rows=1).pool.bytes_at(100)
    other = Engine(hybrid, rows=1, memory=limit)
    other.add(text, state)
    while other.busy:
        other.step()
        assert other.pool.first(1).nbytes <= limit
    assert text.new_tokens == want


def test_what_pays_is_measured(linear):
    model = linear(dtype=torch.float32)
    engine = Engine(model, drafters=[Random()], rows=4, max_nodes=8)
    costs = engine.measure()
    engine.plan(costs)
    assert not engine.busy and not len(engine.pool) and not engine.seconds
    assert costs.batches == (1, 2, 4) and costs.nodes == (1, 2, 4, 8, 9)
    texts = [Text(p, sampling=s, max_new_tokens=60) for p, s in requests(6, seed=5)]
    for text in texts:
        engine.add(text)
    run(engine)
    want = [alone(model, p, s, 60) for p, s in requests(6, seed=5)]
    assert [text.new_tokens for text in texts] == want
    assert set(engine.seconds) == {"read", "draft", "verify", "commit", "rest"}


def test_bad_requests_are_refused_before_anything_runs(linear):
    engine = Engine(linear())
    greedy = Sampling()
    for text, words in (
        (Text([], sampling=greedy, max_new_tokens=3), "empty"),
        (Text([1, 61], sampling=greedy, max_new_tokens=3), "61 is outside"),
        (Text([1], sampling=greedy, max_new_tokens=-1), "-1"),
        (Text([1], sampling=greedy, max_new_tokens=1, logprobs=62), "logprobs.*62"),
        (Text([1], sampling=greedy, max_new_tokens=1, prompt_logprobs=-1), "prompt_logp.*-1"),
        (Text([1], sampling=greedy, max_new_tokens=1, logprobs=1.5), "whole, got 1.5"),
        (Text([1], sampling=greedy, max_new_tokens=1, num_prompt=2), "num_prompt.*got 2"),
        (Text([1], sampling=greedy, max_new_tokens=1, num_prompt=0), "num_prompt.*got 0"),
        (Text([1] * 4, sampling=greedy, max_new_tokens=2, num_prompt=1), "has 3 tokens, up to 2"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add(text)
    with pytest.raises(ConfigError, match="logit_bias names token id 99"):
        biased = Sampling(logit_bias=((99, 1.0),))
        engine.add(Text([1], sampling=biased, max_new_tokens=1))
    assert not engine.busy
    for length in (None, 2.5, True):
        with pytest.raises(RequestError, match=f"max_new_tokens must be a whole.*{length}"):
            Text([1], sampling=greedy, max_new_tokens=length)
    for name in ("rows", "max_nodes", "chunk"):
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, and whole, got 1.5"):
            Engine(linear(), **{name: 1.5})
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, and whole, got 0"):
            Engine(linear(), **{name: 0})
    engine.add(Text([1], sampling=greedy, max_new_tokens=3))
    with pytest.raises(ConfigError, match="measure needs an engine without texts, there are 1"):
        engine.measure()
    with pytest.raises(ConfigError, match="plan needs an engine without texts"):
        engine.plan(Costs((1,), (1,), ((1.0,),)))
    for model in (linear(vocab=97), linear(vocab=40)):
        with pytest.raises(ConfigError, match="vocabulary"):
            Engine(linear(), drafters=[ModelDrafter(model)])


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_numbers_that_are_none_stay_with_the_token_that_has_them(linear, llama, kind):
    """A guess that no text says, the token that pads, and a text that ended before."""
    model = linear(group=8)
    if kind == "hybrid":
        config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
        model = linearized.linearize(llama().double(), config)
    head = model.lm_head.weight.detach().clone()
    sampling = Sampling(logit_bias={0: -1e4, 60: -1e4})
    prompts = [[*range(1, 41)], [*range(1, 36)], [7, 3]]
    want = [alone(model, prompt, sampling, 20) for prompt in prompts]
    with torch.no_grad():
        model.model.embed_tokens.weight[[0, 60]] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(head)

    class Bad(Drafter):
        depth = 2

        def propose(self, asks):
            return [TokenTree.chain([60, 5]) if len(a.text.tokens) % 2 else TokenTree.empty
                    for a in asks]  # fmt: skip

    engine = Engine(model, drafters=[Bad()], rows=2)
    broken = Text([5, 60, 7], sampling=sampling, max_new_tokens=20)
    texts = [Text(prompt, sampling=sampling, max_new_tokens=20) for prompt in prompts]
    for text in (broken, *texts):
        engine.add(text)
    run(engine)
    assert broken.finished == "error"
    assert [text.new_tokens for text in texts] == want


def test_a_text_that_is_taken_out_while_it_is_read_goes_on(llama):
    config = linearized.LinearConfig(attention="grouped", group=8, taps=5, layers=(1,))
    model = linearized.linearize(llama().double(), config)
    prompts = [[n % 59 + 1 for n in range(491)], [n % 53 + 1 for n in range(171)]]
    want = [alone(model, prompt, Sampling(), 6) for prompt in prompts]
    engine = Engine(model, rows=2, chunk=400)
    texts = [Text(prompt, sampling=Sampling(), max_new_tokens=6) for prompt in prompts]
    engine.add(texts[0])
    engine.step()
    state = engine.remove(texts[0])
    engine.add(texts[1])
    engine.add(texts[0], state)
    run(engine)
    assert [text.new_tokens for text in texts] == want
