"""What jobs.evaluate says: one table, one picture. Knows numbers; knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.contestants import TEACHER
from linearized.evaluation.questions import difference

Scores = Mapping[str, Mapping[str, Any]]
"""By their names and the names of contestants."""


def show(result: Mapping[str, Any], console: Console) -> None:
    names = _names(result["scores"])
    table = Table(title=f"{result['model']}" + _beside(result), title_justify="left")
    for name in ("", *names):
        table.add_column(name, justify="left" if not name else "right")
    for label, *cells in rows(result["scores"]):
        table.add_row(label, *cells)
    console.print(table)
    for name, facts in result["models"].items():
        if "linear" in facts:
            console.print(
                f"{name}: {facts['parameters']:,} parameters, {_attention(facts['linear'])}, "
                f"{facts['state_bytes']:,} bytes of state before the first token"
            )


def markdown(result: Mapping[str, Any]) -> str:
    """The same table, for a model card."""
    names = _names(result["scores"])
    lines = ["| " + " | ".join(["", *names]) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(result["scores"])]
    return "\n".join(lines) + "\n"


def rows(scores: Scores) -> list[list[str]]:
    """The label of each score and its cells, one a contestant."""
    names = _names(scores)
    found = []
    for label, cells in scores.items():
        if label.startswith("by position"):
            ranges = next(iter(cells.values()))["ranges"]
            longest = max((one["ranges"] for one in cells.values()), key=len, default=ranges)
            for part in longest:
                numbers = {name: _of_range(one, part) for name, one in cells.items()}
                found.append(_row(f"{label}, {part}", names, numbers))
        elif label.startswith("harness"):
            for task, values in _harness(cells).items():
                found.append(_row(task, names, values))
        else:
            found.append(_row(label, names, cells))
    return found


def _names(scores: Scores) -> list[str]:
    return list(dict.fromkeys(name for cells in scores.values() for name in cells))


def _row(label: str, names: list[str], cells: Mapping[str, Any]) -> list[str]:
    teacher = cells.get(TEACHER)
    shown = []
    for name in names:
        numbers = cells.get(name)
        beside = None if name == TEACHER else teacher
        shown.append("–" if numbers is None else _cell(numbers, beside))
    return [label, *shown]


def _cell(numbers: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    """A number, beside the teacher's."""
    if "divergence" in numbers:
        return f"{numbers['divergence']:.4f} nats, {numbers['top1']:.1%} same"
    if "accuracy" in numbers:
        text = f"{numbers['accuracy']:.1%} ± {numbers['error']:.1%}"
        if teacher is None:
            return text
        gap, error = difference(_bits(numbers["right"]), _bits(teacher["right"]))
        return f"{text} ({100 * gap:+.1f} ± {100 * error:.1f})"
    if "right" in numbers:
        return f"{numbers['right']:.0%}, {numbers['nats']:.2f} nats"
    if "seconds" in numbers:
        return f"{1e3 * numbers['seconds']:.1f} ms, {numbers['bytes'] / 1e6:.1f} MB"
    if "perplexity" not in numbers:
        return f"{numbers['value']:.4g}"
    text = f"{numbers['perplexity']:.3f}"
    if teacher is not None:
        text += f" ({numbers['perplexity'] / teacher['perplexity']:.3f} ×)"
    if "bits_per_byte" in numbers:
        text += f", {numbers['bits_per_byte']:.3f} b/B"
    return text


def _of_range(numbers: Mapping[str, Any], part: str) -> dict[str, float] | None:
    value = numbers["ranges"].get(part)
    return None if value is None else {"perplexity": value}


def _harness(cells: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By task and metric, without the standard errors."""
    found: dict[str, dict[str, Any]] = {}
    for name, numbers in cells.items():
        for task, values in numbers["tasks"].items():
            for metric, value in values.items():
                if "," in metric and "stderr" not in metric:
                    label = f"{task}, {metric.partition(',')[0]}"
                    found.setdefault(label, {})[name] = {"value": value}
    return found


def _bits(text: str) -> list[bool]:
    return [one == "1" for one in text]


def _beside(result: Mapping[str, Any]) -> str:
    teacher = result["teacher"]
    how = ", products in bfloat16" if result["autocast"] else ""
    return (f" beside {teacher}" if teacher else "") + how


def _attention(linear: Mapping[str, Any]) -> str:
    kept = "" if linear.get("layers") is None else f" in layers {list(linear['layers'])}"
    near = f", window {linear['window']}, {linear['sinks']} sinks" if linear.get("window") else ""
    return f"{linear['attention']}{kept}, groups of {linear['group']}{near}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores: Scores = result["scores"]
    figure, axes = pyplot.subplots(2, 3, figsize=(17, 8), layout="constrained")
    quality, positions, tasks, answers, speed, weights = axes.flat
    _bars(quality, _ratios(scores))
    quality.set(title="Perplexity" + (" over the teacher's" if _has_teacher(scores) else ""))
    _lines(positions, _by_position(scores))
    positions.set(title="Perplexity by position", xlabel="position")
    _bars(tasks, _accuracies(scores))
    tasks.set(title="Right answers")
    _lines(answers, _by_length(scores, "right"))
    answers.set(title="Pass keys and pairs that are found", xlabel="tokens", ylim=(-0.03, 1.03))
    _lines(speed, _by_length(scores, "seconds"))
    speed.set(title="Seconds of a decoding step", xlabel="tokens before it")
    speed.set_ylim(bottom=0)
    for name, facts in result["models"].items():
        _weights(weights, name, facts.get("weights") or {})
    weights.set(title="Weight of the far part and of the taps", xlabel="layer")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _has_teacher(scores: Scores) -> bool:
    return TEACHER in _names(scores)


def _ratios(scores: Scores) -> dict[str, dict[str, float]]:
    """By text and contestant: over the teacher's, if there is one."""
    found: dict[str, dict[str, float]] = {}
    for label, cells in scores.items():
        if label.startswith("perplexity"):
            text = label.partition(": ")[2]
            base = cells[TEACHER]["perplexity"] if TEACHER in cells else 1.0
            found[text] = {name: one["perplexity"] / base for name, one in cells.items()}
    return found


def _accuracies(scores: Scores) -> dict[str, dict[str, float]]:
    found = {
        label.partition(": ")[2]: {name: one["accuracy"] for name, one in cells.items()}
        for label, cells in scores.items()
        if label.startswith("task")
    }
    for label, cells in scores.items():
        if label.startswith("harness"):
            for task, values in _harness(cells).items():
                if task.endswith(", acc"):
                    found[task] = {name: one["value"] for name, one in values.items()}
    return found


def _bars(axis: Any, groups: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        heights = [values.get(name, math.nan) for values in groups.values()]
        bars = axis.bar([x + index * width for x in range(len(groups))], heights, width, label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=6)
    axis.set_xticks(
        [x + width * (len(names) - 1) / 2 for x in range(len(groups))], list(groups), fontsize=7
    )


def _weights(axis: Any, name: str, layers: Mapping[Any, Mapping[str, float]]) -> None:
    for part, style in (("far", "o-"), ("taps", "s:")):
        points = [(int(layer), one[part]) for layer, one in layers.items() if part in one]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=f"{name}: {part}", markersize=3)


def _lines(axis: Any, lines: Mapping[str, list[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set_xscale("log", base=2)


def _by_position(scores: Scores) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for label, cells in scores.items():
        if label.startswith("by position"):
            for name, numbers in cells.items():
                points = [(int(part.split("–")[1]), x) for part, x in numbers["ranges"].items()]
                if points:
                    found[f"{label.partition(': ')[2]}, {name}"] = points
    return found


def _by_length(scores: Scores, what: str) -> dict[str, list[tuple[int, float]]]:
    """Of scores that are taken at lengths."""
    found: dict[str, list[tuple[int, float]]] = {}
    for label, cells in scores.items():
        kind, at, length = label.rpartition(" at ")
        if at and length.isdigit():
            for name, numbers in cells.items():
                if what in numbers:
                    found.setdefault(f"{kind}, {name}", []).append((int(length), numbers[what]))
    return found
