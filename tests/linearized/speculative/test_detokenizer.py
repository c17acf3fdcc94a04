"""Text comes in whole characters, without stop strings, however many tokens a round gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearized.speculative.detokenizer import (
    MAX_WINDOW,
    REPLACEMENT,
    Detokenizer,
    StopStrings,
    TextStream,
)


def decode_bytes(tokens: list[int]) -> str:
    """A tokenizer with a token a byte."""
    return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=60))
def test_whole_characters_only(text):
    stream = Detokenizer(decode_bytes)
    parts = [stream.push(byte) for byte in text.encode()]
    assert all(text.startswith("".join(parts[: i + 1])) for i in range(len(parts)))
    assert "".join(parts) + stream.flush() == text


@given(st.binary(max_size=80), st.binary(max_size=12))
def test_broken_bytes_come_out_as_decoding_all_at_once_has_them(new, prompt):
    """Bytes that end the prompt in the middle of a character may join it; then less comes out."""
    stream = TextStream(decode_bytes)
    assert stream.push(new) + stream.flush() == decode_bytes(list(new))
    behind = TextStream(decode_bytes, prompt=prompt)
    assert len(behind.push(new) + behind.flush()) <= len(decode_bytes(list(new)))


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


def test_endless_garbage_does_not_pile_up():
    sizes = []

    def decode(tokens):
        sizes.append(len(tokens))
        return decode_bytes(tokens)

    stream = Detokenizer(decode)
    text = "".join(stream.push(0x80) for _ in range(2000)) + stream.flush()
    assert text == REPLACEMENT * 2000
    assert max(sizes) < 1000


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
