"""Make what jobs.bench_decode measures: a target, its draft, and their softmax twins.

Runs jobs.data, jobs.pretrain, jobs.finetune and jobs.draft one after the other, each by its recipe
`bench`. What has finished is reused; what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.progress import note
from cluster.session import session
from jobs import cli, data, draft, finetune, pretrain
from linearized.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    cpus: int = 2
    """Of the one worker that trains, and of the local cluster, if there is none to join."""
    autocast: bool = True
    """Multiply in bfloat16; processors without AVX512-BF16 or AMX are faster without."""

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ConfigError(f"cpus must be at least 1, got {self.cpus}")


def bench() -> PairConfig:
    """42M and 2.6M parameters on the Python standard library."""
    return PairConfig()


RECIPES = {"bench": bench}


def main(config: PairConfig) -> None:

    def here(recipe: Any) -> Any:
        workers = replace(recipe.workers, cpus=config.cpus, autocast=config.autocast)
        return replace(recipe, workers=workers)

    stages: dict[str, Callable[[], object]] = {
        "data": lambda: data.main(data.bench()),
        "teacher": lambda: pretrain.main(here(pretrain.bench())),
        "target": lambda: finetune.main(here(finetune.bench())),
        "draft": lambda: draft.main(here(draft.bench())),
        "softmax draft": lambda: draft.main(here(draft.bench_softmax())),
    }
    with session(num_cpus=config.cpus):
        for name, stage in stages.items():
            began = time.perf_counter()
            stage()
            note(f"{name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
