"""What jobs.sweep leaves: a Parquet table of trials, a page of Markdown, a picture. Knows numbers;
knows no model and no cluster.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import measure
from jobs.grids import Grid

Found = Sequence[Mapping[str, Any]]
PARTS = ("far part off", "convolution off")
MEANS = {
    "after": ("perplexity", 3),
    "transferred": ("after transfer", 3),
    **{part: (part, 3) for part in PARTS},
    "at 1024": ("at 1,024 tokens", 3),
    "at 4096": ("at 4,096 tokens", 3),
    "state_bytes": ("bytes of state", 0),
    "parameters": ("parameters", 0),
    "seconds": ("seconds", 0),
}
"""What a table shows of a row besides its score: title and digits."""
NUMBERS = ("score", "ratio", "accuracy", "teacher", "before", "tokens", *MEANS)


def write(found: Found, grid: Grid, name: str, out: Path) -> None:
    pq.write_table(table(found), out / "sweep.parquet")
    (out / "sweep.md").write_text(markdown(found, grid, name), encoding="utf-8")
    draw(found, grid, name, out / "sweep.png")


def table(found: Found) -> pa.Table:
    """One row a trial: its settings, and what it found."""
    rows = []
    for one in found:
        trial = dict(one["trial"])
        settings = one.get("settings", trial.pop("settings"))
        rows.append({
            **trial,
            "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
            **{name.replace(" ", "_"): one.get(name) for name in NUMBERS},
            "losses": [loss for _, loss in one["losses"]],
        })  # fmt: skip
    return pa.Table.from_pylist(rows)


def markdown(found: Found, grid: Grid, title: str) -> str:
    """Rows in order of quality, the mean of their seeds with the spread, and the claims."""
    rows, scores = _by_row(found), _scores(found)
    seeds = sorted({one["trial"]["seed"] for one in found})
    lines = [
        f"# Sweep: {title}", "",
        f"{len(found)} trials of {found[0]['tokens']:,} tokens, {len(rows)} rows, seeds "
        f"{', '.join(map(str, seeds))}; commit {measure.commit()}.",
        f"{_explained(found, grid)}, ± the standard deviation over seeds.", "",
    ]  # fmt: skip
    columns = ["", "accuracy" if grid.accuracy else "× teacher"]
    known = [name for name in MEANS if any(one.get(name) is not None for one in found)]
    columns += [MEANS[name][0] for name in known]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in _best_first(scores, grid):
        means = [_mean(rows[name], column, MEANS[column][1]) for column in known]
        lines.append("| " + " | ".join([name, _spread(scores[name]), *means]) + " |")
    lines += ["", "## Claims, and what was found", ""]
    for claim in grid.claims:
        lines += [f"- **Claim.** {claim.text}", f"  **Found.** {claim.found(scores)}.", ""]
    lines.append("The models here are small and trained for minutes; what holds at 7B may differ.")
    return "\n".join(lines) + "\n"


def draw(found: Found, grid: Grid, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, scores = _by_row(found), _scores(found)
    order = _best_first(scores, grid)[::-1]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 2 + 0.28 * len(order)), layout="constrained"
    )
    for y, name in enumerate(order):
        left.barh(y, statistics.fmean(scores[name]), color="C0", alpha=0.6)
        left.plot(scores[name], [y] * len(scores[name]), "k.", markersize=4)
    left.set_yticks(range(len(order)), order, fontsize=8)
    what = "accuracy" if grid.accuracy else "perplexity over the teacher's"
    values = [value for ones in scores.values() for value in ones]
    left.set(title=f"{title}: {what}", xlim=(0.95 * min(values), None))
    for name in reversed(order):
        losses = rows[name][0]["losses"]
        right.plot([step for step, _ in losses], [loss for _, loss in losses], label=name)
    right.set(title="loss, first seed", xlabel="step", ylabel="nats")
    right.legend(fontsize=6, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _explained(found: Found, grid: Grid) -> str:
    if grid.accuracy:
        return "Accuracy is that of rows which were not trained on"
    teacher = statistics.fmean(one["teacher"] for one in found)
    return f"× is the perplexity over {teacher:.3f}, that of the softmax model before the sweep"


def _best_first(scores: Mapping[str, Sequence[float]], grid: Grid) -> list[str]:
    sign = -1 if grid.accuracy else 1
    return sorted(scores, key=lambda name: sign * statistics.fmean(scores[name]))


def _scores(found: Found) -> dict[str, list[float]]:
    return {name: [one["score"] for one in ones] for name, ones in _by_row(found).items()}


def _by_row(found: Found) -> dict[str, list[Mapping[str, Any]]]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        rows.setdefault(one["trial"]["name"], []).append(one)
    return rows


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def _mean(ones: Sequence[Mapping[str, Any]], name: str, digits: int = 3) -> str:
    known = [one[name] for one in ones if one.get(name) is not None]
    return f"{statistics.fmean(known):,.{digits}f}" if known else "–"
