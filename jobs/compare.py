"""Runs of training side by side: one table, and a picture of their curves.

    python -m jobs.compare --out comparison.png runs/mine/target runs/other/target

A run is the folder that training left, with run.json; what jobs.evaluate found of it is shown, too,
if its evaluation.json lies there (`out=runs/mine/target`)."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jobs import measure
from linearized.errors import ConfigError, DataError, LinearizedError

NUMBERS = ("accuracy", "perplexity", "divergence", "right", "seconds")
"""Of a score's numbers, those that are shown, each before the others."""


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders that hold run.json.")],
    out: Annotated[Path, typer.Option(help="The picture, PNG or SVG.")] = Path("comparison.png"),
) -> None:
    try:
        compare(runs, out, measure.console())
    except LinearizedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def compare(folders: Sequence[Path], out: Path, console: Console) -> list[dict[str, Any]]:
    """Print the table, draw the curves, and return what the table holds.

    Raises:
        ConfigError: the same run twice, or a picture of an unknown kind.
        DataError: a folder without a run, or one that cannot be read.
    """
    if out.suffix not in (".png", ".svg"):
        raise ConfigError(f"out={out} must end in .png or .svg")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("every run must be named once")
    done = {name: _read(folder) for name, folder in _names(folders).items()}
    found = [_summary(name, values) for name, values in done.items()]
    columns = list(dict.fromkeys(key for row in found for key in row))
    rows = [[_shown(row.get(column)) for column in columns] for row in found]
    measure.show("Runs", columns, rows, console)
    out.parent.mkdir(parents=True, exist_ok=True)
    _draw(done, out)
    console.print(f"picture: {out}")
    return found


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Short names, as long as they differ."""
    for parts in (1, 2, 3):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    return {str(folder): folder for folder in folders}


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "run.json" if folder.is_dir() else folder
    try:
        done = json.loads(file.read_text())
    except OSError:
        raise DataError(
            f"{folder} holds no run.json; name the folder that training wrote"
        ) from None
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); was it cut short?") from None
    if not isinstance(done, dict) or not isinstance(done.get("losses"), list):
        raise DataError(f"{file} is no run of training: it has no losses")
    return {**done, "scores": _scores(file.with_name("evaluation.json"))}


def _scores(file: Path) -> dict[str, float]:
    """What jobs.evaluate found of a model, the first number of each score."""
    try:
        found = json.loads(file.read_text())["scores"]
        cells = {name: cells["model"] for name, cells in found.items() if "model" in cells}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    firsts = {
        name: next((cell[number] for number in NUMBERS if number in cell), None)
        for name, cell in cells.items()
    }
    return {name: number for name, number in firsts.items() if number is not None}


def _summary(name: str, done: Mapping[str, Any]) -> dict[str, Any]:
    perplexity = done.get("perplexity") or {}
    teacher, after = perplexity.get("teacher"), perplexity.get("after")
    speeds = [point[4] for point in done["losses"] if len(point) > 4]
    return {
        "run": name,
        "parameters": done.get("parameters"),
        "tokens": done.get("tokens"),
        "seconds": done.get("seconds"),
        "tokens/s": round(statistics.median(speeds)) if speeds else None,
        "last loss": done["losses"][-1][2] if done["losses"] else None,
        **{f"perplexity: {part}": value for part, value in perplexity.items()},
        "× teacher": round(after / teacher, 4) if teacher and after else None,
        **done["scores"],
    }


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _draw(done: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Losses by step, a panel for each stage; learning rates and throughput below, where they were
    written down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = sorted({int(point[0]) for one in done.values() for point in one["losses"]}) or [0]
    figure, axes = pyplot.subplots(
        3, len(stages), figsize=(5.5 * len(stages), 9), layout="constrained", squeeze=False
    )
    names = ("loss", "learning rate", "tokens a second")
    for column, stage in enumerate(stages):
        for name, one in done.items():
            points = [point for point in one["losses"] if point[0] == stage]
            for row in range(3):
                known = [(point[1], point[2 + row]) for point in points if len(point) > 2 + row]
                if known:
                    axes[row, column].plot(*zip(*known, strict=True), label=name)
        for row in range(3):
            axis = axes[row, column]
            axis.set(title=f"{names[row]}, stage {stage}", xlabel="step")
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
