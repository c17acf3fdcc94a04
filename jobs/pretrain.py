"""Train a model from scratch: a softmax Llama, for use as a teacher, or FLASH, which is linear from
the start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jobs import cli
from jobs.run import BENCH, FlashShape, Run, Shape, Stage, Workers
from jobs.trainer import fit
from linearized.training.optim import Optim


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote."""
    out: Path = Path("runs/demo/teacher")
    shape: Shape | FlashShape
    train: Stage
    workers: Workers
    seed: int = 0
    eval_blocks: int = 256
    fresh: bool = False


def demo() -> PretrainConfig:
    """A Llama of 2.2M parameters, in three to four minutes on two CPU cores."""
    return PretrainConfig(
        shape=Shape(hidden=192, layers=4, heads=3, intermediate=512),
        train=Stage(objective="next_token", steps=700, batch=8, optim=Optim(lr=3e-3)),
        workers=Workers(),
    )


def flash() -> PretrainConfig:
    """A FLASH model of the demo's size, on the demo's data."""
    shape = FlashShape(hidden=192, layers=8, group=64)
    return replace(demo(), out=Path("runs/demo/flash"), shape=shape)


def bench() -> PretrainConfig:
    """The softmax model behind jobs.bench_decode's target: 42M parameters."""
    return PretrainConfig(
        data=Path("runs/bench/data"),
        out=Path("runs/bench/teacher"),
        shape=Shape(hidden=640, layers=8, heads=10, intermediate=1728),
        train=Stage(
            objective="next_token", steps=600, batch=8, optim=Optim(lr=1e-3), checkpoint_every=100
        ),
        workers=BENCH,
        eval_blocks=64,
    )


RECIPES = {"demo": demo, "flash": flash, "bench": bench}


def main(config: PretrainConfig) -> None:
    fit(
        Run(
            name=config.out.name,
            data=config.data,
            out=config.out,
            student=config.shape,
            linear=None,
            teacher=None,
            stages=(config.train,),
            workers=config.workers,
            seed=config.seed,
            eval_blocks=config.eval_blocks,
            fresh=config.fresh,
        )
    )


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
