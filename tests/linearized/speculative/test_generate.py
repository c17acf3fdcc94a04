"""Speculation never changes the text, whoever drafts."""

from __future__ import annotations

import itertools
import random
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers

import linearized
from linearized.errors import ConfigError, ModelError, RequestError
from linearized.speculative import (
    Drafter,
    Engine,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
)
from linearized.speculative.detokenizer import Detokenizer
from linearized.speculative.drafters import Ask
from linearized.speculative.generate import decoding

PROMPT = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8]


class Knowing(Drafter):
    """Drafts what plain decoding will say, as far as `right` goes, then something else."""

    depth = 20

    def __init__(self, text: list[int], *, right: int, wrong: int = 0) -> None:
        self.text, self.right, self.wrong = text, right, wrong

    def propose(self, asks):
        return [self.tree(self.text[len(ask.text.tokens) :][: self.right]) for ask in asks]

    def tree(self, rest: list[int]) -> TokenTree:
        return TokenTree.chain(rest + [(rest or [0])[-1] + 1] * self.wrong)


class Random(Knowing):
    """Draws trees of any shape, often empty."""

    def __init__(self, vocab: int, seed: int) -> None:
        super().__init__([], right=0)
        self.vocab, self.random = vocab, random.Random(seed)

    def tree(self, rest):
        size = self.random.choice([0, 0, 1, 2, 5, 13])
        return TokenTree(
            tuple(self.random.randrange(self.vocab) for _ in range(size)),
            tuple(self.random.randrange(-1, n) for n in range(size)),
        )


class Branching(Knowing):
    """The right continuation as one branch among wrong ones."""

    def tree(self, rest):
        guesses, parents, last = [], [], -1
        for token in rest:
            guesses += [(token + 1) % 61, token]
            parents += [last, last]
            last = len(guesses) - 1
        return TokenTree(tuple(guesses), tuple(parents))


def generate(model, prompt, **settings):
    """Every tree is verified, whether it pays or not."""
    return linearized.generate(model, prompt, adaptive=False, **settings)


@pytest.mark.parametrize(
    "near, temperature, length",
    [
        *itertools.product([""], [0.0, 0.9], [1, 2, 7, 8, 9, 16, 21]),
        *[("local", 0.9, 21), ("grouped", 0.9, 1), ("hedgehog", 0.0, 1), ("hedgehog", 0.9, 21)],
    ],
)
def test_the_text_is_the_same_for_every_drafter(linear, near, temperature, length):
    """Groups of 8 and 40 new tokens: rounds begin at every offset and cross boundaries; with a
    window, they turn the ring. (vllm#39273: n-gram drafts on a recurrent model are accepted as
    often as they should be, and the text is another one.)"""
    model = linear(group=8, taps=5, near=near)
    prompt = (PROMPT * 3)[:length]
    settings = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.95, "seed": 5}
    plain = generate(model, prompt, **settings)
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
        assert generate(model, prompt, drafter=drafter, **settings) == plain, name


@pytest.mark.parametrize("seed", range(12))
def test_the_text_is_the_same_in_float32(linear, seed):
    model = linear(dtype=torch.float32, group=8, taps=5, seed=seed)
    prompt = [seed + 1, 2, 3]
    plain = generate(model, prompt, max_new_tokens=40)
    for drafter in (Knowing(prompt + plain, right=6), Random(61, seed), "ngram", model):
        assert generate(model, prompt, max_new_tokens=40, drafter=drafter) == plain


@pytest.mark.parametrize("depth", range(1, 9))
def test_the_text_does_not_depend_on_the_depth(linear, depth):
    """llama.cpp#23302: drafts of three tokens change the text, drafts of two do not."""
    model = linear(group=8, taps=5)
    settings = {"max_new_tokens": 40, "temperature": 0.9, "seed": 5}
    plain = generate(model, PROMPT, **settings)
    for drafter in (
        ModelDrafter(model, depth=depth, width=2),
        ModelDrafter(linear(layers=1, seed=3), depth=depth, width=3, floor=0.0),
        Knowing(PROMPT + plain, right=depth - 1, wrong=1),
    ):
        assert generate(model, PROMPT, drafter=drafter, **settings) == plain


def test_of_equal_tokens_the_first_is_taken_whatever_is_drafted(linear):
    """vllm#42960: equal logits are resolved in another way with drafts. Here each token has a twin
    with the same embedding."""
    model = linear(vocab=60, group=8)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[30:] = table[:30]
    prompt = [token % 30 for token in PROMPT]
    logits = model(torch.tensor([prompt])).logits[0, -1]
    assert torch.equal(logits[:30], logits[30:])
    plain = generate(model, prompt, max_new_tokens=40)
    assert max(plain) < 30
    twins = prompt + [token + 30 for token in plain]
    for drafter in (Knowing(prompt + plain, right=4), Knowing(twins, right=3), model, "ngram"):
        assert generate(model, prompt, max_new_tokens=40, drafter=drafter) == plain
    both = generate(model, [prompt, prompt[:4]], max_new_tokens=40, drafter=model)
    assert both[0] == plain and max(both[1]) < 30


def test_end_of_text_inside_a_tree(linear):
    model = linear(group=8)
    plain = generate(model, PROMPT, max_new_tokens=30, stop_ids=())
    for stop in (plain[4], plain[11]):
        want = plain[: plain.index(stop) + 1]
        for drafter in (None, Knowing(PROMPT + plain, right=8), "ngram"):
            out = generate(model, PROMPT, max_new_tokens=30, stop_ids=[stop], drafter=drafter)
            assert out == want


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_max_new_tokens_inside_a_tree(linear, limit):
    model = linear(group=8)
    plain = generate(model, PROMPT, max_new_tokens=30, stop_ids=())
    drafter = Knowing(PROMPT + plain, right=8)
    out = generate(model, PROMPT, max_new_tokens=limit, drafter=drafter, stop_ids=())
    assert out == plain[:limit]


def test_several_prompts_and_a_callback(linear):
    model = linear()
    seen: dict[int, list[int]] = {0: [], 1: []}
    out = generate(
        model, [PROMPT, PROMPT[:3]], max_new_tokens=9, drafter="ngram",
        on_tokens=lambda index, new: seen[index].extend(new),
    )  # fmt: skip
    assert out == [seen[0], seen[1]]
    assert out[1] == generate(model, PROMPT[:3], max_new_tokens=9)


def test_what_pays_is_chosen_and_changes_no_text(linear):
    model = linear(group=8)
    plain = generate(model, PROMPT, max_new_tokens=60, stop_ids=())
    for drafter in (Knowing(PROMPT + plain, right=6), Random(61, 3), "ngram", linear(layers=1)):
        settings = {"max_new_tokens": 60, "stop_ids": (), "drafter": drafter}
        assert linearized.generate(model, PROMPT, **settings) == plain


def test_several_drafters_in_order(linear):
    model = linear(group=8)
    plain = generate(model, PROMPT, max_new_tokens=40)
    drafters = ["ngram", linear(layers=1, seed=3), Random(61, 3)]
    assert generate(model, PROMPT, max_new_tokens=40, drafter=drafters) == plain


def test_a_drafter_drafts_for_many_texts(linear):
    """What it drafts for one does not depend on the others."""
    model = linear()
    prompts = [PROMPT * 2, [1, 2, 1, 2, 1], PROMPT * 9]
    for make in (lambda: ModelDrafter(model, depth=3), NgramDrafter):
        alone, together = [], make()
        texts = [Text(p, sampling=Sampling(), max_new_tokens=9) for p in prompts]
        for text in texts:
            alone += make().propose([Ask(text, 3, 9)])
        for _ in range(2):
            found = together.propose([Ask(text, 3, 9) for text in texts])
            assert [tree.tokens for tree in found] == [tree.tokens for tree in alone]
        together.forget(texts[1])
        found = together.propose([Ask(text, 3, 9) for text in reversed(texts)])
        assert [tree.tokens for tree in reversed(found)] == [tree.tokens for tree in alone]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=2)])
def test_only_what_is_worth_it_is_followed(linear, sampling):
    """What is less probable may be a leaf."""
    drafter = ModelDrafter(linear(layers=1), depth=6, width=4, floor=0.0)
    text = Text([3, 1, 4, 1, 5], sampling=sampling, max_new_tokens=20)
    (whole,) = drafter.propose([Ask(text, 6, 24)])
    inner = sorted(whole.scores[parent] for parent in set(whole.parents) - {-1})
    follow = inner[len(inner) // 2]
    (part,) = drafter.propose([Ask(text, 6, 24, follow * 0.999)])
    assert 0 < len(part) < len(whole)
    assert all(part.scores[parent] >= follow * 0.999 for parent in part.parents if parent >= 0)
    assert min(part.scores) < follow


def test_ngram_finds_the_latest_continuation():
    def continued(tokens, depth=3):
        text = Text(tokens, sampling=Sampling(), max_new_tokens=9)
        return NgramDrafter().propose([Ask(text, depth, 9)])[0].tokens

    assert continued([1, 2, 3, 9, 1, 2]) == (3, 9, 1)
    assert continued([1, 2, 3, 9, 1, 2, 4, 4, 1, 2]) == (4, 4, 1)
    assert continued([1, 2, 3]) == ()
    assert continued([1, 2, 3, 9, 1, 2], depth=2) == (3, 9)


@pytest.mark.parametrize("drafted", [False, True])
def test_stop_strings(linear, tokenizer, drafted):
    model = linear(vocab=len(tokenizer), group=8)
    prompt = tokenizer("the quick")["input_ids"]
    plain = generate(model, prompt, max_new_tokens=40, stop_ids=())
    settings = {"max_new_tokens": 40, "stop_ids": (), "tokenizer": tokenizer}
    settings["drafter"] = Knowing(prompt + plain, right=7) if drafted else None
    text = tokenizer.decode(plain)
    for start, size in ((7, 5), (3, 1), (11, 12)):
        stop = text[start : start + size]
        found = generate(model, prompt, stop=stop, **settings)
        assert found == plain[: len(found)]
        assert stop in tokenizer.decode(found) and stop not in tokenizer.decode(found[:-1])
    found = generate(model, prompt, stop=["never there"], **settings)
    assert found == plain
    assert generate(model, prompt, stop=None, **settings) == plain


@pytest.mark.parametrize("drafted", [False, True])
def test_min_tokens_come_before_a_stop_string(linear, tokenizer, drafted):
    """It is found where it stands behind them, and not before."""
    model = linear(vocab=len(tokenizer), group=8)
    prompt = tokenizer("the quick")["input_ids"]
    settings = {"max_new_tokens": 40, "stop_ids": (), "tokenizer": tokenizer}
    plain = generate(model, prompt, **settings)
    settings["drafter"] = Knowing(prompt + plain, right=7) if drafted else None
    ends = [len(tokenizer.decode(plain[:n])) for n in range(41)]
    text = tokenizer.decode(plain)
    stop = next(one for one in text[ends[30] :] if one in text[: ends[30]] and one.isascii())
    want = next(n for n in range(31, 41) if stop in text[ends[30] : ends[n]])
    assert len(generate(model, prompt, stop=stop, **settings)) < 30
    assert generate(model, prompt, stop=stop, min_tokens=30, **settings) == plain[:want]


def test_a_stop_string_may_name_a_special_token(linear, tokenizer):
    model = linear(vocab=len(tokenizer), group=8)
    prompt = tokenizer("the quick")["input_ids"]
    (end,) = tokenizer("<|endoftext|>")["input_ids"]
    settings = {"max_new_tokens": 20, "stop_ids": (), "tokenizer": tokenizer}
    bias = {"logit_bias": {end: 4.0}, "temperature": 1.0, "seed": 3}
    plain = generate(model, prompt, **settings, **bias)
    assert 0 < plain.index(end) < 18
    for stop in ("<|endoftext|>", [tokenizer.decode(plain[: plain.index(end)]) + "<|endoftext|>"]):
        found = generate(model, prompt, stop=stop, **settings, **bias)
        assert found == plain[: plain.index(end) + 1]


def test_equal_prompts_get_texts_of_their_own(linear):
    """Each of which can be had again alone; with any drafter."""
    model = linear()
    settings = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5, "stop_ids": ()}
    texts = generate(model, [PROMPT] * 4, **settings)
    assert len(set(map(tuple, texts))) == 4
    for drafter in (None, "ngram", model):
        again = [generate(model, PROMPT, choice=i, drafter=drafter, **settings) for i in range(4)]
        assert again == texts
        assert generate(model, [PROMPT] * 2, choice=2, **settings) == texts[2:]
    greedy = generate(model, [PROMPT] * 2, max_new_tokens=12)
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("drafter", [None, "ngram", Random(61, seed=1)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_gives_no_numbers(linear, tokenizer, drafter, temperature):
    model = linear(vocab=len(tokenizer))
    model.model.norm.weight.data[0] = float("nan")
    settings = {"max_new_tokens": 9, "temperature": temperature, "drafter": drafter}
    for stop in ((), "never there"):
        with pytest.raises(
            ModelError, match="the model gave NaN logits for position 3 of the text"
        ):
            linearized.generate(model, [1, 2, 3], stop=stop, tokenizer=tokenizer, **settings)


def test_a_draft_that_gives_no_numbers_changes_nothing(linear):
    model, draft = linear(), linear(layers=1)
    draft.model.norm.weight.data[0] = float("nan")
    for temperature in (0.0, 0.8):
        settings = {"max_new_tokens": 12, "temperature": temperature}
        want = generate(model, PROMPT, **settings)
        assert generate(model, PROMPT, drafter=draft, **settings) == want


def byte_fallback_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As Llama-2, Mistral and Gemma have it."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcde."]
    vocab = {name: token for token, name in enumerate(names)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<unk>", "<s>", "</s>"],
    )  # fmt: skip


def test_what_is_known_of_a_tokenizer(tokenizer):
    plain, fallback = decoding(tokenizer), decoding(byte_fallback_tokenizer())
    assert plain.hidden == {0: "<|endoftext|>"} and plain.joint is False
    assert fallback.hidden == {0: "<unk>", 1: "<s>", 2: "</s>"} and fallback.joint is True
    text = "a 😀日本.\n b"
    ids = byte_fallback_tokenizer()(text)["input_ids"]
    assert fallback(ids) == text
    stream = Detokenizer(fallback)
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    words = tokenizers.Tokenizer(models.WordPiece({"a": 0, "'": 1, "b": 2, "[UNK]": 3}))
    words.decoder = decoders.WordPiece(cleanup=False)
    cleaning = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", clean_up_tokenization_spaces=True
    )
    assert cleaning.decode([0, 1, 2]) == "a'b" and decoding(cleaning)([0, 1, 2]) == "a ' b"


def test_arrays_and_tensors_are_prompts(linear):
    model = linear()
    want = generate(model, [1, 2, 3], max_new_tokens=5)
    for one in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), (1, 2, 3), [np.int64(1), 2, 3]):
        assert generate(model, one, max_new_tokens=5) == want
        assert generate(model, [one, one], max_new_tokens=5) == [want, want]
    assert generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5) == [want]
    assert generate(model, np.array([[1, 2, 3]]), max_new_tokens=5) == [want]


def test_errors_name_the_value(linear, llama):
    model = linear()
    with pytest.raises(RequestError, match="empty"):
        generate(model, [], max_new_tokens=3)
    for prompt, words in (
        ("text", "str 'text'; tokenizer"),
        ([[1], "text"], "str 'text'"),
        ([1, 2.0], "float 2.0"),
        ([1, True], "bool True"),
        ([[1], [None]], "NoneType"),
        (torch.rand(3), "float"),
        (None, "NoneType None"),
    ):
        with pytest.raises(RequestError, match=f"a prompt is a list of token ids, got {words}"):
            generate(model, prompt, max_new_tokens=3)
    with pytest.raises(RequestError, match="61 is outside the vocabulary of 61"):
        generate(model, [1, 61], max_new_tokens=3)
    with pytest.raises(RequestError, match="-3"):
        generate(model, [1], max_new_tokens=-3)
    with pytest.raises(ConfigError, match="'eagle'; choose from ngram, layers, medusa"):
        generate(model, [1], max_new_tokens=3, drafter="eagle")
    for name in ("medusa", "layers"):
        with pytest.raises(ModelError, match="medusa|jobs.layers"):
            generate(model, [1], max_new_tokens=3, drafter=name)
    with pytest.raises(ConfigError, match="97.*61"):
        generate(model, [1], max_new_tokens=3, drafter=linear(vocab=97))
    with pytest.raises(ConfigError, match="a drafter is.*int"):
        generate(model, [1], max_new_tokens=3, drafter=3)
    with pytest.raises(ConfigError, match="stop strings need the tokenizer"):
        generate(model, [1], max_new_tokens=3, stop="a")
    with pytest.raises(ModelError, match="not linearized"):
        generate(llama(), [1], max_new_tokens=3)


def test_times_are_measured_once(linear, monkeypatch):
    model = linear(dtype=torch.float32)
    measured = []
    measure = Engine.measure
    monkeypatch.setattr(Engine, "measure", lambda it: (measured.append(it), measure(it))[1])
    for prompts in ([[1, 2]], [[3]], [[1], [2], [3]], [[4], [5], [6]]):
        linearized.generate(model, prompts, max_new_tokens=3, drafter="ngram")
    assert [engine.pool.num_rows for engine in measured] == [1, 3]
    module = sys.modules[linearized.generate.__module__]
    monkeypatch.setattr(module, "is_packed", lambda model: True)  # other times
    linearized.generate(model, [1], max_new_tokens=3, drafter="ngram")
    assert len(measured) == 3
    linearized.generate(model, [1, 2, 3, 4], max_new_tokens=3, drafter=[])
    assert len(measured) == 3  # nobody drafts


def test_what_was_learnt_is_kept_for_the_next_call(linear, monkeypatch):
    """Drafters alike do not rehearse again, and are planned by who knows them."""
    model, draft = linear(dtype=torch.float32), linear(layers=1, seed=3, dtype=torch.float32)
    engines: list[Engine] = []
    rehearsed: list[Engine] = []
    plan, rehearse = Engine.plan, Engine._rehearse
    monkeypatch.setattr(Engine, "plan", lambda it, known: (engines.append(it), plan(it, known))[1])
    monkeypatch.setattr(Engine, "_rehearse", lambda it: (rehearsed.append(it), rehearse(it))[1])
    for drafter in (draft, "ngram", draft, "ngram", NgramDrafter(depth=3), draft):
        linearized.generate(model, [1, 2], max_new_tokens=9, drafter=drafter)
    first, ngrams, _, _, other, _ = engines
    assert rehearsed == [first, ngrams, other]
    planners = [engine._drafting[0].planner for engine in engines]
    assert planners[0] is planners[2] is planners[5] and planners[1] is planners[3]
    assert len({*planners}) == 3
    assert {engine._clock for engine in engines} == {first._clock}
    assert not any(planner._texts for planner in planners)
    with pytest.raises(ConfigError):  # and also after a call that failed
        linearized.generate(model, [1, 2], max_new_tokens=9, drafter=draft, logit_bias={999: 1.0})
    linearized.generate(model, [1, 2], max_new_tokens=9, drafter=draft)
    assert len(rehearsed) == 3 and engines[-1]._drafting[0].planner is planners[0]
