"""What jobs.bench_decode measures: a target of 42M parameters, its drafts, and their softmax twins.
jobs.pair trains them one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs.pruning import Pruning
from jobs.recipes import drafts
from jobs.run import BENCH, Run, Shape, Stage
from linearized.config import LinearConfig
from linearized.training.optim import Optim
from linearized.training.pruning import Cut

RUN = Path("runs/bench")


def bench_teacher() -> Run:
    """The softmax model behind jobs.bench_decode's target: 42M parameters."""
    return Run(
        name="teacher",
        data=RUN / "data",
        out=RUN / "teacher",
        student=Shape(hidden=640, layers=8, heads=10, intermediate=1728),
        linear=None,
        teacher=None,
        stages=(_stage("next_token", 600, Optim(lr=1e-3)),),
        workers=BENCH,
        eval_blocks=64,
    )


def bench_target() -> Run:
    """The target of jobs.bench_decode, linearized from its teacher."""
    return Run(
        name="linearize",
        data=RUN / "data",
        out=RUN / "target",
        student=RUN / "teacher",
        linear=LinearConfig(attention="grouped", augment=True),
        teacher=RUN / "teacher",
        stages=(
            _stage("transfer", 40, Optim(lr=1e-3, warmup=5)),
            _stage("distillation", 100, Optim(lr=5e-4, warmup=5)),
        ),
        workers=BENCH,
        seed=1,
        eval_blocks=64,
    )


def bench_draft() -> Run:
    """The draft of jobs.bench_decode: 2.6M parameters."""
    return Run(
        name="draft",
        data=RUN / "data",
        out=RUN / "draft",
        student=Shape(hidden=320, layers=1, heads=5, intermediate=864),
        linear=LinearConfig(attention="grouped", augment=True),
        teacher=RUN / "target",
        stages=(_stage("imitation", 600, Optim(lr=4e-3)),),
        workers=BENCH,
        seed=2,
        eval_blocks=64,
    )


def bench_softmax_draft() -> Run:
    """The same draft for the softmax model, to measure transformers' assisted generation with."""
    return replace(
        bench_draft(),
        name="softmax_draft",
        out=RUN / "softmax_draft",
        teacher=RUN / "teacher",
        linear=None,
    )


def bench_medusa() -> Run:
    """Heads for the target of jobs.bench_decode."""
    return replace(
        drafts.medusa(target=RUN / "target"),
        data=RUN / "data",
        stages=(Stage(objective="medusa", steps=150, batch=8, optim=Optim(lr=1e-3)),),
        workers=BENCH,
    )


def bench_pruned() -> list[Pruning | Run]:
    """The pruned draft of jobs.bench_decode."""
    cut, run = drafts.prune(
        target=RUN / "target",
        data=RUN / "data",
        out=RUN / "pruned",
        cut=Cut(layers=2, kv_heads=2, channels=432),
    )
    assert isinstance(run, Run)
    stages = (_stage("imitation", 200, Optim(lr=2e-3)),)
    return [cut, replace(run, stages=stages, workers=BENCH, eval_blocks=64)]


def _stage(objective: str, steps: int, optim: Optim) -> Stage:
    return Stage(objective=objective, steps=steps, batch=8, optim=optim, checkpoint_every=100)
