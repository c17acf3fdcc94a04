"""Model cards: the README.md of a folder that training leaves, in the form that the Hugging Face
hub reads. Knows runs and their results as data; knows no model."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobs import measure

if TYPE_CHECKING:
    from jobs.run import Run

FILE = "README.md"
MADE = "<!-- written by linearized -->"
"""Cards without this line are somebody else's and stay as they are."""
SCORES = "## Scores"
LIBRARIES = ("torch", "transformers", "deepspeed", "ray")


def write(folder: Path, run: Run, done: Mapping[str, Any]) -> None:
    """Put the card of a run into its folder. `done` is what run.json holds: perplexities (those of
    `ablation.parts` stand under the names of the parts), losses, parameters, tokens, seconds."""
    (folder / FILE).write_text(card(run, done), encoding="utf-8")


def add_scores(folder: Path, result: Mapping[str, Any]) -> None:
    """Put what jobs.evaluate found into the card of its model's folder, in the place of earlier
    scores. A card that training did not write is left alone, and so is a model of the hub."""
    from jobs.evaluation_report import markdown

    file = folder / FILE
    if not folder.is_dir():
        return
    text = file.read_text(encoding="utf-8") if file.exists() else f"# {folder.name}\n\n{MADE}\n"
    if MADE not in text:
        return
    kept = text.partition(SCORES)[0].rstrip()
    beside = f" beside {result['teacher']}" if result["teacher"] else ""
    said = (
        f"`python -m jobs.evaluate`{beside}, {result['date'][:10]}, commit {result['commit']}, "
        f"{result['machine']['device']}. Numbers in brackets are over the teacher's, or points "
        "above it."
    )
    file.write_text(f"{kept}\n\n{SCORES}\n\n{said}\n\n{markdown(result)}", encoding="utf-8")


def card(run: Run, done: Mapping[str, Any]) -> str:
    """The card's text."""
    parts = [_front(run), f"# {run.out.name}", MADE, _what(run), _quality(done), _recipe(run, done)]
    parts += [_data(run, done), _losses(run, done), _made_with(done)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(run: Run) -> str:
    """What the hub reads."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linearized", *([run.linear.attention] if run.linear is not None else [])],
    }
    if run.teacher is not None:
        values["base_model"] = run.teacher.name
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _what(run: Run) -> str:
    if run.linear is None:
        return "Trained with `linearized`."
    settings = ", ".join(
        f"{name} {value}" for name, value in asdict(run.linear).items()
        if value is not None and name in _shown(run.linear.attention)
    )  # fmt: skip
    base = "a softmax model" if run.teacher is None else f"`{run.teacher.name}`"
    return (
        f"{base} with linear attention in place of softmax: `{run.linear.attention}` ({settings}). "
        "`import linearized` before `transformers` opens the folder."
    )


def _shown(attention: str) -> tuple[str, ...]:
    near = ("group", "window", "sinks", "bound") if attention in ("grouped", "hedgehog", "local") \
        else ("group",) if attention == "global" else ("features",)  # fmt: skip
    return (*near, "augment", "taps", "layers")


def _quality(done: Mapping[str, Any]) -> str:
    """Held-out perplexities, over the teacher's where there is one."""
    perplexity: Mapping[str, float] = done.get("perplexity") or {}
    if not perplexity:
        return ""
    names = {"before": "before training", "after": "after training"}
    teacher = perplexity.get("teacher")
    lines = ["## Quality", "", "| held-out perplexity | | × teacher |", "|---|---|---|"]
    for name, value in perplexity.items():
        ratio = "" if teacher is None else f"{value / teacher:.4f}"
        lines.append(f"| {names.get(name, name)} | {value:.4f} | {ratio} |")
    return "\n".join(lines)


def _recipe(run: Run, done: Mapping[str, Any]) -> str:
    size, tokens, seconds = (done.get(name, 0) for name in ("parameters", "tokens", "seconds"))
    said = (
        f"Run `{run.name}`, seed {run.seed}: {size:,} parameters, {tokens:,} tokens in "
        f"{seconds:,} seconds, {run.workers.count} workers, ZeRO {run.workers.zero}."
    )
    lines = ["## Recipe", "", said, ""]
    lines += ["| stage | steps | batch | settings |", "|---|---|---|---|"]
    for stage in run.stages:
        settings = {**asdict(stage), **asdict(stage.optim)}
        left_out = ("objective", "steps", "batch", "optim", "checkpoint_every")
        said = ", ".join(
            f"{name} {value}" for name, value in settings.items()
            if name not in left_out and value is not None and value is not False
        )  # fmt: skip
        lines.append(f"| {stage.objective} | {stage.steps} | {stage.batch} | {said} |")
    return "\n".join(lines)


def _data(run: Run, done: Mapping[str, Any]) -> str:
    """What the blocks were made of. Where they lie is this machine's own affair."""
    try:
        made = json.loads((run.data / "data.json").read_text())
    except (OSError, ValueError):
        return ""
    lines = ["## Data", ""]
    for name, value in made.items():
        if isinstance(value, Mapping) and name != "seconds":
            counts = [f"{count:,} {what}" for what, count in value.items() if _is_number(count)]
            lines.append(f"- {name}: {', '.join(counts)}")
        elif name == "source":
            lines.append(f"- {name}: {Path(str(value)).name}")
        elif _is_number(value) or isinstance(value, str):
            lines.append(f"- {name}: {value}")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _losses(run: Run, done: Mapping[str, Any]) -> str:
    points: list[list[float]] = done.get("losses") or []
    lines = ["## Losses", "", "| stage | first | last |", "|---|---|---|"]
    for index, stage in enumerate(run.stages):
        mine = [point[2] for point in points if point[0] == index]
        if mine:
            lines.append(f"| {stage.objective} | {mine[0]} | {mine[-1]} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _made_with(done: Mapping[str, Any]) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    return f"Commit {measure.commit()}; {', '.join(versions)}."
