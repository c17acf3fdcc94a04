"""Linearize a softmax model and fine-tune it: attention transfer, then distillation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jobs import cli
from jobs.run import BENCH, Run, Stage, Workers
from jobs.trainer import fit
from linearized.config import LinearConfig
from linearized.training.optim import Optim


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    model: Path = Path("runs/demo/teacher")
    """Hugging Face folder of the softmax model. It is the teacher, and the student starts from its
    weights."""
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote, with the model's own tokenizer."""
    out: Path = Path("runs/demo/target")
    linear: LinearConfig
    transfer: Stage
    finetune: Stage
    workers: Workers
    seed: int = 1
    eval_blocks: int = 256
    fresh: bool = False


def demo() -> FinetuneConfig:
    """The demo's teacher, linearized in two minutes on two CPU cores."""
    return FinetuneConfig(
        linear=LinearConfig.named("anchored"),
        transfer=Stage(objective="transfer", steps=50, batch=8, optim=Optim(lr=1e-3)),
        finetune=Stage(objective="distillation", steps=200, batch=8, optim=Optim(lr=3e-3)),
        workers=Workers(),
    )


def bench() -> FinetuneConfig:
    """The target of jobs.bench_decode."""
    stage = Stage(
        objective="transfer",
        steps=40,
        batch=8,
        optim=Optim(lr=1e-3, warmup=5),
        checkpoint_every=100,
    )
    distil = replace(stage, objective="distillation", steps=100, optim=Optim(lr=5e-4, warmup=5))
    return FinetuneConfig(
        model=Path("runs/bench/teacher"),
        data=Path("runs/bench/data"),
        out=Path("runs/bench/target"),
        linear=LinearConfig(attention="grouped", augment=True),
        transfer=stage,
        finetune=distil,
        workers=BENCH,
        eval_blocks=64,
    )


RECIPES = {"demo": demo, "bench": bench}


def main(config: FinetuneConfig) -> None:
    fit(
        Run(
            name="linearize",
            data=config.data,
            out=config.out,
            student=config.model,
            linear=config.linear,
            teacher=config.model,
            stages=(config.transfer, config.finetune),
            workers=config.workers,
            seed=config.seed,
            eval_blocks=config.eval_blocks,
            fresh=config.fresh,
        )
    )


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
