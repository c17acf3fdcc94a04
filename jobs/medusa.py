"""Train Medusa's heads on a target, which stays as it is; they are saved beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jobs import cli
from jobs.run import BENCH, Heads, Run, Stage, Workers
from jobs.trainer import fit
from linearized.training.optim import Optim


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    target: Path = Path("runs/demo/target")
    """Folder of the linearized model that the heads will draft for."""
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote, with the target's tokenizer."""
    out: Path | None = None
    """Folder for the heads. null means `medusa` in the target's folder, where drafters look for
    them."""
    heads: Heads = field(default_factory=Heads)
    train: Stage
    workers: Workers
    seed: int = 3
    eval_blocks: int = 64
    fresh: bool = False


def demo() -> MedusaConfig:
    """Four heads for the demo's target, in a minute on two CPU cores."""
    return MedusaConfig(
        train=Stage(objective="medusa", steps=100, batch=8, optim=Optim(lr=1e-3)),
        workers=Workers(),
    )


def bench() -> MedusaConfig:
    """Heads for the target of jobs.bench_decode."""
    return MedusaConfig(
        target=Path("runs/bench/target"),
        data=Path("runs/bench/data"),
        train=Stage(objective="medusa", steps=150, batch=8, optim=Optim(lr=1e-3)),
        workers=BENCH,
    )


RECIPES = {"demo": demo, "bench": bench}


def main(config: MedusaConfig) -> None:
    fit(
        Run(
            name="medusa",
            data=config.data,
            out=config.out or config.target / "medusa",
            student=config.heads,
            linear=None,
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
