"""Make what jobs.bench_decode measures: a target, its drafts, and their softmax twins.

Runs jobs.data, jobs.finetune and jobs.layers one after the other, with their recipes `bench` and
`bench_…`. What has finished is reused; what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.progress import note
from cluster.session import session
from jobs import cli, data, finetune, layers, measure
from jobs.recipes import bench as recipes
from linearized.errors import ConfigError

RUN = Path("runs/bench")
MADE = {
    "data": "data/data.json",
    "teacher": "teacher/run.json",
    "target": "target/run.json",
    "draft": "draft/run.json",
    "softmax draft": "softmax_draft/run.json",
    "medusa": "target/medusa/run.json",
    "layers": "target/layers.json",
    "pruned": "pruned/run.json",
}
"""The file in which each stage leaves how long its last run took."""


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    cpus: int = 2
    """Number of cores of the one worker that trains, and of the local cluster, if there is none to
    join."""
    gpu: bool | None = None
    """Whether to train on a GPU. null does so if there is one."""
    autocast: bool | None = None
    """Whether to multiply in bfloat16 on a CPU. null does so if that is faster here."""
    drafters: bool = True
    """Whether to make Medusa's heads, a list of layers and a pruned target, too."""

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ConfigError(f"cpus must be at least 1, got {self.cpus}")


def bench() -> PairConfig:
    """A target of 42M and a draft of 2.6M parameters, trained on the Python standard library."""
    return PairConfig()


RECIPES = {"bench": bench}


def main(config: PairConfig) -> None:
    workers = _workers(config)

    def train(made: Any) -> None:
        *before, run = made if isinstance(made, list) else [made]
        finetune.main([*before, replace(run, workers=replace(run.workers, **workers))])

    stages: dict[str, Callable[[], object]] = {
        "data": lambda: data.main(data.bench()),
        "teacher": lambda: train(recipes.bench_teacher()),
        "target": lambda: train(recipes.bench_target()),
        "draft": lambda: train(recipes.bench_draft()),
        "softmax draft": lambda: train(recipes.bench_softmax_draft()),
    }
    if config.drafters:
        stages |= {
            "medusa": lambda: train(recipes.bench_medusa()),
            "layers": lambda: layers.main(replace(layers.bench(), threads=config.cpus)),
            "pruned": lambda: train(recipes.bench_pruned()),
        }
    with session(num_cpus=config.cpus):
        for stage in stages.values():
            stage()
    seconds = {name: _seconds(RUN / MADE[name]) for name in stages}
    each = ", ".join(f"{name} {spent / 60:.1f}" for name, spent in seconds.items())
    note(f"pair: {sum(seconds.values()) / 60:.0f} minutes ({each})")


def _seconds(made: Path) -> float:
    seconds = json.loads(made.read_text())["seconds"]
    return float(seconds["total"] if isinstance(seconds, dict) else seconds)


def _workers(config: PairConfig) -> dict[str, Any]:
    """What of jobs.run.Workers depends on the machine."""
    import torch

    gpu = torch.cuda.is_available() if config.gpu is None else config.gpu
    if gpu and not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device; use gpu=false")
    autocast = config.autocast
    if autocast is None:
        autocast = not gpu and measure.bfloat16_is_faster(config.cpus)
    return {"cpus": config.cpus, "gpu": gpu, "autocast": autocast}


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
