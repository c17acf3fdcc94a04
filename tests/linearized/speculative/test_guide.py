"""Guided texts obey their guide, and are the plain ones whatever is drafted."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import jsonschema
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from linearized.errors import ConfigError, ModelError, RequestError
from linearized.speculative import (
    Drafter,
    Engine,
    Guide,
    Guides,
    ModelDrafter,
    NgramDrafter,
    Sampling,
    Text,
    TokenTree,
    generate,
)
from linearized.speculative import guide as guide_module
from linearized.speculative.generate import decoding
from linearized.speculative.guide import KINDS, MAX_BYTES, WHITESPACE

END = 0
PADDING = 13
"""Tokens of the model that the tokenizer does not have."""

INNER = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": -5, "maximum": 1200},
        "x": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["n"],
}
SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "tags": {"type": "array", "items": {"enum": ["a", "bé", 7, None]}, "maxItems": 3},
            "inner": {"$ref": "#/$defs/inner"},
        },
        "required": ["name", "tags", "inner"],
        "$defs": {"inner": INNER},
    },
    "patterns": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": r"^[A-Z]{2}-\d{1,3}.$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["code", "day"],
    },
    "numbers": {
        "type": "array",
        "items": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
        "minItems": 2,
        "maxItems": 3,
    },
    "unicode": {
        "type": "object",
        "properties": {
            "größe 日本": {"const": '🙂 "quoted"\n\\'},
            "short": {"type": "string", "minLength": 2, "maxLength": 3},
        },
        "required": ["größe 日本", "short"],
    },
    "told apart": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "a"}, "size": {"enum": [1, 2]}},
                "required": ["kind", "size"],
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "b"}, "on": {"type": "boolean"}},
                "required": ["kind", "on"],
            },
        ]
    },
}
SAMPLINGS = [
    Sampling(stop_ids=frozenset({END})),
    Sampling(stop_ids=frozenset({END}), temperature=1.0, top_p=0.9, seed=1),
    Sampling(
        stop_ids=frozenset({END}),
        temperature=2.0,
        top_k=60,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        logit_bias={17: 5.0},
        seed=2,
    ),
]


def byte_fallback() -> transformers.PreTrainedTokenizerFast:
    """Of the Llama-2 kind."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if byte != 1)]
    names += ["▁", "▁the", "▁{", '{"', '":', "日本", "é", '"', '▁"', *map(chr, range(0x21, 0x7F))]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@dataclass(frozen=True)
class Vocab:
    tokenizer: transformers.PreTrainedTokenizerBase
    size: int
    """Of the model."""
    guides: Guides

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerBase) -> Vocab:
        size = len(tokenizer) + PADDING
        return cls(tokenizer, size, Guides(tokenizer, size, [tokenizer.eos_token_id]))

    def compile(self, kind: str, source: str = "") -> Guide:
        return self.guides.compile(kind, source)

    def ids(self, *names: str) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(list(names))

    def said(self, text: Text) -> str:
        tokens = [token for token in text.new_tokens if token not in text.sampling.stop_ids]
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def ramble(self, guide: Guide, sampling: Sampling, most: int = 60) -> Text:
        """A text from random logits."""
        text = Text([3], sampling=sampling, max_new_tokens=most, guide=guide)
        made = torch.Generator().manual_seed(sampling.seed)
        while text.finished is None:
            logits = torch.randn(1, self.size, generator=made) * 3
            _, new = text.choose(logits, TokenTree.empty)
            text.take(new, TokenTree.empty, [], logits)
        return text


@pytest.fixture(scope="module")
def vocab(tokenizer) -> Iterator[Vocab]:
    made = Vocab.of(tokenizer)
    yield made
    made.guides.close()


@pytest.fixture(scope="module")
def fallback() -> Iterator[Vocab]:
    made = Vocab.of(byte_fallback())
    yield made
    made.guides.close()


@pytest.fixture(params=["byte level", "byte fallback"])
def either(request, vocab, fallback) -> Vocab:
    return vocab if request.param == "byte level" else fallback


@pytest.fixture
def model(vocab, linear) -> transformers.PreTrainedModel:
    return linear(vocab=vocab.size, layers=1)


class Guesser(Drafter):
    """Says what it was told, among tokens that no guide allows, and beyond the end of the text."""

    depth = 9

    def __init__(self, tokens: dict[Guide | None, list[int]], vocab: int) -> None:
        self.tokens = tokens
        self.vocab = vocab
        self.draw = random.Random(0)

    def propose(self, asks):
        return [self._tree(self.tokens[ask.text.guide][ask.text.num_new :]) for ask in asks]

    def _tree(self, rest: list[int]) -> TokenTree:
        tokens: list[int] = []
        parents: list[int] = []
        last = -1
        for token in [*rest[: self.draw.randrange(2, 9)], END, END, 5]:
            wrong = [END, self.vocab - 1, self.draw.randrange(self.vocab)]
            wrong = [one for one in wrong if one != token][: self.draw.randrange(2)]
            tokens += [*wrong, token]
            parents += [last] * (len(wrong) + 1)
            last = len(tokens) - 1
        return TokenTree(tuple(tokens[:16]), tuple(parents[:16]))


def run(model, *texts: Text, drafters=()) -> list[Text]:
    engine = Engine(model, rows=len(texts), drafters=drafters)
    for text in texts:
        engine.add(text)
    while engine.busy:
        engine.step()
    for text in texts:
        if text.error is not None:
            raise text.error
    return list(texts)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "adjusted"])
def test_json_fits_its_schema_whatever_is_drafted(vocab, model, linear, sampling):
    """Also where a text goes on elsewhere, as the complaint dynamo#7930 has it."""
    prompt = vocab.tokenizer("quick")["input_ids"]
    guides = [vocab.compile("json_schema", json.dumps(one)) for one in SCHEMAS.values()]

    def texts(known: list[list[int]]) -> list[Text]:
        return [
            Text(
                [*prompt, *new],
                sampling=sampling,
                max_new_tokens=300,
                guide=guide,
                num_prompt=len(prompt),
            )
            for new, guide in zip(known, guides, strict=True)
        ]

    nothing: list[list[int]] = [[] for _ in guides]
    plain = run(model, *texts(nothing))
    for text, schema in zip(plain, SCHEMAS.values(), strict=True):
        assert text.finished == "stop"
        jsonschema.validate(json.loads(vocab.said(text)), schema)
    want = [text.new_tokens for text in plain]
    right = Guesser(dict(zip(guides, want, strict=True)), vocab.size)
    other = linear(vocab=vocab.size, layers=1, seed=5)
    for drafter in (
        right,
        ModelDrafter(model, depth=4, width=3),
        ModelDrafter(other, depth=3, width=2, floor=0.0),
        NgramDrafter(shortest=1),
    ):
        drafted = run(model, *texts(nothing), drafters=[drafter])
        assert [(text.new_tokens, text.finished) for text in drafted] == [
            (new, "stop") for new in want
        ]
        if drafter is right:
            assert sum(text.rounds for text in drafted) < sum(map(len, want)) / 2
    moved = run(model, *texts([new[: len(new) // 2] for new in want]), drafters=[right])
    assert [text.new_tokens for text in moved] == want
    assert all(text.finished == "stop" for text in texts(want))


class Wide(Drafter):
    """Says what it was told, behind more probable guesses that no guide allows, and more of them
    than are verified."""

    depth = 4

    def __init__(self, tokens: list[int], wrong: list[int]) -> None:
        self.tokens, self.wrong = tokens, wrong

    def propose(self, asks):
        return [self._tree(self.tokens[ask.text.num_new :][: self.depth]) for ask in asks]

    def _tree(self, rest: list[int]) -> TokenTree:
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        last, above = -1, 1.0
        for token in rest:
            wrong = [one for one in self.wrong if one != token]
            tokens += [*wrong, token]
            parents += [last] * (len(wrong) + 1)
            scores += [0.5 * above] * len(wrong) + [0.1 * above]
            last, above = len(tokens) - 1, 0.1 * above
        return TokenTree(tuple(tokens), tuple(parents), tuple(scores))


def test_forbidden_guesses_are_not_verified_and_make_room_for_others(vocab, model):
    guide = vocab.compile("regex", r"[0-9]{24}")
    sampling = Sampling(stop_ids=frozenset({END}))

    def text() -> Text:
        return Text([5, 6], sampling=sampling, max_new_tokens=40, guide=guide)

    (plain,) = run(model, text())
    letters = vocab.ids("a", "b", "c", "d", "e", "f")
    unknown = [vocab.size, vocab.size + 99, -3]
    wide = Wide(plain.new_tokens, [*letters, *unknown, vocab.size - 1])
    (drafted,) = run(model, text(), drafters=[wide])
    assert (drafted.new_tokens, drafted.finished) == (plain.new_tokens, "stop")
    assert drafted.rounds <= -(-plain.num_new // (wide.depth + 1)) + 1
    assert drafted.drafted == drafted.accepted and drafted.drafted[wide.depth] > 2
    (ended,) = run(model, text(), drafters=[Wide([*plain.new_tokens, 3, 4, 5], letters)])
    assert ended.new_tokens == plain.new_tokens
    assert sum(ended.drafted.values()) == sum(ended.accepted.values())  # nothing beyond the end


@pytest.mark.parametrize("kind", ["json", "json_schema"])
def test_json_is_an_object_and_never_endless_white_space(either, kind):
    """As the complaint vllm#55313 has it; a logit bias for spaces stands for a model that likes
    them."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"enum": [1]}, "maxItems": 2}},
    }
    guide = either.compile(kind, json.dumps(schema) if kind == "json_schema" else "")
    spaces = [one for one in either.ids("Ġ", "Ċ", "▁", "<0x0A>") if one]
    end = frozenset({either.tokenizer.eos_token_id})
    for seed in range(3):
        sampling = Sampling(
            temperature=1.0, seed=seed, stop_ids=end, logit_bias=dict.fromkeys(spaces, 30.0)
        )
        text = either.ramble(guide, sampling, 300)
        found = either.said(text)
        assert found.lstrip()[0] == "{"
        outside = re.sub(r'"(\\.|[^"\\])*"?', '""', found)
        assert not re.search(rf"\s{{{WHITESPACE + 1}}}", outside)
        if kind == "json_schema":
            assert text.finished == "stop"
        if text.finished == "stop":
            assert isinstance(json.loads(found), dict)
        else:
            assert text.finished == "length" and text.num_new == 300


def test_no_special_or_unknown_token_is_in_a_guided_text(either):
    guide = either.compile("regex", r"[\s\S]*")
    special = sorted(
        {*either.tokenizer.all_special_ids, *range(len(either.tokenizer), either.size)}
    )
    sampling = Sampling(temperature=1.0, logit_bias={token: 50.0 for token in special})
    assert not {*either.ramble(guide, sampling, 40).new_tokens} & {*special}


def test_text_of_bytes_is_what_the_decoder_says(fallback):
    """Letters that no token spells come as tokens of a byte each."""
    guide = fallback.compile("choice", json.dumps(["größe 🙂", "日本é\n"], ensure_ascii=False))
    found = set()
    for seed in range(8):
        sampling = Sampling(
            temperature=1.0, seed=seed, stop_ids=frozenset({fallback.tokenizer.eos_token_id})
        )
        text = fallback.ramble(guide, sampling)
        assert text.finished == "stop"
        found.add(fallback.said(text))
    assert found == {"größe 🙂", "日本é\n"}


def test_a_choice_is_one_of_the_texts(vocab):
    choices = ["yes", "yes, but", "no", 'a "quoted" \\ line\n', "日本 🙂"]
    guide = vocab.compile("choice", json.dumps(choices))
    found = {
        vocab.said(
            vocab.ramble(guide, Sampling(temperature=1.0, seed=seed, stop_ids=frozenset({END})))
        )
        for seed in range(60)
    }
    assert found == set(choices)


def test_a_grammar_is_obeyed(vocab):
    guide = vocab.compile("grammar", 'root ::= pair ("," pair)*\npair ::= "(" [0-9] ")"')
    sampling = Sampling(temperature=1.0, seed=4, stop_ids=frozenset({END}))
    text = vocab.ramble(guide, sampling)
    assert re.fullmatch(r"\([0-9]\)(,\([0-9]\))*", vocab.said(text))


def test_a_text_ends_where_nothing_can_follow(vocab):
    """With `stop` and without a stop token, even if it has none, and at the last allowed token."""
    guide = vocab.compile("regex", "a{4}")
    for stop_ids in (frozenset({END}), frozenset()):
        text = vocab.ramble(guide, Sampling(stop_ids=stop_ids, min_tokens=30))
        assert (vocab.said(text), text.finished) == ("aaaa", "stop")
        assert END not in text.new_tokens
        size = text.num_new
        assert vocab.ramble(guide, Sampling(stop_ids=stop_ids), size).finished == "stop"
        cut = vocab.ramble(guide, Sampling(stop_ids=stop_ids), size - 1)
        assert cut.finished == "length"


def test_the_end_of_text_comes_only_where_the_guide_may_end(vocab):
    guide = vocab.compile("regex", "(ab)+")
    likes_the_end = Sampling(stop_ids=frozenset({END}), logit_bias={END: 100.0})
    text = vocab.ramble(guide, likes_the_end)
    assert (vocab.said(text), text.finished) == ("ab", "stop")
    assert text.new_tokens[-1] == END
    late = vocab.ramble(
        guide, Sampling(stop_ids=frozenset({END}), logit_bias={END: 100.0}, min_tokens=7)
    )
    assert late.num_new >= 8 and re.fullmatch("(ab)+", vocab.said(late))


def test_a_stop_string_ends_a_guided_text_wherever_it_comes(vocab):
    guide = vocab.compile("regex", "abcdef")
    text = Text(
        [3],
        sampling=Sampling(),
        max_new_tokens=20,
        guide=guide,
        stop=["cd"],
        decode=decoding(vocab.tokenizer),
    )
    shown = ""
    while text.finished is None:
        logits = torch.zeros(1, vocab.size)
        _, new = text.choose(logits, TokenTree.empty)
        shown += text.take(new, TokenTree.empty, [], logits).text
    assert (shown, text.finished) == ("ab", "stop")


def test_a_stop_token_that_is_text_ends_the_text_where_the_guide_allows_it_as_text(vocab):
    letter = vocab.ids("c")[0]
    text = vocab.ramble(
        vocab.compile("regex", "[ab]{3}c[ab]{3}"), Sampling(stop_ids=frozenset({END, letter}))
    )
    assert text.finished == "stop" and text.new_tokens[-1] == letter
    assert re.fullmatch("[ab]{3}", vocab.said(text))


def test_a_bias_brings_nothing_back_and_filters_count_what_is_allowed(vocab):
    letter = vocab.ids("z")[0]
    guide = vocab.compile("regex", "[ab]{20}")
    for sampling in (
        Sampling(logit_bias={letter: 100.0}),
        Sampling(temperature=1.0, top_k=1, logit_bias={letter: 100.0}),
        Sampling(temperature=1.0, top_p=0.01, logit_bias={letter: 100.0}, presence_penalty=2.0),
    ):
        assert re.fullmatch("[ab]{20}", vocab.said(vocab.ramble(guide, sampling)))


def test_typical_acceptance_takes_nothing_that_is_forbidden(vocab, model):
    guide = vocab.compile("regex", "[ab]{40}")
    sampling = Sampling(temperature=1.5, typical=1.0, seed=3)
    draw = random.Random(1)
    drafter = Guesser({guide: [draw.randrange(vocab.size) for _ in range(60)]}, vocab.size)
    text = Text([3], sampling=sampling, max_new_tokens=60, guide=guide)
    run(model, text, drafters=[drafter])
    assert re.fullmatch("[ab]{40}", vocab.said(text))


def test_where_no_token_fits_the_text_ends_with_an_error(linear, fallback):
    """No token of this vocabulary spells the second letter."""
    guide = fallback.compile("choice", '["a\\u0001"]')
    text = Text([3], sampling=Sampling(), max_new_tokens=5, guide=guide)
    with pytest.raises(ModelError, match="and the guide"):
        run(linear(vocab=fallback.size), text)
    assert fallback.said(text) == "a"


def test_a_text_that_does_not_obey_is_refused(vocab):
    guide = vocab.compile("regex", "[ab]+")
    ids = vocab.tokenizer("abzab")["input_ids"]
    with pytest.raises(RequestError, match="position 2 of the text does not obey its guide"):
        Text([3, *ids], sampling=Sampling(), max_new_tokens=9, guide=guide, num_prompt=1)


def test_guides_are_for_one_vocabulary(vocab, linear):
    text = Text([3], sampling=Sampling(), max_new_tokens=9, guide=vocab.compile("json"))
    with pytest.raises(ConfigError, match="make Guides with the model's vocab_size"):
        Engine(linear(vocab=61), rows=1).add(text)


def test_what_a_text_forgets_it_works_out_again(vocab, model):
    guide = vocab.compile("json_schema", json.dumps(SCHEMAS["numbers"]))
    sampling = Sampling(temperature=1.0, seed=7, stop_ids=frozenset({END}))
    want = Text([3, 4], sampling=sampling, max_new_tokens=99, guide=guide)
    run(model, want)
    text = Text([3, 4], sampling=sampling, max_new_tokens=99, guide=guide)
    engine = Engine(model, rows=1)
    engine.add(text)
    while engine.busy:
        engine.step()
        if text.finished is None:
            state = engine.remove(text)
            engine.add(text, state)
    assert text.new_tokens == want.new_tokens


def test_neighbours_are_not_guided(vocab, model):
    sampling = Sampling(stop_ids=frozenset({END}))
    guide = vocab.compile("regex", "[ab]{9}")

    def texts() -> list[Text]:
        free = [Text([3, i], sampling=sampling, max_new_tokens=12) for i in range(3)]
        return [*free, Text([3], sampling=sampling, max_new_tokens=12, guide=guide)]

    alone = [run(model, text)[0].new_tokens for text in texts()]
    together = run(model, *texts(), drafters=[NgramDrafter(shortest=1)])
    assert [text.new_tokens for text in together] == alone


def test_texts_without_a_guide_ask_none(model, monkeypatch):
    def called(*args):
        raise AssertionError

    monkeypatch.setattr(guide_module.Follower, "__init__", called)
    monkeypatch.setattr(guide_module.Follower, "mask", called)
    text = Text([3], sampling=Sampling(), max_new_tokens=5)
    run(model, text, drafters=[NgramDrafter()])
    assert text.sampler.is_plain and text.num_new == 5


def test_generate_takes_a_guide(vocab, model):
    guide = vocab.compile("regex", "[0-9]{5}")
    for temperature in (0.0, 1.0):
        ids = generate(model, [[3, 4], [5]], max_new_tokens=9, temperature=temperature, guide=guide)
        assert all(re.fullmatch("[0-9]{5}", vocab.tokenizer.decode(one)) for one in ids)


@pytest.mark.parametrize(
    "kind,source,problem",
    [
        ("json_schema", "{", "the schema is not JSON"),
        ("json_schema", '{"type": "strin"}', "the unknown type 'strin'"),
        (
            "json_schema",
            '{"not": {}}',
            "the schema at # has 'not', which guided decoding cannot enforce",
        ),
        ("json_schema", "[" * 50_000, "the schema is not JSON"),
        ("json_schema", '{"a":' * 3_000 + "1" + "}" * 3_000, "the schema"),
        ("regex", "(a", "has a ( without a )"),
        ("regex", "a**", "the regular expression cannot be compiled"),
        ("regex", r"(?=a)b", "at position 1"),
        ("regex", "a\0b", "NUL"),
        ("regex", "a\ud800", "half of a surrogate pair"),
        ("regex", "a" * (MAX_BYTES + 1), "has 65,537 bytes, 65,536 are allowed"),
        ("grammar", "root ::= other", "the grammar cannot be compiled"),
        ("grammar", "", "the grammar cannot be compiled"),
        ("choice", "[]", "a choice is a JSON array of texts"),
        ("choice", '["a", 1]', "a choice is a JSON array of texts"),
        ("choice", '["a\\u0000"]', "NUL"),
    ],
)
def test_what_cannot_be_compiled_is_refused(vocab, kind, source, problem):
    with pytest.raises(RequestError) as caught:
        vocab.compile(kind, source)
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message and len(message) < 500 and ".cc" not in message


def test_an_unknown_kind_is_named(vocab):
    with pytest.raises(
        ConfigError, match="unknown kind of guide 'xml'; choose from json, json_schema"
    ):
        vocab.compile("xml")
    assert KINDS == ("json", "json_schema", "regex", "grammar", "choice")


def test_without_xgrammar_it_says_what_to_install(vocab, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ConfigError, match="guided decoding needs xgrammar; pip install xgrammar"):
        Guides(vocab.tokenizer, vocab.size)


LETTERS = st.sampled_from(["a", "b", "0", " ", "-", "é", r"\.", r"\d", r"\w", "[ab]", "[^a]", "."])
EXPRESSIONS = st.recursive(
    LETTERS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        inner.map("(?:{})?".format),
        inner.map("({}){{1,3}}".format),
        inner.map("(?:{})*".format),
        inner.map("({})+?".format),
    ),
    max_leaves=6,
)


@settings(max_examples=40)
@given(expression=EXPRESSIONS, data=st.data())
def test_expressions_mean_what_they_mean_in_python(vocab, expression, data):
    guide = vocab.compile("regex", f"^{expression}$")
    pattern = re.compile(expression, re.ASCII)
    seed = data.draw(st.integers(0, 999))
    text = vocab.ramble(guide, Sampling(temperature=1.0, seed=seed, stop_ids=frozenset({END})), 40)
    if text.finished == "stop":
        assert pattern.fullmatch(vocab.said(text))
    fits = data.draw(
        st.from_regex(pattern, fullmatch=True, alphabet=st.sampled_from("ab01 -.é日x_"))
    )
    ids = vocab.tokenizer(fits)["input_ids"]
    Text([3, *ids], sampling=Sampling(), max_new_tokens=len(ids), guide=guide, num_prompt=1)


WIDE = {
    "regex": ["[^a]+", r"\D+", r"[\s\S]+", ".+", "[b-\uffff]+"],
    "grammar": ["root ::= [^a]+"],
    "json_schema": ['{"type": "string"}', '{"type": "string", "minLength": 1, "maxLength": 3}'],
}


@pytest.mark.parametrize("kind", WIDE)
def test_no_text_has_half_of_a_surrogate_pair(either, kind):
    """What UTF-8 would write for one is no character, and decodes to three that nobody chose."""
    spelled = either.guides._vocabulary.spelled
    byte = {one[0]: token for token, one in enumerate(spelled) if len(one) == 1}
    for source in WIDE[kind]:
        guide = either.compile(kind, source)
        text = [byte[ord('"')]] if kind == "json_schema" else []
        follower = guide.follower([END])
        for path in ((), (byte[0xED],)):  # in a tree, and in the text
            left = (byte[0xED],)[len(path) :]
            found = follower.mask(torch.zeros(1, either.size), [*text, *left], [path])[0]
            follows = {spelled[token][0] for token in found.isfinite().nonzero().flatten()}
            assert follows == set(range(0x80, 0xA0)), source
        assert follower.allows(text, (byte[0xED], byte[0x9F]), byte[0xBF])
        assert not follower.allows(text, (byte[0xED],), byte[0xA0])
        with pytest.raises(RequestError, match="does not obey its guide"):
            guide.follower([END]).follow([*text, byte[0xED], byte[0xA0], byte[0x80]])
        for token, one in enumerate(spelled):
            if re.search(rb"\xed[\xa0-\xbf]", one):
                assert not follower.allows(text, (), token)
