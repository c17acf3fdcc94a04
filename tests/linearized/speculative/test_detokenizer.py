"""Text comes as soon as it is certain, without stop strings, however many tokens a round gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from linearized.speculative.decoder import CONTEXT, REPLACEMENT, Decoder
from linearized.speculative.detokenizer import (
    MAX_WINDOW,
    Detokenizer,
    StopStrings,
    TextStream,
)


def decode_bytes(tokens: list[int]) -> str:
    """A tokenizer with a token a byte."""
    return bytes(tokens).decode("utf-8", errors="replace")


def by_name(decoder: decoders.Decoder | None, names: list[str]) -> Callable[[list[int]], str]:
    """As a tokenizer decodes: ids to names, then the decoder, or spaces between them."""
    if decoder is None:
        return lambda tokens: " ".join(names[token] for token in tokens)
    return lambda tokens: decoder.decode([names[token] for token in tokens]) if tokens else ""


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers have for each byte (Radford et al., GPT-2, 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


LETTERS = byte_letters()
PIECES = ["é", " ", "日本", "👨‍👩‍👧", "e\u0301", "the", " qu", "🙂", "\u200d", "\n", "a"]
BYTE_LEVEL = [
    *(LETTERS[byte] for byte in range(256)),
    *("".join(LETTERS[byte] for byte in piece.encode()) for piece in PIECES),
    *(
        "".join(LETTERS[byte] for byte in " 🙂🚀".encode()[a:b])
        for a, b in [(0, 3), (2, 6), (3, 8)]
    ),
]
FALLBACK = [
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *["▁", "▁▁", "▁the", "quick", "A", "▁A", "\ufffd", "日", "e\u0301", "\u200d", "🙂", "."],
]
WORDS = [
    *["the", "##ing", "play", "##s", ".", ",", "n't", "'", "do", "not", "[UNK]", "日", "##本"],
    *["e\u0301", "\u200d", "🙂", "##a", "a"],
]
SUFFIXED = ["th", "e</w>", "a", "a</w>", "</w>", "日</w>", "🙂", "e\u0301</w>", ",", ".</w>"]
SPOKEN = ["<pad>", "|", "h", "e", "l", "o", "日", "🙂", "h|", "n't", "."]
SPACED = ["▁", "▁▁", "▁a", "a", "▁the", "quick", "日本", "▁🙂", "\u200d", "e\u0301", ".", "\ufffd"]

replace, fallback, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS: dict[str, tuple[decoders.Decoder | None, list[str]]] = {
    "none": (None, WORDS),
    "byte level": (decoders.ByteLevel(), BYTE_LEVEL),
    "byte level in a sequence": (decoders.Sequence([decoders.ByteLevel(), fuse]), BYTE_LEVEL),
    "llama": (
        decoders.Sequence([replace, fallback, fuse, decoders.Strip(" ", 1, 0)]),
        FALLBACK,
    ),
    "gemma": (decoders.Sequence([replace, fallback, fuse]), FALLBACK),
    "byte fallback": (fallback, FALLBACK),
    "byte fallback, stripped": (
        decoders.Sequence([replace, fallback, fuse, decoders.Strip(" ", 2, 0)]),
        FALLBACK,
    ),
    "byte fallback, stripped on the right": (
        decoders.Sequence([replace, fallback, fuse, decoders.Strip(" ", 0, 1)]),
        FALLBACK,
    ),
    "byte fallback, metaspace": (
        decoders.Sequence([fallback, decoders.Metaspace()]),
        FALLBACK,
    ),
    "byte fallback, word pieces": (
        decoders.Sequence([fallback, decoders.WordPiece()]),
        FALLBACK,
    ),
    "byte fallback, ctc": (decoders.Sequence([fallback, decoders.CTC("A", "▁")]), FALLBACK),
    "metaspace": (decoders.Metaspace(), SPACED),
    "metaspace, never": (decoders.Metaspace(prepend_scheme="never"), SPACED),
    "metaspace, first": (decoders.Metaspace(prepend_scheme="first"), SPACED),
    "word pieces": (decoders.WordPiece(), WORDS),
    "word pieces, as they are": (decoders.WordPiece(cleanup=False), WORDS),
    "suffix": (decoders.BPEDecoder(), SUFFIXED),
    "ctc": (decoders.CTC(), SPOKEN),
    "ctc, as it is": (decoders.CTC(cleanup=False), SPOKEN),
    "replace": (replace, SPACED),
    "strip": (decoders.Strip("▁", 1, 0), SPACED),
    "strip on the right": (decoders.Strip("▁", 0, 1), SPACED),
    "fuse": (fuse, SPACED),
    "fused, then stripped": (decoders.Sequence([fuse, decoders.Strip("▁", 2, 0)]), SPACED),
}
HIGH = [0xC3, 0xA9]
"""é, where each of the first 256 tokens is a byte."""


def known(name: str) -> Decoder:
    """With all that may be known of it: is there a token for each byte?"""
    decoder, names = DECODERS[name]
    return Decoder(by_name(decoder, names), run=HIGH if names is FALLBACK else ())


def tokens_of(names: list[str]) -> st.SearchStrategy[list[int]]:
    """Any tokens, and among them whole characters, byte by byte, where the vocabulary has bytes."""
    one = st.integers(0, len(names) - 1).map(lambda token: [token])
    if len(names) >= 256:
        spelled = st.sampled_from(PIECES).map(lambda piece: list(piece.encode()))
        one = one | spelled | st.integers(256, len(names) - 1).map(lambda token: [token])
    return st.lists(one, max_size=30).map(lambda parts: [token for part in parts for token in part])


def streamed(decode: Callable[[list[int]], str], prompt: list[int], new: list[int]) -> list[str]:
    stream = Detokenizer(decode, prompt)
    return [*map(stream.push, new), stream.flush()]


def added(decode: Callable[[list[int]], str], prompt: list[int], new: list[int]) -> str:
    """What decoding both adds to decoding the prompt."""
    before, after = decode(prompt), decode([*prompt, *new])
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    return after[same:]


@pytest.mark.parametrize("name", DECODERS)
@given(st.data())
def test_streamed_is_decoded_at_once(name, data):
    """By every decoder, cut anywhere."""
    decode = known(name)
    tokens = data.draw(tokens_of(DECODERS[name][1]))
    assert "".join(streamed(decode, [], tokens)) == decode(tokens)
    cut = data.draw(st.integers(0, len(tokens)))
    prompt, new = tokens[:cut], tokens[cut:]
    assert "".join(streamed(decode, prompt, new)) == added(decode, prompt, new)


@pytest.mark.parametrize("name", ["byte level", "llama", "word pieces", "ctc", "metaspace"])
@given(st.data())
def test_nothing_is_held_back_without_need(name, data):
    decode, names = known(name), DECODERS[name][1]
    tokens = data.draw(tokens_of(names))
    stream, out = Detokenizer(decode), ""
    for size, token in enumerate(tokens, start=1):
        out += stream.push(token)
        text = decode(tokens[:size])
        if names is not FALLBACK or token >= 256:
            assert out.rstrip(REPLACEMENT) == text.rstrip(REPLACEMENT)
            assert len(text) - len(out) <= 3 * text.endswith(REPLACEMENT)


def counting(name: str) -> tuple[Decoder, Callable[[list[int]], str], list[int]]:
    """A decoder, the function that it calls, and how many tokens it has been called with."""
    decoder, names = DECODERS[name]
    plain, sizes = by_name(decoder, names), []

    def counted(tokens: list[int]) -> str:
        sizes.append(len(tokens))
        return plain(tokens)

    return Decoder(counted, run=HIGH if names is FALLBACK else ()), plain, sizes


@pytest.mark.parametrize("name", ["llama", "gemma", "byte level"])
@given(st.data())
def test_long_texts_are_decoded_in_pieces(name, data):
    """The same text, at a bounded price where characters end: a few tokens at once, and, where runs
    of byte tokens are decoded as a whole, one run and the one before it."""
    decode, plain, sizes = counting(name)
    names = DECODERS[name][1]
    spelled = st.sampled_from(PIECES).map(lambda piece: list(piece.encode()))
    whole = [n for n in range(256, len(names)) if REPLACEMENT not in plain([n])]
    letters = st.sampled_from(whole).map(lambda token: [token])
    parts = data.draw(st.lists(st.lists(spelled | letters, max_size=30), min_size=3, max_size=5))
    tokens = [token for part in parts for one in [*part, whole[-1:]] for token in one] * 5
    cut = data.draw(st.integers(0, len(tokens)))
    sizes.clear()
    found = "".join(streamed(decode, tokens[:cut], tokens[cut:]))
    runs = [len([*run]) for byte, run in itertools.groupby(tokens, lambda n: n < 256) if byte]
    assert max(sizes, default=0) <= 4 * CONTEXT + 2 * decode.joint * max(runs, default=0)
    assert found == added(plain, tokens[:cut], tokens[cut:])


@pytest.mark.parametrize("run", [1, 7, 8, 9, 40])
def test_runs_with_a_space_between(run):
    """Alone, a space is stripped, so a run has to stay beside it: one, not all of them."""
    decode, plain, sizes = counting("llama")
    tokens = [*HIGH * run, FALLBACK.index("▁")] * 50
    assert "".join(streamed(decode, [], tokens)) == plain(tokens)
    assert max(sizes) <= 4 * CONTEXT + 2 * 2 * run


@pytest.mark.parametrize("name", ["llama", "gemma", "byte level"])
@given(st.data())
def test_long_texts_of_any_bytes(name, data):
    """Also where no character ends, at whatever price."""
    decode, plain, _ = counting(name)
    names = DECODERS[name][1]
    parts = data.draw(st.lists(tokens_of(names), min_size=3, max_size=5))
    tokens = [token for part in parts for token in [*part, len(names) - 1]] * 5
    cut = data.draw(st.integers(0, len(tokens)))
    found = "".join(streamed(decode, tokens[:cut], tokens[cut:]))
    assert found == added(plain, tokens[:cut], tokens[cut:])


def test_a_prompt_is_cut_at_a_character_wherever_its_bytes_lie():
    """In this one, 16, 32, 64, 128, and 256 tokens before its end lie inside characters."""
    decode, _, sizes = counting("byte level")
    family, last = list("👨‍👩‍👧".encode()), [len(BYTE_LEVEL) - 1]
    tokens = [*last, 0xC3, 0xA9, *last, *family, *[0] * 18, *last, *[0] * 3, *family, *last] * 5
    assert len(decode.context(tokens[:273])) <= 2 * CONTEXT
    assert max(sizes) <= 2 * CONTEXT


@pytest.mark.parametrize("name", ["llama", "gemma", "byte fallback", "byte level"])
@given(st.data())
def test_what_is_not_known_is_learnt(name, data):
    """From a function alone, if letters are tokens of their own."""
    decoder, names = DECODERS[name]
    spelled = st.sampled_from([b"\xff", *(p.encode() for p in PIECES)]).map(list)
    letters = st.integers(256, len(names) - 1).map(lambda token: [token])
    parts = data.draw(st.lists(spelled.filter(lambda part: part[0] > 127) | letters, max_size=30))
    tokens = [token for part in parts for token in part]
    plain = by_name(decoder, names)
    assert "".join(streamed(plain, [], tokens)) == plain(tokens)


def test_emoji_of_byte_tokens_and_what_follows():
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    names = [f"<0x{byte:02X}>" if byte > 127 else chr(byte) for byte in "😀😃 ok".encode()]
    assert streamed(by_name(decoder, names), [], list(range(len(names)))) == [
        *[""] * 8, "😀😃 ", "o", "k", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, parts",
    [
        ("the\n\nquick", ["the", "", "", "\n\nquick"]),
        ("日é.", ["日", "", "", "é."]),
    ],
)
def test_a_run_of_byte_tokens_is_held_back_until_it_ends(text, parts):
    names = FALLBACK
    spelled = {"t": ["▁the"], "q": ["quick"], "日": ["日"], ".": ["."]}
    tokens = []
    for character in text.replace("the", "t").replace("quick", "q"):
        bytes_of = [f"<0x{byte:02X}>" for byte in character.encode()]
        tokens += [names.index(one) for one in spelled.get(character, bytes_of)]
    assert [*streamed(known("llama"), [], tokens)][:-1] == parts


@given(st.text(max_size=60))
def test_whole_characters_only(text):
    stream = Detokenizer(decode_bytes)
    parts = [stream.push(byte) for byte in text.encode()]
    assert all(text.startswith("".join(parts[: i + 1])) for i in range(len(parts)))
    assert "".join(parts) + stream.flush() == text


@given(st.binary(max_size=80), st.binary(max_size=12))
def test_broken_bytes_come_out_as_decoding_all_at_once_has_them(new, prompt):
    """Bytes that end the prompt in the middle of a character may join it."""
    stream = TextStream(decode_bytes)
    assert stream.push(new) + stream.flush() == decode_bytes(list(new))
    behind = TextStream(decode_bytes, prompt=prompt)
    assert behind.push(new) + behind.flush() == added(decode_bytes, list(prompt), list(new))


def test_half_a_character_is_held_back(tokenizer):
    text = "ok 日本 🚀!"
    ids = tokenizer(text)["input_ids"]
    stream = Detokenizer(lambda tokens: tokenizer.decode(tokens))
    parts = [stream.push(token) for token in ids]
    assert REPLACEMENT not in "".join(parts)
    assert "".join(parts) + stream.flush() == text


def test_an_unfinished_character_comes_out_at_the_end():
    stream = Detokenizer(decode_bytes)
    assert "".join(stream.push(byte) for byte in "a🚀".encode()[:-1]) == "a"
    assert stream.flush() == REPLACEMENT


@pytest.mark.parametrize("name", ["bytes", "byte level", "llama", "unknown"])
def test_endless_garbage_does_not_pile_up(name):
    sizes = []

    def decode(tokens):
        sizes.append(len(tokens))
        return decode_bytes(tokens) if name == "bytes" else known_decode(tokens)

    decoder, names = DECODERS["llama" if name == "unknown" else name if name != "bytes" else "none"]
    known_decode = by_name(decoder, names)
    run = {"bytes": None, "unknown": None, "byte level": (), "llama": HIGH}[name]
    stream = Detokenizer(Decoder(decode, run=run))
    text = "".join(stream.push(0x80) for _ in range(2000)) + stream.flush()
    assert text == REPLACEMENT * 2000
    assert sum(sizes) < 500_000 and (max(sizes[:-1]) <= MAX_WINDOW or name == "llama")


def test_words_are_decoded_a_few_at_a_time():
    sizes = []

    def decode(tokens):
        sizes.append(len(tokens))
        return by_name(*DECODERS["word pieces"])(tokens)

    tokens = [*range(len(WORDS))] * 50
    assert "".join(streamed(decode, [], tokens)) == by_name(*DECODERS["word pieces"])(tokens)
    assert max(sizes) <= 32


@pytest.mark.parametrize(
    "stop, parts, text, found",
    [
        (["END"], ["ab", "cE", "N", "D", "xx"], "abc", True),
        (["END"], ["ab", "cE", "N", "X"], "abcENX", False),
        (["END"], ["abEN"], "abEN", False),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        (["aab"], ["aaa", "b"], "a", True),
        (["xyz", "b"], ["axy", "b"], "axy", True),
        (["bc", "abcd"], ["abcd"], "", True),
        ([], ["any", "thing"], "anything", False),
    ],
)
def test_stop_strings(stop, parts, text, found):
    it = StopStrings(stop)
    out = "".join(it.push(part) for part in parts)
    assert out + it.flush() == text
    assert it.found is found


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_string_is_ever_sent(text, stop):
    it = StopStrings(stop)
    sent = ""
    for character in text:
        sent += it.push(character)
        assert not any(one in sent for one in stop)
    sent += it.flush()
    assert it.found == any(one in text for one in stop)
    assert text.startswith(sent) and (it.found or sent == text)


@pytest.mark.parametrize(
    "text, stop, shown, num_tokens",
    [
        ("ab😀ok", ["ok"], "ab😀", 8),
        ("ab😀ok", ["😀"], "ab", 7),
        ("ab😀ok", ["b😀o"], "a", 7),
        ("ab😀", ["😀"], "ab", 6),
        ("ab😀", ["😁"], "ab😀", 6),
    ],
)
def test_stop_strings_in_runs_of_byte_tokens(text, stop, shown, num_tokens):
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list("abok")
    decode = Decoder(by_name(decoders.Sequence([fallback, fuse]), names), run=HIGH)
    tokens = [
        token
        for one in text
        for token in ([names.index(one)] if one in names else list(one.encode()))
    ]
    stream = TextStream(decode, stop=stop)
    assert stream.push(tokens) + stream.flush() == shown
    assert stream.stopped is (stop != ["😁"]) and stream.num_tokens == num_tokens


def test_special_tokens_in_stop_strings():
    """They are found as the tokens that they name, which no text shows, and as text."""
    names = [*"abc|", "<end>", "<e>", "x<end>", "<", "end", ">"]
    hidden = {4: "<end>", 5: "<e>", 6: "x<end>"}
    decode = Decoder(
        lambda tokens: "".join(names[token] for token in tokens if token not in hidden),
        hidden=hidden,
    )
    for stop, tokens, shown, stopped in (
        (["<end>"], [0, 1, 4, 2], "ab", True),
        (["<e>"], [0, 4, 1, 5], "ab", True),
        (["b<end>c"], [0, 1, 4, 2, 2], "a", True),
        (["b<end>c"], [0, 1, 4, 0, 2], "abac", False),
        (["b<end>c"], [0, 1, 4], "ab", False),
        (["x<end>"], [0, 6, 1], "a", True),
        (["<e><end>"], [0, 5, 5, 4, 1], "a", True),
        (["<end>"], [0, 7, 8, 9, 1], "a", True),  # as the model spelled it out
        (["end"], [0, 4, 1], "ab", False),  # a part of a name is not what its token says
        (["ab"], [0, 4, 1], "", True),  # it reads like that
        (["<end>"], [3, 3], "||", False),
        (["zz"], [0, 4], "a", False),
    ):
        stream = TextStream(decode, stop=stop)
        assert (stream.push(tokens) + stream.flush(), stream.stopped) == (shown, stopped), stop


def test_a_special_token_ends_a_text_whose_last_character_is_not_certain():
    hidden = {256: "<end>"}
    decode = Decoder(lambda ids: decode_bytes([i for i in ids if i < 256]), hidden=hidden)
    for stop, shown in ((["<end>"], f"a{REPLACEMENT}"), ([f"{REPLACEMENT}<end>"], "a")):
        stream = TextStream(decode, stop=stop)
        assert stream.push([97, 0xC3, 256, 98]) == shown
        assert (stream.stopped, stream.num_tokens, stream.flush()) == (True, 3, "")


def test_min_tokens_hold_for_special_tokens_and_at_the_end():
    decode = Decoder(lambda ids: decode_bytes([i for i in ids if i < 256]), hidden={256: "<end>"})
    stream = TextStream(decode, stop=["<end>", REPLACEMENT], min_tokens=3)
    assert stream.push([97, 256, 0xC3]) + stream.flush() == f"a{REPLACEMENT}"
    assert not stream.stopped
    stream = TextStream(decode, stop=["<end>"], min_tokens=3)
    assert stream.push([97, 256, 98, 256, 99]) == "ab" and stream.stopped


def test_rounds_do_not_matter():
    text = list(b"one two STOP three")
    results = []
    for size in (1, 2, 5, 100):
        stream = TextStream(decode_bytes, stop=["STOP"])
        out = ""
        for start in range(0, len(text), size):
            out += stream.push(text[start : start + size])
        results.append((out + stream.flush(), stream.num_tokens, stream.stopped))
    assert set(results) == {("one two ", 12, True)}


def test_tokens_without_text_are_decoded_in_pieces():
    sizes = []

    def nothing(tokens: list[int]) -> str:
        sizes.append(len(tokens))
        return "".join("x" for token in tokens if token == 7)

    stream = TextStream(nothing, prompt=[1, 2])
    assert stream.push([0] * 1500) == "" and max(sizes) <= 2 * MAX_WINDOW
    assert stream.push([7]) == "x"
