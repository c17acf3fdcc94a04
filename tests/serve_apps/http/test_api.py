"""Requests: what is taken, what is refused, and by which name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearized.speculative import Sampling
from serve_apps.http import api
from serve_apps.http.api import ApiError, parse

OK = {"model": "m", "prompt": "hello"}


def request(**values):
    return parse(json.dumps({**OK, **values}).encode())


def refusal(body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


def test_defaults_are_openais():
    asked = request()
    assert (asked.max_tokens, asked.temperature, asked.top_p) == (16, 1.0, 1.0)
    (job,) = asked.generations(seed=7)
    assert job.sampling == Sampling(temperature=1.0, seed=7)
    assert (job.prompt, job.stop, job.speculate) == ("hello", (), None)


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_prompts(prompt, prompts):
    assert request(prompt=prompt).prompts == prompts


def test_each_prompt_has_a_choice_number_of_its_own():
    jobs = request(prompt=["a", "a", "b"]).generations(seed=7)
    assert [job.sampling for job in jobs] == [
        Sampling(temperature=1.0, seed=7, choice=i) for i in range(3)
    ]


def test_stop_tokens():
    (job,) = request(stop_token_ids=[5, 0, 5]).generations(seed=7)
    assert job.sampling.stop_ids == {0, 5}
    assert request(stop_token_ids=None) == request(stop_token_ids=[]) == request()
    for wrong in (5, ["a"], [1.5], [True], [-1], [[1]], list(range(129)), "5", {"5": 1}):
        error = refusal({**OK, "stop_token_ids": wrong})
        assert (error.status, error.param) == (400, "stop_token_ids")
        assert error.message.startswith("stop_token_ids must be a list of at most 128 token ids")


def test_null_asks_for_the_default():
    asked = request(temperature=None, stop=None, seed=None, logprobs=None, stream_options=None)
    assert asked == request()


def test_values_that_ask_for_nothing_pass():
    neutral = {"n": 1, "best_of": 1, "logit_bias": {}, "suffix": "", "presence_penalty": 0.0}
    assert request(**neutral, user="me") == request(user="me")


@pytest.mark.parametrize(
    "values, param, code",
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"frequency_penalty": -1}, "frequency_penalty", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"colour": 1}, "colour", "unknown_parameter"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": "16"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"top_k": 2**80}, "top_k", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stop": ["a"] * 5}, "stop", None),
        ({"stop": ""}, "stop", None),
        ({"stop": [1]}, "stop", None),
        ({"speculate": "yes"}, "speculate", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"prompt": 5}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": [[]]}, "prompt", None),
        ({"prompt": ["a", 1]}, "prompt", None),
        ({"prompt": [-1]}, "prompt", None),
        ({"prompt": None}, "prompt", "missing_parameter"),
        ({"prompt": ["a"] * 100}, "prompt", None),
        ({"model": None}, "model", "missing_parameter"),
    ],
)
def test_refused_by_name(values, param, code):
    error = refusal({**OK, **values})
    assert error.status == 400
    assert error.param == param
    assert param.split(".")[0] in error.message
    assert code is None or error.code == code
    body = error.body()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"


NOT_OBJECTS = [b"", b"{", b"\xff", b"[1]", b'"x"', b"[" * 100_000, b"NaN", b"1" * 10_000]


@pytest.mark.parametrize("body", [*NOT_OBJECTS, b'{"model": "m", "prompt": "\\ud800"}'])
def test_not_even_an_object(body):
    error = refusal(body)
    assert error.status == 400 and error.param is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
names = st.sampled_from([*api.CompletionRequest.model_fields, *api.UNSUPPORTED, "other"])


@given(st.dictionaries(names, json_values, max_size=4))
def test_any_values_make_a_request_or_an_error(values):
    try:
        asked = parse(json.dumps({**OK, **values}).encode())
    except ApiError as error:
        assert error.status == 400 and error.message
    else:
        assert asked.generations(0)
