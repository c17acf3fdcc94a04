"""Many small trainings, compared: a grid of attentions, sizes or recipes over seeds, by Ray Tune on
the cluster that this is submitted to, or on this machine.

Every trial is one process that linearizes the same softmax model, trains it on the same tokens and
measures it on the same held-out blocks (`jobs/trial.py`). What a trial found is written to
`out/trials` when it ends. A sweep that was interrupted goes on with what is missing, and rows that
are added later are all that is run. At the end `out` holds sweep.parquet, sweep.md with the paper's
claims beside what was found, and sweep.png."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.progress import Progress, note
from cluster.session import session
from jobs import associations, cli, sentences, sweep_report, trial
from jobs.grids import GRIDS, Grid
from jobs.run import stamp
from jobs.trial import Setting, Trial
from linearized.errors import ConfigError, DataError, JobError, LinearizedError


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    grid: str
    """`variants`, `augmentation`, `ablations`, `sentences` or `recall`."""
    only: tuple[str, ...] = ()
    """Names of the grid's rows that are run; none: all."""
    teacher: Path = Path("runs/demo/teacher")
    """Hugging Face folder of the softmax model. On several nodes all of them must see it, and
    `data`, under this path."""
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote, with the teacher's tokenizer."""
    sentences: tuple[Path, Path] | None = None
    """For the grid `sentences`, in the place of teacher and data: tables of a GLUE task to train on
    and to measure on, such as [sst2-train.tsv,sst2-dev.tsv]."""
    base: Trial
    """What all rows share, where the grid does not say otherwise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_blocks: int = 64
    """Number of held-out blocks on which perplexity is measured."""
    cpus: int = 1
    """Number of cores that each trial reserves, and of threads that it uses."""
    gpus: float = 0.0
    """Number of GPUs of each trial; shares are allowed."""
    at_once: int | None = None
    """Number of trials that run at the same time, at most. null: as many as the cluster has room
    for."""
    out: Path = Path("runs/sweep")
    fresh: bool = False
    """Whether to run trials again that have ended."""

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ConfigError(f"unknown grid {self.grid!r}; choose from {', '.join(GRIDS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be different numbers, got {list(self.seeds)}")
        for name in ("eval_blocks", "cpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gpus < 0 or (self.at_once is not None and self.at_once < 1):
            raise ConfigError("gpus must be at least 0, and at_once at least 1")
        if (self.grid == "sentences") != (self.sentences is not None):
            raise ConfigError(
                "the grid sentences, and no other, takes sentences=[train.tsv,held_out.tsv]"
            )
        names = [row.name for row in self.whole.rows]
        for name in self.only:
            if name not in names:
                raise ConfigError(f"{self.grid} has no row {name!r}; it has {', '.join(names)}")

    @property
    def whole(self) -> Grid:
        return GRIDS[self.grid](self.base)

    def trials(self) -> list[Trial]:
        rows = [row for row in self.whole.rows if not self.only or row.name in self.only]
        return [replace(row, seed=seed) for seed in self.seeds for row in rows]


def variants() -> SweepConfig:
    """All attentions, plain and augmented, on the demo's teacher, three seeds."""
    base = Trial(name="base", settings={"group": 16})
    return SweepConfig(grid="variants", base=base, out=Path("runs/sweep/variants"))


def augmentation() -> SweepConfig:
    """The convolution added to RFA, Performer and Linformer."""
    return replace(variants(), grid="augmentation", out=Path("runs/sweep/augmentation"))


def ablations() -> SweepConfig:
    """Sizes and recipes of grouped attention, the paper's own among them."""
    return replace(variants(), grid="ablations", out=Path("runs/sweep/ablations"))


def sst2() -> SweepConfig:
    """GPT-2-, T5- and BERT-shaped classifiers of SST-2's sentences over the attentions, from
    scratch; its tables must be in sst2-train.tsv and sst2-dev.tsv here, or elsewhere by
    `sentences`."""
    base = Trial(name="base", settings={"group": 16}, steps=600)
    return replace(
        variants(), grid="sentences", sentences=(Path("sst2-train.tsv"), Path("sst2-dev.tsv")),
        base=base, out=Path("runs/sweep/sst2"),
    )  # fmt: skip


def recall() -> SweepConfig:
    """Looking up pairs (MQAR) with states of 128 KB, by tiny models from scratch."""
    base = Trial(name="base", steps=600, state_bytes=131_072)
    return replace(variants(), grid="recall", base=base, out=Path("runs/sweep/recall"))


RECIPES = {
    "variants": variants, "augmentation": augmentation, "ablations": ablations, "sst2": sst2,
    "recall": recall,
}  # fmt: skip
JOBS: dict[str, Callable[[Trial, Setting], dict[str, Any]]] = {
    "text": trial.run, "sentences": sentences.run, "recall": associations.run,
}  # fmt: skip
"""What runs a row of a grid, by what its rows learn."""


def main(config: SweepConfig) -> None:
    config = replace(
        config, teacher=config.teacher.absolute(), data=config.data.absolute(),
        out=config.out.absolute(),
    )  # fmt: skip
    setting = _prepared(config)
    shelf = Shelf(config.out / "trials", setting)
    trials = config.trials()
    missing = [trial for trial in trials if config.fresh or shelf.get(trial) is None]
    if len(missing) < len(trials):
        note(f"sweep: {len(trials) - len(missing)} of {len(trials)} trials have been run before")
    failed = _run(config, missing, setting, shelf) if missing else {}
    found = [values for trial in trials if (values := shelf.get(trial)) is not None]
    if found:
        sweep_report.write(found, config.whole, config.grid, config.out)
        note(f"results: {config.out / 'sweep.md'}, sweep.parquet, sweep.png")
    if failed:
        name, reason = next(iter(failed.items()))
        raise JobError(
            f"{len(failed)} of {len(trials)} trials failed, the first of them {name}: {reason}; "
            "the same command runs them again",
            job="sweep", status="FAILED",
        )  # fmt: skip


def _prepared(config: SweepConfig) -> Setting:
    """What trials read, in its place."""
    setting = Setting(threads=config.cpus, eval_blocks=config.eval_blocks)
    if config.sentences is not None:
        sentences.prepare(*config.sentences, config.out / "data")
        return replace(setting, data=config.out / "data")
    if config.whole.task != "text":
        return setting
    for folder in (config.teacher, config.data):
        if not folder.is_dir():
            raise DataError(f"there is no {folder}; run the job that makes it first")
    return replace(setting, data=config.data, teacher=config.teacher)


class Shelf:
    """What trials have found, one file each, by what they depend on."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self._folder = folder
        inputs = [stamp(one) for one in (setting.data, setting.teacher) if one is not None]
        self._inputs = b" ".join([*inputs, str(setting.eval_blocks).encode()])

    def get(self, trial: Trial) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._file(trial).read_text()))
        except (OSError, ValueError):
            return None

    def put(self, trial: Trial, found: Mapping[str, Any]) -> None:
        file = self._file(trial)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(part, file)

    def _file(self, trial: Trial) -> Path:
        settings = json.dumps(asdict(trial), sort_keys=True, default=str).encode()
        key = hashlib.blake2b(settings + self._inputs, digest_size=8).hexdigest()
        return self._folder / f"{key}.json"


def _run(
    config: SweepConfig, trials: list[Trial], setting: Setting, shelf: Shelf
) -> dict[str, str]:
    """Run trials by Ray Tune; why some failed, by their names."""
    failed: dict[str, str] = {}
    # Its own progress and files would stand beside ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    config.out.mkdir(parents=True, exist_ok=True)
    job = JOBS[config.whole.task]
    with (
        session(log_to_driver=False),
        Progress(f"sweep {config.grid}", total=len(trials), unit="trials") as progress,
        tempfile.TemporaryDirectory(prefix="tune-", dir=config.out) as folder,
    ):
        from ray import tune
        from ray.tune.callback import Callback

        class Kept(Callback):
            """Writes down what a trial found as soon as it has ended."""

            done = 0

            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
            ) -> None:
                values = result.get("found")
                if values is None and result.get("failed") is None:
                    return
                row: Trial = trial.config["trial"]
                if values is not None:
                    shelf.put(row, values)
                    self.shown = {"score": values["score"]}
                else:
                    failed[f"{row.name}, seed {row.seed}"] = result["failed"]
                    self.shown = {}
                Kept.done += 1
                progress.update(Kept.done, trial=row.name, **self.shown)

        def one(given: dict[str, Any]) -> None:
            try:
                tune.report({"found": job(given["trial"], setting)})
            except LinearizedError as error:  # it would repeat itself
                tune.report({"failed": str(error)})

        tuner = tune.Tuner(
            tune.with_resources(one, {"cpu": config.cpus, "gpu": config.gpus}),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.at_once),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, verbose=0, callbacks=[Kept()]
            ),
        )
        results = tuner.fit()
        for result in (results[index] for index in range(len(results))):
            if result.error is not None:
                row = (result.config or {}).get("trial")
                name = f"{row.name}, seed {row.seed}" if row is not None else "a trial"
                failed[name] = str(result.error).strip().split("\n")[-1]
    return failed


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
