"""Train a draft: a small model with the target's tokenizer that imitates the target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jobs import cli
from jobs.run import BENCH, Run, Shape, Stage, Workers
from jobs.trainer import fit
from linearized.config import LinearConfig
from linearized.training.optim import Optim


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    target: Path = Path("runs/demo/target")
    """Folder of the linearized model that the draft is for."""
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote, with the target's tokenizer."""
    out: Path = Path("runs/demo/draft")
    shape: Shape
    linear: LinearConfig | None
    """How to linearize the draft. null lets it keep softmax."""
    train: Stage
    workers: Workers
    seed: int = 2
    eval_blocks: int = 256
    fresh: bool = False


def demo() -> DraftConfig:
    """A draft of 0.5M parameters and one layer, in a minute on two CPU cores."""
    return DraftConfig(
        shape=Shape(hidden=128, layers=1, heads=2, intermediate=384),
        linear=LinearConfig(attention="grouped", augment=True),
        train=Stage(objective="imitation", steps=250, batch=8, optim=Optim(lr=5e-3)),
        workers=Workers(),
    )


def bench() -> DraftConfig:
    """The draft of jobs.bench_decode: 2.6M parameters."""
    return DraftConfig(
        target=Path("runs/bench/target"),
        data=Path("runs/bench/data"),
        out=Path("runs/bench/draft"),
        shape=Shape(hidden=320, layers=1, heads=5, intermediate=864),
        linear=LinearConfig(attention="grouped", augment=True),
        train=Stage(
            objective="imitation",
            steps=600,
            batch=8,
            optim=Optim(lr=4e-3),
            checkpoint_every=100,
        ),
        workers=BENCH,
        eval_blocks=64,
    )


def bench_softmax() -> DraftConfig:
    """The same draft for the softmax model, with which transformers' assisted generation is
    measured."""
    target, out = Path("runs/bench/teacher"), Path("runs/bench/softmax_draft")
    return replace(bench(), target=target, out=out, linear=None)


RECIPES = {"demo": demo, "bench": bench, "bench_softmax": bench_softmax}


def main(config: DraftConfig) -> None:
    fit(
        Run(
            name=config.out.name,
            data=config.data,
            out=config.out,
            student=config.shape,
            linear=config.linear,
            teacher=config.target,
            stages=(config.train,),
            workers=config.workers,
            seed=config.seed,
            eval_blocks=config.eval_blocks,
            fresh=config.fresh,
        )
    )


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
