"""What serving was measured to be: as tables, and against what it should be. Knows results; knows
neither servers nor models.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs.measure import Bar, Timing, show
from jobs.serving import FIRST_S, SHARED, Asked

RIVAL = "transformers serve"
"""Its name among the results."""
Results = dict[str, Any]


def bars(results: Results) -> list[Bar]:
    one, draft = results.get("one"), results.get("draft")
    prefix, killed, rate = results.get("prefix"), results.get("killed"), results.get("rate")
    if rate is not None and not rate["requests"]:
        rate = None  # no rate was low enough
    bars = [
        Bar(
            "one stream: time of a token, door / engine",
            one and one["ours"]["token"].median / one["engine"]["token"].median,
            1.15,
            least=False,
        ),
        Bar(
            "one stream: first token, door − engine, ms",
            one and 1e3 * (one["ours"]["first"].median - one["engine"]["first"].median),
            10,
            least=False,
        ),
        Bar(
            "link: round trip p50, ms",
            one and 1e3 * one["round_trip"]["unix"]["p50"],
            0.3,
            least=False,
        ),
        Bar(
            "one stream, drafts in a replica / plain, tokens/s",
            draft and draft["none"]["token"].median / draft["model"]["token"].median,
            1.8,
        ),
    ]
    for name, found in results.get("many", {"8 x 256": {}, "4 x 4096": {}}).items():
        mine, theirs = found.get("ours"), found.get(RIVAL)
        both = mine is not None and theirs is not None
        speed = theirs["token"].median / mine["token"].median if both else None
        pause = mine["between_p99"] / theirs["between_p99"] if both else None
        bars += [
            Bar(f"{name}: tokens/s, ours / {RIVAL}", speed, 2),
            Bar(f"{name}: between tokens p99, ours / {RIVAL}", pause, 1, least=False),
        ]
    return [
        *bars,
        Bar(
            "a prompt seen before: first token / the first time",
            prefix and prefix["seen"].median / prefix["new"].median,
            0.1,
            least=False,
        ),
        Bar("a shared prefix: tokens not read again", prefix and prefix["shared"], SHARED),
        Bar("a killed target: gap p99, s", killed and killed["gap_p99"], 2, least=False),
        Bar("a killed target: other texts", killed and killed["differing"], 0, least=False),
        Bar("highest rate: errors", rate and rate["errors"], 0, least=False),
        Bar("highest rate: first token p99, s", rate and rate["first_p99"], FIRST_S, least=False),
    ]


def show_one(found: Results, console: Console) -> None:
    rows = [
        [name, str(found[name]["token"]), str(found[name]["first"])] for name in ("engine", "ours")
    ]
    show("One stream, no drafts", ["", "time of a token (quartiles)", "first token"], rows, console)
    for kind, trip in found["round_trip"].items():
        p50, p99 = (f"{1e3 * trip[part]:.2f} ms" for part in ("p50", "p99"))
        console.print(f"round trip over the link, {kind}: p50 {p50}, p99 {p99}")


def show_draft(found: Results, console: Console) -> None:
    rows = [[name, str(times["token"]), str(times["first"])] for name, times in found.items()]
    title = "One stream, a draft in a replica of its own, one thread a side"
    show(title, ["drafts", "time of a token (quartiles)", "first token"], rows, console)


def show_many(load: str, found: Results, tokens: int, console: Console) -> None:
    rows = [
        [
            name,
            f"{_rate(one['token'])} ({1 / one['token'].high:,.1f}–{1 / one['token'].low:,.1f})",
            str(one["first"]),
            f"{1e3 * one['between_p50']:,.1f} ms",
            f"{1e3 * one['between_p99']:,.1f} ms",
        ]
        for name, one in found.items()
    ]
    columns = ["", "tokens/s (quartiles)", "first token", "between p50", "p99"]
    show(f"{load} tokens of prompt, {tokens} new ones", columns, rows, console)


def show_prefix(found: Results, console: Console) -> None:
    rows = [["the first time", str(found["new"])], ["the second time", str(found["seen"])]]
    show(f"First token of a prompt of {found['tokens']:,} tokens", ["", "time"], rows, console)
    console.print(f"a prefix of {SHARED} tokens, third prompt: {found['shared']} not read again")


def show_killed(found: Results, console: Console) -> None:
    console.print(
        f"{len(found['gaps'])} killed targets: longest pauses of {found['gap_p50']:.2f} s p50, "
        f"{found['gap_p99']:.2f} s p99; {found['differing']} texts other than in a calm run"
    )


def show_rate(found: Results, asked: Asked, console: Console) -> None:
    console.print(
        f"{found['requests']} requests of {asked.prompt} + {asked.tokens} tokens at "
        f"{found['rate']:.2f} a second: first token p99 {found['first_p99']:.2f} s, "
        f"{found['errors']} errors "
        f"{'; '.join(found['reasons'])}"
    )


def _rate(token: Timing) -> str:
    return f"{1 / token.median:,.1f}"
