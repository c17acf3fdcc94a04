"""What a training run is, as data: a student, maybe a teacher, stages, workers.

Knows settings and where files lie; knows nothing of Ray, DeepSpeed or how training goes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from linearized.config import LinearConfig
from linearized.errors import ConfigError, DataError
from linearized.speculative.drafters.layers import FILE as LAYERS
from linearized.training.objective import OBJECTIVES
from linearized.training.optim import Optim


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama to train from scratch."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    max_context: int = 65536

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "intermediate", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"hidden must be a multiple of 2 x heads (rotary pairs), got hidden={self.hidden}, "
                f"heads={self.heads}"
            )


@dataclass(frozen=True, kw_only=True)
class FlashShape:
    """A FLASH model to train from scratch; two of its layers are about one of a Llama's."""

    hidden: int
    layers: int
    head_dim: int = 128
    group: int = 256
    augment: bool = True
    taps: int = 32


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Medusa's heads on the teacher."""

    count: int = 4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"heads.count must be at least 1, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """So many steps towards one objective."""

    objective: str
    steps: int
    optim: Optim
    batch: int = 16
    """Blocks a step, over all workers."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; each stage ends with one whatever this is."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            choices = ", ".join(sorted(OBJECTIVES))
            raise ConfigError(f"unknown objective {self.objective!r}; choose from {choices}")
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who trains: one process a worker, all of ZeRO's ranks."""

    count: int = 2
    cpus: int = 1
    """Reserved by each worker; also its number of threads."""
    gpu: bool = False
    """On GPUs weights are bfloat16, with a copy in float32 that learns."""
    autocast: bool = False
    """Multiply in bfloat16 on CPUs, too, with weights in float32: several times as fast on some
    processors that have instructions for it (AVX512-BF16, AMX), slower on others."""
    zero: int = 2
    """ZeRO stage, 0 to 3."""
    max_failures: int = 1
    """How often a run is taken up again from its last checkpoint after a worker died."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.cpus < 1:
            raise ConfigError(f"workers need a count and cpus of at least 1, got {self}")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.autocast and self.gpu:
            raise ConfigError("autocast is for CPUs; with gpu=true weights are bfloat16 anyway")


BENCH = Workers(count=1, cpus=2, autocast=True, zero=0)
"""Of the recipes `bench`: two cores; one worker has nothing to share out."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    data: Path
    """What jobs.data wrote."""
    out: Path
    """Becomes a Hugging Face folder, or one of Medusa's heads."""
    student: Path | Shape | FlashShape | Heads
    linear: LinearConfig | None
    """How to linearize the student; None: it stays as it is."""
    teacher: Path | None
    stages: tuple[Stage, ...]
    workers: Workers
    seed: int = 0
    eval_blocks: int = 256
    """Held-out blocks that perplexity is measured on."""
    fresh: bool = field(default=False, compare=False, repr=False)
    """Start over even if this run has finished or left a checkpoint."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.batch % self.workers.count:
                raise ConfigError(
                    f"batch {stage.batch} must be a multiple of the {self.workers.count} workers"
                )

    def key(self) -> str:
        """Equal for runs with equal settings and equal inputs."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=8)
        for folder in self.inputs:
            if not folder.exists():
                raise DataError(
                    f"{self.name}: there is no {folder}; run the job that makes it first"
                )
            digest.update(stamp(folder))
        return digest.hexdigest()

    @property
    def inputs(self) -> list[Path]:
        """Folders that it reads."""
        student = self.student if isinstance(self.student, Path) else None
        return [folder for folder in (self.data, self.teacher, student) if folder is not None]

    def check_out(self) -> None:
        """What `out` holds is replaced.

        Raises:
            ConfigError: it holds what no training made, or is, or holds, what the run reads.
        """
        out = self.out.resolve()
        for folder in self.inputs:
            if out == folder.resolve() or out in folder.resolve().parents:
                raise ConfigError(
                    f"out={self.out} would replace {folder}, which {self.name} reads; choose "
                    "another out"
                )
        ours = (out / "run.json").exists() or (out / "training.json").exists()
        if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{self.out} exists and is not this job's; choose another out")

    @property
    def storage(self) -> Path:
        """Where Ray keeps the run's checkpoints."""
        return self.out.parent / "checkpoints" / self.out.name

    def absolute(self) -> Run:
        student = self.student.absolute() if isinstance(self.student, Path) else self.student
        teacher = None if self.teacher is None else self.teacher.absolute()
        return replace(
            self,
            data=self.data.absolute(),
            out=self.out.absolute(),
            student=student,
            teacher=teacher,
        )


def stamp(folder: Path) -> bytes:
    """Of what a folder was made of, if a job of ours made it; others may have put something beside
    that since, such as Medusa's heads. Else of its files, weights by their size."""
    for name in ("run.json", "data.json"):
        try:
            made = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(made, dict) and isinstance(made.get("key"), str):
            return str(made["key"]).encode()
    found = b""
    for file in sorted(folder.iterdir()):
        if file.name == LAYERS:
            continue
        if file.suffix == ".json":
            found += file.name.encode() + file.read_bytes()
        elif file.is_file():
            found += f"{file.name} {file.stat().st_size}".encode()
    return found
