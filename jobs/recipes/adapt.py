"""Pretrained models of one's own, and those of the paper. Rates are such that a model keeps what it
knows: new parameters move a lot, its own little.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs.recipes.demo import Attention, Model
from jobs.run import FlashShape, Lora, Run, Stage, Workers
from linearized.config import LinearConfig
from linearized.training.optim import Optim

GPUS = Workers(count=8, cpus=8, gpu=True, zero=2)


def adapt(
    *,
    model: Model = Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
    attention: Attention = "anchored",
) -> Run:
    """A pretrained model of yours: attention transfer, then distillation of its layers."""
    linear = LinearConfig.named(attention)
    if attention == "anchored":  # docs/quality.md has what this keeps
        linear = replace(linear, window=7, augment=False)
    return Run(
        name="adapt",
        data=Path("runs/mine/data"),
        out=Path("runs/mine/target"),
        student=model,
        linear=linear,
        teacher=model,
        stages=(
            Stage(
                objective="transfer",
                steps=200,
                batch=8,
                micro=1,
                optim=Optim(lr=5e-4, new_lr=1e-2, warmup=10, weight_decay=0.0),
                checkpoint_every=50,
            ),
            Stage(
                objective="distillation",
                steps=100,
                batch=8,
                micro=1,
                optim=Optim(lr=1e-4, new_lr=2e-3, warmup=10, weight_decay=0.0),
                trained="layers",
                text=0.0,
                checkpoint_every=50,
            ),
        ),
        workers=Workers(),
        eval_blocks=32,
    )


def llama2_7b(*, model: Model = Path("meta-llama/Llama-2-7b-hf")) -> Run:
    """Llama 2 7B on eight GPUs, on rows of 4,096 tokens: 16M of transfer, 33M of distillation."""
    return _large("llama2_7b", model)


def llama2_13b(*, model: Model = Path("meta-llama/Llama-2-13b-hf")) -> Run:
    """Llama 2 13B, as llama2_7b, with weights shared out over the GPUs."""
    return _sharded(_large("llama2_13b", model))


def qwen3_8b(*, model: Model = Path("Qwen/Qwen3-8B")) -> Run:
    """Qwen3 8B, as llama2_7b, with weights shared out over the GPUs."""
    return _sharded(_large("qwen3_8b", model))


def llama2_7b_paper(*, model: Model = Path("meta-llama/Llama-2-7b-hf")) -> Run:
    """Llama 2 7B in the paper's setting: grouped, 1,000 steps of 64 x 4,096 tokens at 2e-5."""
    return _paper("llama2_7b_paper", model)


def llama2_13b_paper(*, model: Model = Path("meta-llama/Llama-2-13b-hf")) -> Run:
    """Llama 2 13B in the paper's setting, as llama2_7b_paper."""
    return _sharded(_paper("llama2_13b_paper", model))


def qwen3_8b_paper(*, model: Model = Path("Qwen/Qwen3-8B")) -> Run:
    """Qwen3 8B in the paper's setting, as llama2_7b_paper."""
    return _sharded(_paper("qwen3_8b_paper", model))


def flash_110m() -> Run:
    """FLASH from scratch as in the paper: 110M parameters, 256 rows of 1,024 tokens, 7e-4."""
    return Run(
        name="flash_110m",
        data=Path("runs/flash_110m/data"),
        out=Path("runs/flash_110m/model"),
        student=FlashShape(hidden=768, layers=24),
        linear=None,
        teacher=None,
        stages=(
            Stage(
                objective="next_token",
                steps=125_000,
                batch=256,
                micro=8,
                optim=Optim(lr=7e-4, new_lr=7e-4, warmup=4000, weight_decay=0.01),
            ),
        ),
        workers=GPUS,
    )


def _large(name: str, model: Path) -> Run:
    """Ours, for GPUs: `adapt` with so many tokens as LoLCATs has for models of this size, and
    low-rank changes, for which an optimizer needs little memory."""
    transfer, distillation = adapt().stages
    distillation = replace(distillation, trained="all", lora=Lora(), checkpointing=True)
    return replace(
        adapt(model=model),
        name=name,
        data=Path("runs") / name / "data",
        out=Path("runs") / name / "target",
        stages=(
            replace(transfer, steps=500, checkpoint_every=100),
            replace(distillation, steps=1000, checkpoint_every=100),
        ),
        workers=GPUS,
    )


def _paper(name: str, model: Path) -> Run:
    """The paper's setting: LoRA of rank 8, no transfer, no teacher, a constant rate of 2e-5 for new
    parameters, too. It also trains embeddings and norms, which LoRA leaves alone here."""
    return replace(
        _large(name, model),
        linear=LinearConfig(attention="grouped", augment=True),
        teacher=None,
        stages=(
            Stage(
                objective="next_token",
                steps=1000,
                batch=64,
                micro=1,
                optim=Optim(lr=2e-5, new_lr=2e-5, weight_decay=0.0, floor=1.0),
                lora=Lora(rank=8, alpha=16.0),
                checkpointing=True,
                checkpoint_every=100,
            ),
        ),
    )


def _sharded(run: Run) -> Run:
    return replace(run, workers=replace(run.workers, zero=3))
