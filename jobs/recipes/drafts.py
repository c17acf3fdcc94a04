"""What guesses for a target: a small model, heads on it, or what is left of it when parts are cut
out. The sizes are those of the demo's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jobs.pruning import Pruning
from jobs.run import Heads, Run, Shape, Stage, Workers
from linearized.config import LinearConfig
from linearized.training.optim import Optim
from linearized.training.pruning import Cut

Target = Annotated[Path, "Folder of the linearized model that the draft is for."]
Data = Annotated[Path, "Folder that jobs.data wrote, with the target's tokenizer."]
Out = Annotated[Path, "Folder for the result."]

TARGET = Path("runs/demo/target")
DATA = Path("runs/demo/data")
HALF = Cut(layers=2, kv_heads=2, channels=256)
"""Of the demo's target."""


def draft(*, target: Target = TARGET) -> Run:
    """A draft of 0.5M parameters and one layer for the demo's target, in a minute on two cores."""
    return Run(
        name="draft",
        data=DATA,
        out=Path("runs/demo/draft"),
        student=Shape(hidden=128, layers=1, heads=2, intermediate=384),
        linear=LinearConfig(attention="grouped", augment=True),
        teacher=target,
        stages=(Stage(objective="imitation", steps=250, batch=8, optim=Optim(lr=5e-3)),),
        workers=Workers(),
        seed=2,
    )


def medusa(*, target: Target = TARGET) -> Run:
    """Four of Medusa's heads on a target, which stays as it is; they are saved beside it."""
    return Run(
        name="medusa",
        data=DATA,
        out=target / "medusa",  # where drafters look for them
        student=Heads(),
        linear=None,
        teacher=target,
        stages=(Stage(objective="medusa", steps=100, batch=8, optim=Optim(lr=1e-3)),),
        workers=Workers(),
        seed=3,
        eval_blocks=64,
    )


def prune(
    *,
    target: Target = TARGET,
    data: Data = DATA,
    out: Out = Path("runs/demo/pruned"),
    cut: Annotated[Cut, "What is left."] = HALF,
    blocks: Annotated[int, "Number of blocks on which importance is measured."] = 64,
) -> list[Pruning | Run]:
    """A draft cut out of its target, then distilled: half of the demo's, in a minute."""
    folder = out.with_name(out.name + ".cut")
    return [
        Pruning(target=target, data=data, out=folder, cut=cut, blocks=blocks),
        Run(
            name=out.name,
            data=data,
            out=out,
            student=folder,
            linear=None,
            teacher=target,
            stages=(Stage(objective="imitation", steps=100, batch=8, optim=Optim(lr=2e-3)),),
            workers=Workers(),
            seed=4,
        ),
    ]
