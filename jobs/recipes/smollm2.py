"""SmolLM2-135M, linearized on two cores: the settings that docs/quality.md compares. Rows of 2,048
tokens (`jobs.data … block=2048`), every weight but the embeddings trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs.run import Run, Stage, Workers
from linearized.config import LinearConfig
from linearized.training.optim import Optim

LAYERS = 30
SOFTMAX = (8, 17, 18, 20, 23, 24, 28)
"""The layers whose softmax is worth most alone, measured by jobs.probe on rows that are neither
trained nor reported on."""

TWO_CORES = Workers(count=2, cpus=1, autocast=True, zero=0)


def smollm2(*, model: Path = Path("HuggingFaceTB/SmolLM2-135M-Instruct")) -> Run:
    """SmolLM2-135M at constant state: attention transfer, then distillation of its layers."""
    return Run(
        name="smollm2",
        data=Path("runs/smollm2/data"),
        out=Path("runs/smollm2/target"),
        student=model,
        linear=LinearConfig.named("anchored", window=7, augment=False),
        teacher=model,
        stages=(
            Stage(
                objective="transfer",
                steps=25,
                batch=2,
                optim=Optim(lr=1e-4, new_lr=2e-2, warmup=5, weight_decay=0.0),
                checkpoint_every=50,
            ),
            Stage(
                objective="distillation",
                steps=500,
                batch=2,
                trained="layers",
                text=0.0,
                optim=Optim(lr=1e-4, new_lr=2e-3, warmup=5, weight_decay=0.0),
                checkpoint_every=50,
            ),
        ),
        workers=TWO_CORES,
        eval_blocks=16,
    )


def smollm2_hybrid(*, model: Path = Path("HuggingFaceTB/SmolLM2-135M-Instruct")) -> Run:
    """SmolLM2-135M with softmax in 7 of its 30 layers, whose cache grows."""
    run = smollm2(model=model)
    assert run.linear is not None
    linear = tuple(layer for layer in range(LAYERS) if layer not in SOFTMAX)
    return replace(
        run,
        name="smollm2_hybrid",
        out=Path("runs/smollm2/hybrid"),
        linear=replace(run.linear, layers=linear),
    )
