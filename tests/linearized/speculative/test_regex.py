"""Expressions come out as xgrammar reads them, or are refused."""

from __future__ import annotations

import pytest

from linearized.errors import RequestError
from linearized.speculative.regex import MAX_REPEATS, portable


@pytest.mark.parametrize(
    "given,want",
    [
        ("", ""),
        ("^abc$", "abc"),
        ("^$|^a$", "|a"),
        ("a.c", r"a[^\n\r]c"),
        (r"a\.[.]c", r"a\.[.]c"),
        ("(?P<year>[0-9]{4})-(?<m>[0-9]{2})", "([0-9]{4})-([0-9]{2})"),
        ("(?:ab)+?", "(ab)+?"),
        (r"\ \&\#[\~\-]", r" &#[~\-]"),
        (r"\d\W\x41\u00e9\n", r"\d\W\x41\u00e9\n"),
        ("日本é", "日本é"),
        ("a{2,}b{0,3}", "a{2,}b{0,3}"),
        ("]}", "]}"),
    ],
)
def test_what_can_be_enforced(given, want):
    assert portable(given) == want


@pytest.mark.parametrize(
    "given,place",
    [
        ("(?=a)b", 1),
        ("a(?!b)", 2),
        ("(?<=a)b", 1),
        ("(?i)a", 1),
        (r"a\b", 2),
        (r"(a)\1", 4),
        (r"\p{L}", 1),
        ("a^b", 2),
        ("(a$)b", 3),
        ("a)b", 2),
        ("a[b", 2),
        ("a{b", 2),
        ("a{,3}", 2),
        ("[]", 1),
        ("\\", 1),
    ],
)
def test_what_cannot_is_named_with_its_place(given, place):
    with pytest.raises(RequestError, match=f"at position {place}, which guided decoding cannot"):
        portable(given)


def test_repetitions_are_bounded_through_groups():
    portable(f"(a{{{MAX_REPEATS // 10}}}b){{10}}")
    for given in (f"a{{{MAX_REPEATS + 1}}}", "((a{200}b){50}c){2}", "(a{99999999}){99999999}"):
        with pytest.raises(RequestError, match="are allowed"):
            portable(given)
