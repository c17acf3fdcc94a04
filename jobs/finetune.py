"""Train: a model from scratch, a linearized one, what drafts for it. A recipe says which.

python -m jobs.finetune adapt model=path/to/model data=runs/mine/data out=runs/mine/target
python -m jobs.finetune settings.yaml stages.transfer.steps=500 --dry-run
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import cli, data, models, plan, pruning
from jobs.data import DataConfig
from jobs.pruning import Pruning
from jobs.recipes import RECIPES as RECIPES
from jobs.run import Run
from jobs.train import fit


def main(made: Run | list[Any]) -> None:
    """Do a run, or a recipe's steps one after the other."""
    steps = made if isinstance(made, list) else [made]
    try:
        for step in steps:
            _do(step)
    finally:
        for step in steps:
            if isinstance(step, Pruning):
                pruning.clear(step)


def _do(step: Any) -> None:
    if isinstance(step, DataConfig):
        data.main(step)
    elif isinstance(step, Pruning):
        pruning.prune(step)
    else:
        fit(with_folders(step))


def with_folders(run: Run) -> Run:
    """The run, with folders in place of the models that it names otherwise."""
    cache = run.out.parent / models.CACHE

    def folder(model: Any) -> Any:
        return models.folder_of(model, cache) if isinstance(model, Path) else model

    return replace(run, student=folder(run.student), teacher=folder(run.teacher))


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__, plan=plan.show)
