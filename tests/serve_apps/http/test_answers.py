"""How answers are written."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from serve_apps.http import answers

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@given(values, st.lists(scalars, min_size=answers.PIECE - 1, max_size=answers.PIECE + 1))
def test_what_is_written_in_pieces_is_json(value, many):
    for body in (value, {"a": value, "many": many * 3}, [many, value]):
        text = answers.written(body)
        assert json.loads(text) == body
        assert not set(text) & {"\u2028", "\u2029", "\u0085"}
        assert answers.event(body).count("\n") == 2
