"""Every message survives the wire; no bytes do anything but make a message or a ProtocolError."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearized.speculative import Alternatives, Sampling, TokenTree
from serve_apps.generation import (
    GUIDES,
    SPECULATE,
    Delta,
    Description,
    Finished,
    Generation,
    Guide,
    Refused,
    Started,
)
from serve_apps.link import protocol
from serve_apps.link.protocol import (
    Challenge,
    Close,
    Commit,
    Draft,
    Error,
    GoAway,
    Heartbeat,
    Hello,
    Open,
    ProtocolError,
    Welcome,
    decode,
    encode,
)
from serve_apps.link.texts import (
    PART,
    WINDOW,
    Cancel,
    Failed,
    More,
    PromptPart,
    Said,
    Status,
    Submit,
    said,
)

count = st.integers(0, 2**53)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40).map(tuple)
depth = st.integers(1, protocol.MAX_DEPTH)
nonce = st.binary(max_size=64)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 5),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=5),
    min_tokens=st.integers(0, 1000),
    stop_ids=st.frozensets(st.integers(0, 2**31 - 1), max_size=5),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 100),
)


@st.composite
def trees(draw) -> TokenTree:
    ids = draw(tokens)
    parents = tuple(draw(st.integers(-1, i - 1)) for i in range(len(ids)))
    if not draw(st.booleans()):
        return TokenTree(ids, parents)
    scores: list[float] = []
    for parent in parents:
        scores.append(draw(st.floats(0, scores[parent] if parent >= 0 else 1)))
    return TokenTree(ids, parents, tuple(scores))


few = st.integers(0, 9)
words = st.text(max_size=20)
alternatives = st.builds(
    Alternatives,
    st.floats(-99, 0),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-99, 0)), max_size=4).map(tuple),
)
prompts = st.lists(st.none() | alternatives, max_size=4).map(tuple)
jobs = st.builds(
    Generation,
    prompt=tokens,
    text=tokens,
    max_tokens=count,
    sampling=samplings,
    stop=st.lists(words, max_size=4).map(tuple),
    logprobs=st.none() | few,
    prompt_logprobs=st.none() | few,
    guide=st.none() | st.builds(Guide, kind=st.sampled_from(GUIDES), source=words),
    speculate=st.none() | st.sampled_from(SPECULATE),
    owner=words,
)
levels = st.lists(few, max_size=4).map(tuple)
events = st.one_of(
    st.builds(Started, cached_tokens=count, prompt_logprobs=prompts),
    st.builds(
        Delta,
        text=words,
        tokens=tokens,
        accepted=few,
        logprobs=st.lists(alternatives, max_size=3).map(tuple),
    ),
    st.builds(
        Finished,
        reason=st.sampled_from(["stop", "length", "error"]),
        drafted=levels,
        accepted=levels,
        rounds=count,
        error=words,
    ),
    st.builds(
        Refused,
        status=st.integers(400, 599),
        message=words,
        code=words,
        param=st.none() | words,
        retry_after=st.none() | few,
    ),
)
descriptions = st.builds(
    Description,
    fingerprint=words,
    vocab_size=count,
    max_context=count,
    draft=st.sampled_from(["none", "connected", "away"]),
    texts=count,
    room=count,
)
messages = st.one_of(
    st.builds(Challenge, count, nonce),
    st.builds(Hello, count, nonce, nonce),
    st.builds(Welcome, nonce),
    st.builds(Open, count, count, tokens, count, samplings, depth),
    st.builds(Commit, count, count, count, tokens, depth),
    st.builds(Draft, count, count, count, trees()),
    st.builds(Close, count),
    st.just(Heartbeat()),
    st.just(GoAway()),
    st.builds(Error, count, count, st.text(max_size=50), st.text(max_size=50)),
    st.builds(Submit, count, jobs),
    st.builds(Cancel, count),
    st.builds(More, count, st.integers(1, WINDOW)),
    st.builds(Said, count, events),
    st.builds(PromptPart, count, prompts),
    st.builds(Failed, count, st.text(max_size=50)),
    st.builds(Status, descriptions),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(messages)
def test_round_trip(message):
    frame = encode(message)
    size = protocol.frame_size(frame[: protocol.HEADER])
    assert size == len(frame) - protocol.HEADER
    assert decode(frame[protocol.HEADER :]) == [message]


@given(st.lists(messages, max_size=5))
def test_messages_share_a_frame(many):
    assert decode(encode(*many)[protocol.HEADER :]) == many


@given(st.binary(max_size=200))
def test_any_bytes(payload):
    with contextlib.suppress(ProtocolError):
        decode(payload)


@given(st.integers(0, 20), st.lists(plain, max_size=6))
def test_any_fields(number, fields):
    try:
        found = decode(msgpack.packb([[number, *fields]]))
    except ProtocolError:
        return
    assert decode(encode(*found)[protocol.HEADER :]) == found


@given(messages, st.data())
def test_cut_or_changed_frames(message, data):
    payload = bytearray(encode(message)[protocol.HEADER :])
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    for broken in (bytes(payload), bytes(payload[:at])):
        with contextlib.suppress(ProtocolError):
            decode(broken)


def greedy(temperature: float) -> list:
    """A Sampling on the wire."""
    return [temperature, 0, 1.0, 0.0, 1.0, 0.0, 0.0, [], 0, [], 0, 0, 0.0]


@pytest.mark.parametrize(
    "values, says",
    [
        ([6, 1, 1, 1, [[5, 6], [0, 0], []]], "earlier node"),  # its own parent
        ([6, 1, 1, 1, [[5], [-1, 0], []]], "one parent a token"),
        ([6, 1, 1, 1, [[5] * 300, [-1] * 300, []]], "at most 256"),
        ([6, 1, 1, 1, [[-5], [-1], []]], "integer between"),
        ([6, 1, True, 1, [[5], [-1], []]], "integer between"),
        ([6, 1, 1, 1, [[5], [-1], [0.5, 0.5]]], "one score a token"),
        ([6, 1, 1, 1, [[5, 6], [-1, 0], [0.5, 0.6]]], "at most as probable"),
        ([6, 1, 1, 1, [[5], [-1], [float("nan")]]], "at most as probable"),
        ([6, 1, 1, 1, [[5], [-1], ["1"]]], "expected a number"),
        ([6, 1, 1, 1, [[5], [-1]]], "their scores"),
        ([4, 1, 1, [5], 1, greedy(-1.0), 2], "temperature"),
        ([4, 1, 1, [5], 1, greedy(float("nan")), 2], "temperature"),
        ([4, 1, 1, [5], 1, greedy(0.0)[:5], 2], "13 values"),
        ([4, 1, 1, [5], 1, [*greedy(0.0)[:7], [[5]], *greedy(0.0)[8:]], 2], "pairs"),
        ([4, 1, 1, [5], 1, greedy(0.0), 0], "integer between 1 and 64"),
        ([5, 1, 1, 1, [5], 65], "integer between 1 and 64"),
        ([5, 1, 1, -1, [5], 2], "integer between"),
        ([5, 1, 1, 1], "5 fields"),
        ([77], "unknown message"),
        ([], "begins with its number"),
        ({"a": 1}, "begins with its number"),
        ([13, 1, 33], "integer between"),  # more events than a window has
        ([14, 1, [9, []]], "integer between"),  # no such event
        ([14, 1, [1, ["a", [-1], 0, [], [[], [], []]]]], "token ids"),
        ([14, 1, [1, ["a", [True], 0, [], [[], [], []]]]], "token ids"),
        ([14, 1, [1, ["a", [5], 0, [], [[5], [0], []]]]], "earlier node"),
        ([14, 1, [2, ["done", [], [], 1, ""]]], "expected one of"),
        ([11, 1, []], "3 fields"),
        ([11, 1, [], False], "12 values"),
    ],
)
def test_refused(values, says):
    with pytest.raises(ProtocolError, match=says):
        decode(msgpack.packb([values]))


def test_a_frame_is_an_array():
    with pytest.raises(ProtocolError, match="array of messages"):
        decode(msgpack.packb({"a": 1}))


def test_a_long_prompts_log_probabilities_come_in_parts():
    whole = (None, *[Alternatives(-1.0, ((3, -1.0),))] * (2 * PART))
    *parts, last = said(7, Started(cached_tokens=4, prompt_logprobs=whole))
    assert sum((part.logprobs for part in parts), ()) == whole
    assert last == Said(7, Started(cached_tokens=4))
    assert decode(encode(*parts)[protocol.HEADER :]) == parts


def test_frames_are_bounded():
    with pytest.raises(ProtocolError, match="at most"):
        encode(Commit(1, 1, 0, tuple([2**31 - 1] * 2_000_000), 2))
    for header in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(ProtocolError, match="allowed"):
            protocol.frame_size(header)


def test_the_secret_is_not_shown():
    endpoint = protocol.Endpoint(host="h", port=1, secret=b"hidden", fingerprint="f", vocab_size=3)
    assert "hidden" not in f"{endpoint!r} {endpoint}"
