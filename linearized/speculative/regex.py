"""Regular expressions as xgrammar reads them: those of ECMAScript, over the whole text, where
\\d, \\w and \\s stand for ASCII. What it would ignore is refused. Knows no tokens.
"""

from __future__ import annotations

import re

from linearized.errors import RequestError

MAX_REPEATS = 10_000
"""Of one part, counting the groups that it stands in: (a{100}){100} has that many."""

_PART = re.compile(
    r"""
    (?P<escape> \\. )
    | (?P<letters> \[ \^? (?: \\. | [^\]\\] )+ \] )
    | (?P<open> \( (?: \?: | \?P?<[A-Za-z_]\w*> | (?!\?) ) )
    | (?P<close> \) )
    | (?P<times> \{ [0-9]{1,8} (?: , [0-9]{0,8} )? \} )
    | (?P<anchor> [\^$] )
    | (?P<dot> \. )
    | (?P<sign> [*+?|] )
    | (?P<letter> [^\\\[(){] )
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:[dDwWsSfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^0-9A-Za-z])", re.DOTALL)
_KEPT = set("^$.*+?()[]{}|\\/-")
"""Signs that xgrammar knows escaped; others mean themselves."""


def portable(expression: str) -> str:
    """The same expression without anchors, which are implied, and where a dot is no end of line.

    Raises:
        RequestError: it has what cannot be enforced.
    """
    found: list[str] = []
    counts, last = [1], 1
    """How often a part of each open group is repeated, and the part that was read last."""
    at = 0
    while at < len(expression):
        part = _PART.match(expression, at)
        if part is None:
            raise _problem(expression, at)
        kind, text = part.lastgroup, part[0]
        if kind == "open":
            counts.append(1)
            text = "("
        elif kind == "close":
            if len(counts) == 1:
                raise _problem(expression, at)
            last = counts.pop()
        elif kind == "times":
            last *= max(1, *(int(number) for number in text[1:-1].split(",") if number))
        elif kind == "anchor":
            if len(counts) > 1 or not _is_edge(expression, at):
                raise _problem(expression, at)
            text = ""
        elif kind == "escape" or kind == "letters":
            text, last = _escaped(text, expression, at), 1
        elif kind != "sign":
            text, last = r"[^\n\r]" if kind == "dot" else text, 1
        counts[-1] = max(counts[-1], last)
        if last > MAX_REPEATS:
            raise RequestError(
                f"the expression repeats a part {last:,} times, {MAX_REPEATS:,} are allowed"
            )
        found.append(text)
        at = part.end()
    if len(counts) > 1:
        raise RequestError("the expression has a ( without a )")
    return "".join(found)


def _is_edge(expression: str, at: int) -> bool:
    """Does the anchor there stand where an alternative of the whole text begins, or ends?"""
    if expression[at] == "^":
        return at == 0 or expression[at - 1] == "|"
    return at + 1 == len(expression) or expression[at + 1] == "|"


def _escaped(text: str, expression: str, at: int) -> str:
    """With escapes that xgrammar knows."""

    def known(escape: re.Match[str]) -> str:
        letter = escape[0][1]
        if not _ESCAPE.match(expression, at + escape.start()):
            raise _problem(expression, at)
        return escape[0] if letter.isalnum() or letter in _KEPT else letter

    return re.sub(r"\\.", known, text, flags=re.DOTALL)


def _problem(expression: str, at: int) -> RequestError:
    return RequestError(
        f"the expression has {expression[at : at + 3]!r} at position {at + 1}, which guided "
        "decoding cannot enforce; write it without"
    )
