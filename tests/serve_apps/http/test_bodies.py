"""Bodies: what is JSON, what is too much, and that nothing costly is done with what is too much."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.http import bodies
from serve_apps.http.errors import ApiError


def refusal(body, **options) -> ApiError:
    with pytest.raises(ApiError) as caught:
        bodies.parse(body, **options)
    return caught.value


NOT_OBJECTS = [b"", b"{", b"\xff", b"[1]", b'"x"', b"[" * 100_000, b"NaN", b"1" * 10_000]
NOT_TEXT = [b'{"prompt": "\\ud800"}', b'{"\\udc00": 1}', b'{"a": "\xed\xa0\x80"}']


@pytest.mark.parametrize("body", [*NOT_OBJECTS, *NOT_TEXT])
def test_not_even_an_object(body):
    error = refusal(body)
    assert error.status == 400 and error.param is None


def test_odd_texts_are_texts():
    odd = "\0 \ufeff \u2028 \U0001f600"
    assert bodies.parse(json.dumps({"a": odd, "b": None}).encode()) == {"a": odd}
    assert bodies.parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


HOSTILE = {
    "texts": b'{"prompt": [' + b",".join([b'"a"'] * 300_000) + b"]}",
    "numbers": b'{"prompt": [' + b",".join([b"1"] * 300_000) + b"]}",
    "lists": b'{"prompt": [' + b",".join([b"[]"] * 300_000) + b"]}",
    "names": b"{" + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}",
    "escapes": b'{"prompt": "' + rb"\u0041" * 600_000 + b'"}',
    "NUL": b'{"prompt": "' + rb"\u0000" * 600_000 + b'"}',
    "depth": b'{"prompt": ' + b"[" * 300_000 + b"]" * 300_000 + b"}",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_too_many_values_are_not_even_parsed(body, monkeypatch):
    """vllm#49239: a body of wrong elements holds up everybody else."""
    monkeypatch.setattr(bodies, "from_json", lambda *args, **options: pytest.fail("parsed"))
    assert refusal(body).code == "too_many_values"


def test_marks_in_texts_are_no_values():
    for text in (",[{" * 200_000, '",' * 200_000, "\\" * 100_001, '\\"' * 100_001):
        body = json.dumps({"prompt": text, "more": [1, 2]}).encode()
        assert bodies.parse(body, max_values=6)["prompt"] == text
    assert refusal(b'{"a": ",,,,,,,,", "b": [1,2]}', max_values=4).code == "too_many_values"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=',[{"\\a', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@given(json_values)
def test_values_are_counted(value):
    def size(one):
        inner = list(one.values()) if isinstance(one, dict) else one
        if not isinstance(inner, list):
            return 0, 0
        marks, containers = zip((max(len(inner), 1), 1), *map(size, inner), strict=True)
        return sum(marks), sum(containers)

    text = json.dumps(value, ensure_ascii=False)
    marks, containers = size(value)
    assert bodies._count(text.encode(), 10_000) == (1 + marks, containers)
