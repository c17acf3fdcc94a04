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
    """Sizes of a Llama that is trained from scratch."""

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
    """Sizes of a FLASH model that is trained from scratch. Two of its layers correspond to about
    one of a Llama's."""

    hidden: int
    layers: int
    head_dim: int = 128
    group: int = 256
    augment: bool = True
    taps: int = 32


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Medusa's heads, as the student of a run. They are trained on the teacher."""

    count: int = 4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"heads.count must be at least 1, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A number of training steps with one objective."""

    objective: str
    steps: int
    optim: Optim
    batch: int = 16
    """Number of blocks in a step, over all workers."""
    checkpoint_every: int = 1000
    """Number of steps between checkpoints. Every stage also ends with a checkpoint."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            choices = ", ".join(sorted(OBJECTIVES))
            raise ConfigError(f"unknown objective {self.objective!r}; choose from {choices}")
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that train together. Each worker is one process and one of ZeRO's ranks."""

    count: int = 2
    cpus: int = 1
    """Number of cores that each worker reserves, and of threads that it uses."""
    gpu: bool = False
    """Whether each worker has a GPU. Weights are then bfloat16, with a float32 copy that the
    optimizer updates."""
    autocast: bool = False
    """Whether to multiply in bfloat16 on CPUs, with weights in float32. On some processors with
    bfloat16 instructions (AVX512-BF16, AMX) this is several times as fast, on others slower."""
    zero: int = 2
    """DeepSpeed's ZeRO stage, from 0 to 3."""
    max_failures: int = 1
    """How often a run is resumed from its last checkpoint after a worker has died."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.cpus < 1:
            raise ConfigError(
                "workers.count and workers.cpus must be at least 1, got "
                f"{self.count} and {self.cpus}"
            )
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.autocast and self.gpu:
            raise ConfigError("autocast is for CPUs; with gpu=true weights are bfloat16 anyway")


BENCH = Workers(count=1, cpus=2, autocast=True, zero=0)
"""The workers of the recipes `bench`: one worker with two cores. ZeRO would have nothing to share
out."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    data: Path
    """Folder that jobs.data wrote."""
    out: Path
    """Folder for the result: a Hugging Face model, or Medusa's heads."""
    student: Path | Shape | FlashShape | Heads
    linear: LinearConfig | None
    """How to linearize the student. None leaves it as it is."""
    teacher: Path | None
    stages: tuple[Stage, ...]
    workers: Workers
    seed: int = 0
    eval_blocks: int = 256
    """Number of held-out blocks on which perplexity is measured."""
    fresh: bool = field(default=False, compare=False, repr=False)
    """Whether to start over even if this run has finished or left a checkpoint."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.batch % self.workers.count:
                raise ConfigError(
                    f"batch {stage.batch} must be a multiple of the {self.workers.count} workers"
                )

    def key(self) -> str:
        """A hash that is equal for runs with equal settings and equal inputs."""
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
        """The folders that the run reads."""
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
        """Folder in which Ray keeps the run's checkpoints."""
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
    """Bytes that change when a folder's content does. A folder that one of our jobs made is
    identified by what it was made of, since other jobs may have put something beside that, such as
    Medusa's heads. Any other folder is identified by its files, weights by their size."""
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
