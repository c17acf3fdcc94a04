"""Small models from scratch, and what `make demo` trains: minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jobs.run import FlashShape, Run, Shape, Stage, Workers
from linearized.config import LinearConfig
from linearized.training.optim import Optim

Model = Annotated[
    Path,
    "The softmax model: a Hugging Face folder, a GGUF file, or a name on the Hub. It is the "
    "teacher, and the student starts from its weights.",
]
Attention = Annotated[
    str, "Name of an attention or of a combination such as `anchored`; `linear.…` has its settings."
]

DATA = Path("runs/demo/data")


def demo(*, model: Model = Path("runs/demo/teacher"), attention: Attention = "anchored") -> Run:
    """The demo's teacher, linearized in two minutes on two CPU cores."""
    return Run(
        name="linearize",
        data=DATA,
        out=Path("runs/demo/target"),
        student=model,
        linear=LinearConfig.named(attention),
        teacher=model,
        stages=(
            Stage(objective="transfer", steps=50, batch=8, optim=Optim(lr=1e-3)),
            Stage(objective="distillation", steps=200, batch=8, optim=Optim(lr=3e-3)),
        ),
        workers=Workers(),
        seed=1,
    )


def pretrain() -> Run:
    """A softmax Llama of 2.2M parameters from scratch, in three to four minutes on two cores."""
    return Run(
        name="teacher",
        data=DATA,
        out=Path("runs/demo/teacher"),
        student=Shape(hidden=192, layers=4, heads=3, intermediate=512),
        linear=None,
        teacher=None,
        stages=(Stage(objective="next_token", steps=700, batch=8, optim=Optim(lr=3e-3)),),
        workers=Workers(),
    )


def flash() -> Run:
    """A FLASH model of the demo's size from scratch, which is linear from the start."""
    return Run(
        name="flash",
        data=DATA,
        out=Path("runs/demo/flash"),
        student=FlashShape(hidden=192, layers=8, group=64),
        linear=None,
        teacher=None,
        stages=(Stage(objective="next_token", steps=700, batch=8, optim=Optim(lr=3e-3)),),
        workers=Workers(),
    )
