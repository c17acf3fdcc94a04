"""Measure a served model over HTTP and write a report of this and of its training."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.progress import Progress
from jobs import cli
from linearized.errors import ConfigError, DataError

GREEDY = {"temperature": 0}
CHANCE: Mapping[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 0}
SAMPLE_TOKENS = 60


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    run: Path = Path("runs/demo")
    """Folder that holds data, teacher, target and draft, as the earlier jobs wrote them."""
    model: Path | None = None
    """Folder of the softmax model. null means `teacher` in `run`."""
    url: str = "http://127.0.0.1:8000"
    """Address of the app."""
    prompts: int = 6
    """Number of held-out texts to go on with."""
    samples: int = 2
    """Number of them that softmax model and linearized model go on with side by side."""
    prompt_tokens: int = 96
    new_tokens: int = 160
    seconds: str = "{}"
    """JSON object with the seconds of each earlier stage; the report shows them."""

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.samples < 0:
            raise ConfigError(f"samples must be at least 0, got {self.samples}")


def demo() -> ReportConfig:
    """Six prompts of held-out code, decoded greedily, plainly and speculatively in turn."""
    return ReportConfig()


RECIPES = {"demo": demo}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion as a client sees it."""

    prompt: str
    text: str
    tokens: int
    rounds: int
    """How often the target verified a tree for it."""
    drafted: int
    accepted: int
    seconds: float


def main(config: ReportConfig) -> None:
    started = time.perf_counter()
    prompts = _prompts(config)
    plain, speculative = _measure(config, prompts)
    samples = _samples(config, prompts[: config.samples])
    target, draft = _training(config.run / "target"), _training(config.run / "draft")
    trained = {"linearized": target, "draft": draft}
    if (_softmax(config) / "run.json").exists():  # else it is the user's own model
        trained = {"teacher": _training(_softmax(config)), **trained}
    seconds = {**json.loads(config.seconds), "report": round(time.perf_counter() - started, 1)}
    report = {
        "perplexity": {
            "teacher": target["perplexity"]["teacher"],
            "swapped": target["perplexity"]["before"],
            "linearized": target["perplexity"]["after"],
            "draft": draft["perplexity"]["after"],
        },
        "after_transfer": _after_transfer(config.run / "probe" / "probe.json"),
        "parameters": {name: done["parameters"] for name, done in trained.items()},
        "training_tokens": {name: done["tokens"] for name, done in trained.items()},
        "tokens_per_second": {"plain": _speed(plain), "speculative": _speed(speculative)},
        "accepted_length": round(
            sum(a.tokens for a in speculative) / sum(a.rounds for a in speculative), 2
        ),
        "accepted_share": round(
            sum(a.accepted for a in speculative) / max(sum(a.drafted for a in speculative), 1), 3
        ),
        "texts_equal": [a.text for a in plain] == [a.text for a in speculative],
        "seconds": seconds,
        "samples": samples,
    }
    (config.run / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    losses = {name: done["losses"] for name, done in trained.items()}
    for suffix in ("png", "svg"):
        draw(report, losses, config.run / f"report.{suffix}")
    show(report, Console(width=100))
    if not report["texts_equal"]:
        raise DataError(
            "greedy speculative text differs from greedy plain text; both are in "
            f"{config.run / 'report.json'} and this must never be: please report it"
        )


def _softmax(config: ReportConfig) -> Path:
    return config.model or config.run / "teacher"


def _prompts(config: ReportConfig) -> list[str]:
    """The beginnings of held-out blocks, spread over them all."""
    import transformers

    from linearized.training.blocks import Blocks

    held_out = Blocks(config.run / "data" / "held_out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.run / "data" / "tokenizer")
    step = max(len(held_out) // config.prompts, 1)
    rows = held_out.rows([(i * step + step // 2) % len(held_out) for i in range(config.prompts)])
    ids = rows[:, : config.prompt_tokens].tolist()
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


def _measure(config: ReportConfig, prompts: list[str]) -> tuple[list[Answer], list[Answer]]:
    """Each prompt plainly and speculatively in turn, after one of each that does not count."""
    answers: dict[str, list[Answer]] = {"none": [], "model": []}
    with (
        httpx.Client(base_url=config.url, timeout=120) as client,
        Progress("report: requests", total=2 * len(prompts), unit="requests") as progress,
    ):
        for mode in answers:
            _complete(client, prompts[0], mode, config.new_tokens)
        for i, prompt in enumerate(prompts):
            # The order changes from prompt to prompt, so that neither mode always comes second.
            for mode in ("none", "model") if i % 2 else ("model", "none"):
                answers[mode].append(_complete(client, prompt, mode, config.new_tokens))
            progress.update(2 * i + 2)
    return answers["none"], answers["model"]


def _samples(config: ReportConfig, prompts: list[str]) -> list[dict[str, str]]:
    """How the softmax model goes on, and how the linearized one does, by the same chance: sampled,
    since greedy texts of small models soon repeat themselves."""
    if not prompts:
        return []
    with httpx.Client(base_url=config.url, timeout=120) as client:
        linearized = [
            _complete(client, prompt, "none", SAMPLE_TOKENS, CHANCE).text for prompt in prompts
        ]
    softmax = _softmax_texts(_softmax(config), prompts)
    return [
        {"prompt": prompt, "teacher": one, "linearized": other}
        for prompt, one, other in zip(prompts, softmax, linearized, strict=True)
    ]


def _softmax_texts(folder: Path, prompts: list[str]) -> list[str]:
    import transformers

    import linearized
    from linearized.models import decoder

    model = decoder(linearized.load(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = []
    with Progress("report: softmax model", total=len(prompts), unit="texts") as progress:
        for done, prompt in enumerate(prompts, start=1):
            ids = tokenizer(prompt).input_ids
            new = linearized.generate(model, ids, max_new_tokens=SAMPLE_TOKENS, **CHANCE)
            texts.append(str(tokenizer.decode(new, skip_special_tokens=True)))
            progress.update(done)
    return texts


def _complete(
    client: httpx.Client,
    prompt: str,
    mode: str,
    new_tokens: int,
    chance: Mapping[str, Any] = GREEDY,
) -> Answer:
    models = client.get("/v1/models").raise_for_status().json()
    body = {
        "model": models["data"][0]["id"],
        "prompt": prompt,
        "max_tokens": new_tokens,
        "speculate": mode,
        **chance,
    }
    started = time.perf_counter()
    response = client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - started
    if response.status_code != 200:
        raise DataError(f"the app answered {response.status_code}: {response.text[:500]}")
    answer = response.json()
    usage = answer["usage"]
    details = usage["completion_tokens_details"]
    return Answer(
        prompt=prompt,
        text=answer["choices"][0]["text"],
        tokens=usage["completion_tokens"],
        rounds=details["verification_rounds"],
        drafted=details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"],
        accepted=details["accepted_prediction_tokens"],
        seconds=seconds,
    )


def _speed(answers: list[Answer]) -> float:
    """Median over requests of tokens a second, prefill and HTTP included."""
    return round(statistics.median(a.tokens / a.seconds for a in answers), 1)


def _after_transfer(file: Path) -> dict[str, dict[str, float]]:
    """What jobs.probe found: for each attention, perplexity over the teacher's, by position."""
    if not file.exists():
        return {}
    found = {}
    for candidate in json.loads(file.read_text())["candidates"]:
        whole = next(iter(candidate["texts"].values()))["whole"]
        found[candidate["name"]] = {"all": whole["ratio"], **whole["ranges"]}
    return found


def _training(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    if not file.exists():
        raise DataError(f"there is no {file}; run the job that trains {folder.name} first")
    return dict(json.loads(file.read_text()))


def show(report: dict[str, Any], console: Console) -> None:
    """The report as one table, and two completions."""
    table = Table(show_header=False, pad_edge=False)
    perplexity, sizes = report["perplexity"], report["parameters"]
    ratio = perplexity["linearized"] / perplexity["teacher"]
    table.add_row("held-out perplexity", "teacher (softmax)", f"{perplexity['teacher']:.2f}")
    table.add_row("", "swapped, untrained", f"{perplexity['swapped']:.2f}")
    table.add_row("", "linearized", f"{perplexity['linearized']:.2f}  ({ratio:.3f} x teacher)")
    table.add_row("", "draft", f"{perplexity['draft']:.2f}")
    for i, (name, ratios) in enumerate(report["after_transfer"].items()):
        by_position = ", ".join(f"{value:.2f} at {at}" for at, value in list(ratios.items())[1:])
        first = "x teacher, attention" if i == 0 else "transfer alone" if i == 1 else ""
        table.add_row(first, name, f"{ratios['all']:.3f} x ({by_position})")
    table.add_section()
    for i, (name, count) in enumerate(sizes.items()):
        tokens = report["training_tokens"][name]
        table.add_row(
            "" if i else "parameters",
            name,
            f"{count / 1e6:.2f} M, trained on {tokens / 1e6:.2f} M tokens",
        )
    table.add_section()
    speeds = report["tokens_per_second"]
    gain = speeds["speculative"] / speeds["plain"]
    table.add_row("tokens a second", "plain", f"{speeds['plain']:.1f}")
    table.add_row(
        "over HTTP, greedy", "speculative", f"{speeds['speculative']:.1f}  ({gain:.2f} x)"
    )
    table.add_row("", "tokens a round", f"{report['accepted_length']:.2f}")
    table.add_row("", "texts equal", "yes" if report["texts_equal"] else "NO")
    table.add_section()
    for i, (stage, seconds) in enumerate(report["seconds"].items()):
        table.add_row("" if i else "seconds", stage, f"{seconds:.1f}")
    console.print(table)
    for sample in report["samples"]:
        console.rule("held-out text, and how each model goes on (sampled)", style="dim")
        console.print(sample["prompt"][-200:], style="dim", markup=False)
        beside = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("teacher", "linearized"):
            beside.add_column(name, ratio=1)
        beside.add_row(Text(sample["teacher"]), Text(sample["linearized"]))
        console.print(beside)


def draw(report: dict[str, Any], losses: dict[str, list[list[float]]], file: Path) -> None:
    """One picture of the whole run; the format follows the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report"})

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, points in losses.items():
        last = [point for point in points if point[0] == points[-1][0]]
        left.plot([x[1] for x in last], _smooth([x[2] for x in last]), label=name)
    left.set(title="loss of the last stage, smoothed", xlabel="step", ylabel="nats a token")
    left.legend(frameon=False)
    perplexity = report["perplexity"]
    bars = middle.bar(list(perplexity), list(perplexity.values()), color="C0")
    middle.bar_label(bars, fmt="%.1f")
    middle.set(title="held-out perplexity")
    middle.margins(y=0.12)
    speeds = report["tokens_per_second"]
    bars = right.bar(list(speeds), list(speeds.values()), color="C2", width=0.5)
    right.bar_label(bars, fmt="%.0f")
    right.margins(y=0.12)
    right.set(title=f"tokens/s over HTTP ({report['accepted_length']} tokens a round)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    undated = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, dpi=110, metadata=undated)
    pyplot.close(figure)


def _smooth(values: list[float], keep: float = 0.7) -> list[float]:
    """Exponential moving average."""
    smooth = values[:1]
    for value in values[1:]:
        smooth.append(keep * smooth[-1] + (1 - keep) * value)
    return smooth


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
