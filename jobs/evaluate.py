"""How good is a linearized model, beside the softmax model that it was made from? In one process,
without Ray.

Perplexity of texts, joined and strided as Hugging Face does, in bits a byte, too, and by position
in long rows; agreement with the teacher; multiple choice, last words and GLUE's sentences from
local files or the hub, and any task of lm-evaluation-harness; pass keys and associative recall
(MQAR) by length; the speed of decoding and the bytes of its state by context. Every score is also
measured with the far part off and with the convolution off. Writes one table, a picture and
evaluation.json to `out`. What is measured is kept at once: a run that was interrupted goes on where
it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.progress import Progress, note
from jobs import card, cli, measure, models
from linearized.errors import ConfigError

if TYPE_CHECKING:
    from jobs.contestants import Contestant


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    model: str
    """The model, linearized or not: a folder, a GGUF file or a name on the Hub."""
    teacher: str | None = None
    """The softmax model that it was made from, with the same tokenizer, likewise. null measures the
    model alone."""
    texts: tuple[str, ...] = ()
    """What to measure perplexity on, each in the form that jobs.data takes. Nothing: what jobs.data
    would hold out of the standard library."""
    text_column: str | None = None
    """The column of JSON Lines, Parquet or a dataset that holds the text."""
    tokens: int = 65_536
    """Number of tokens of each text, its first ones."""
    length: int = 2048
    """Number of tokens in a window."""
    stride: int = 1024
    """Number of tokens between the beginnings of windows."""
    positions: int = 0
    """Number of tokens in the long rows in which perplexity is measured by position; 0: none. What
    is longer than the teacher was made for is read by the linearized model only."""
    rows: int = 2
    """Number of these rows, of each text."""
    tasks: tuple[str, ...] = ()
    """Files of questions (JSON Lines, or tables of GLUE), or `glue:sst2` and the like, which are
    fetched from the hub."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, which must be installed."""
    harness_tasks: Path | None = None
    """Folder with harness tasks of your own."""
    shots: int | None = None
    """Examples before each question of a harness task. null: as the task has it."""
    limit: int | None = None
    """Number of questions of each task, its first ones. null: all."""
    recall: tuple[int, ...] = ()
    """Lengths in tokens at which pass keys and MQAR are asked."""
    keys: int = 8
    """Number of rows of each length, for pass keys and for MQAR."""
    pairs: int = 16
    """Number of pairs in a row of MQAR."""
    speed: tuple[int, ...] = (1024, 8192)
    """Contexts in tokens at which a decoding step is timed."""
    parts: bool = True
    """Whether to measure everything with the far part off and the convolution off, too."""
    batch_tokens: int = 4096
    """Number of tokens that are read at once, in questions."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    autocast: bool | None = None
    """Whether to multiply in bfloat16. null does so on a GPU, and on a CPU if that is faster. Speed
    is measured without."""
    threads: int = 0
    """Number of torch's threads; 0 leaves the choice to torch."""
    seed: int = 0
    """Chooses pass keys and pairs."""
    card: bool = False
    """Whether to put the scores into README.md in the model's folder."""
    out: Path = Path("runs/evaluation")
    fresh: bool = False
    """Whether to measure everything anew."""

    def __post_init__(self) -> None:
        least_of = {"tokens": 2, "length": 2, "stride": 1, "positions": 0, "rows": 1, "keys": 1,
                    "pairs": 1, "batch_tokens": 1, "threads": 0}  # fmt: skip
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        if self.stride > self.length:
            raise ConfigError(
                f"stride={self.stride} is longer than a window of length={self.length}, and would "
                "leave tokens out"
            )
        for name in ("recall", "speed"):
            if any(number < 1 for number in getattr(self, name)):
                raise ConfigError(f"{name} must be numbers of tokens, got {getattr(self, name)}")


def quick() -> EvaluateConfig:
    """The demo's linearized model beside its teacher, in a minute or two."""
    return EvaluateConfig(
        model="runs/demo/target",
        teacher="runs/demo/teacher",
        tokens=16_384,
        length=256,
        stride=128,
        speed=(1024,),
    )


def full() -> EvaluateConfig:
    """Rows of 2,048 tokens, positions and recall to 32K, speed: for a model that reads as far."""
    lengths = (1024, 2048, 4096, 8192, 16_384, 32_768)
    return replace(
        quick(), tokens=131_072, length=2048, stride=1024, positions=32_768, recall=lengths,
        speed=(1024, 8192, 32_768),
    )  # fmt: skip


RECIPES = {"quick": quick, "full": full}


def main(config: EvaluateConfig) -> None:
    import torch

    from jobs import evaluation_report, scores
    from jobs.contestants import contestants

    if config.threads:
        torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    config = replace(
        config,
        model=_folder(config.model, config.out),
        teacher=None if config.teacher is None else _folder(config.teacher, config.out),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = scores.Sources.read(config)
    asked = _asked(config)
    cells = Cells(config.out / "cells.json", asked, fresh=config.fresh)
    measured = contestants(config, device)
    autocast = config.autocast
    if autocast is None:
        autocast = device.type == "cuda" or measure.bfloat16_is_faster(torch.get_num_threads())
    found: dict[str, dict[str, Any]] = {}
    measures = scores.measures(config, sources, measured)
    with Progress("evaluate", total=len(measures) * len(measured), unit="scores") as progress:
        done = 0
        for name, take in measures.items():
            timed = name.startswith("decoding")
            narrow = autocast and not timed
            for contestant in measured:
                with (
                    torch.autocast(device.type, torch.bfloat16, enabled=narrow),
                    torch.no_grad(),
                    contestant.part(),
                ):
                    value = cells.get(name, contestant, take)
                done += 1
                progress.update(done, score=name, model=contestant.name)
                if value is not None:
                    found.setdefault(name, {})[contestant.name] = value
    machine = measure.Machine.measure(device, torch.float32)
    result: dict[str, Any] = {
        "model": config.model,
        "teacher": config.teacher,
        "models": {one.name: one.facts() for one in measured if not one.is_part},
        "autocast": bool(autocast),
        "scores": found,
        "asked": asked,
    }
    console = measure.console()
    console.print(f"\n{machine}")
    evaluation_report.show(result, console)
    evaluation_report.draw(result, config.out / "evaluation.png")
    line = measure.last_line("jobs.evaluate", machine, **result)
    (config.out / "evaluation.json").write_text(line + "\n")
    if config.card:
        card.add_scores(Path(config.model), json.loads(line))
    note(f"picture: {config.out / 'evaluation.png'}")
    print(line)


def _folder(model: str, out: Path) -> str:
    return str(models.folder_of(model, out / models.CACHE))


class Cells:
    """Scores that have been measured, each written down at once."""

    def __init__(self, file: Path, asked: Mapping[str, Any], *, fresh: bool) -> None:
        self._file, self._asked = file, dict(asked)
        self._known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            kept = json.loads(file.read_text())
            if not fresh and kept.get("asked") == self._asked:
                self._known = dict(kept["cells"])

    def get(self, name: str, contestant: Contestant, take: Any) -> Any:
        key = f"{name} | {contestant.name}"
        if key not in self._known:
            self._known[key] = take(contestant)
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({"asked": self._asked, "cells": self._known}))
            os.replace(part, self._file)
        return self._known[key]


def _asked(config: EvaluateConfig) -> dict[str, Any]:
    """What scores depend on, as JSON has it."""
    from linearized.training import corpus

    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "fresh", "card")}
    texts = [corpus.fingerprint(source) for source in config.texts or ("stdlib",)]
    files = [Path(task) for task in config.tasks if Path(task).exists()]
    for folder in filter(None, (config.model, config.teacher)):
        files += [*sorted(Path(folder).glob("*.safetensors")), Path(folder) / "config.json"]
    stats = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]
    return dict(json.loads(json.dumps({"settings": settings, "texts": texts, "files": stats},
                                      default=str)))  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(RECIPES, main, __doc__)
