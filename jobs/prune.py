"""Make a draft out of its target: cut out the least important parts, then distil the rest."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.progress import note
from jobs import cli
from jobs.run import BENCH, Run, Stage, Workers, stamp
from jobs.trainer import fit
from linearized.errors import ConfigError
from linearized.training.optim import Optim
from linearized.training.pruning import Cut


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    target: Path = Path("runs/demo/target")
    """Folder of the linearized model that the draft is cut out of and will draft for."""
    data: Path = Path("runs/demo/data")
    """Folder that jobs.data wrote, with the target's tokenizer."""
    out: Path = Path("runs/demo/pruned")
    cut: Cut
    blocks: int = 64
    """Number of blocks on which importance is measured."""
    train: Stage
    workers: Workers
    seed: int = 4
    eval_blocks: int = 256
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ConfigError(f"blocks must be at least 1, got {self.blocks}")


def demo() -> PruneConfig:
    """Half of the demo's target, in a minute on two CPU cores."""
    return PruneConfig(
        cut=Cut(layers=2, kv_heads=2, channels=256),
        train=Stage(objective="imitation", steps=100, batch=8, optim=Optim(lr=2e-3)),
        workers=Workers(),
    )


def bench() -> PruneConfig:
    """The pruned draft of jobs.bench_decode."""
    return PruneConfig(
        target=Path("runs/bench/target"),
        data=Path("runs/bench/data"),
        out=Path("runs/bench/pruned"),
        cut=Cut(layers=2, kv_heads=2, channels=432),
        train=Stage(
            objective="imitation",
            steps=200,
            batch=8,
            optim=Optim(lr=2e-3),
            checkpoint_every=100,
        ),
        workers=BENCH,
        eval_blocks=64,
    )


RECIPES = {"demo": demo, "bench": bench}


def main(config: PruneConfig) -> None:
    cut = config.out.with_name(config.out.name + ".cut")
    _cut(config, cut)
    fit(
        Run(
            name=config.out.name,
            data=config.data,
            out=config.out,
            student=cut,
            linear=None,
            teacher=config.target,
            stages=(config.train,),
            workers=config.workers,
            seed=config.seed,
            eval_blocks=config.eval_blocks,
            fresh=config.fresh,
        )
    )
    shutil.rmtree(cut, ignore_errors=True)


def _cut(config: PruneConfig, folder: Path) -> None:
    """The pruned model, before distillation. Made anew each time: that takes seconds."""
    import linearized
    from linearized.training.blocks import Blocks
    from linearized.training.pruning import prune

    model = linearized.load(config.target)
    blocks = Blocks(config.data / "train")
    count = min(config.blocks, len(blocks))
    rows = [i * len(blocks) // count for i in range(count)]
    batches = (blocks.rows(rows[i : i + 8]) for i in range(0, count, 8))
    smaller = prune(model, batches, config.cut)
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, smaller))
    note(f"pruned: {after / 1e6:.2f}M of {before / 1e6:.2f}M parameters are left")
    smaller.save_pretrained(folder)
    key = hashlib.blake2b(repr((config.cut, config.blocks)).encode(), digest_size=8)
    key.update(stamp(config.target) + stamp(config.data))
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "key": key.hexdigest()}))


if __name__ == "__main__":
    cli.run(RECIPES, main, __doc__)
