"""What a training run is, as data: a student, maybe a teacher, stages, workers.

Knows settings and where files lie; knows nothing of Ray, DeepSpeed or how training goes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linearized.config import LinearConfig
from linearized.errors import ConfigError, DataError
from linearized.speculative.drafters.layers import FILE as LAYERS
from linearized.training.objective import OBJECTIVES, TRAINED
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
class Lora:
    """Low-rank adapters in place of full weights, by PEFT. What linearizing added is trained in
    full beside them. (Hu et al., "LoRA", 2021.)"""

    rank: int = 8
    alpha: float = 16.0
    """The adapters' product is multiplied with alpha / rank."""
    modules: str | tuple[str, ...] = "auto"
    """Names of the linear layers that get adapters, such as `(q_proj, v_proj)`. "auto" means all
    but the output matrix."""
    merge: bool = True
    """Whether the weights of the result contain the adapters. Otherwise these lie in its folder
    `adapter`, in PEFT's format, and the weights are what they were before."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(
                f"lora.rank must be at least 1 and lora.alpha above 0, got {self.rank} and "
                f"{self.alpha}"
            )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A number of training steps with one objective."""

    objective: str
    steps: int
    optim: Optim
    batch: int = 16
    """Number of blocks in a step, over all workers."""
    micro: int | None = None
    """Number of blocks in one forward of one worker, whose gradients are added up over a step. null
    means batch / workers. It changes memory, and neither loss nor gradient."""
    context: int | None = None
    """Number of tokens of each block that are trained on, from its beginning. null means all."""
    trained: str = "all"
    """Which weights learn: `all`; `layers`, which leaves out the embeddings and the output matrix;
    or `attention`. Transfer trains attention in any case."""
    lora: Lora | None = None
    """null trains full weights."""
    checkpointing: bool = False
    """Whether layers are computed again in the backward pass instead of being kept in memory."""
    text: float = 0.5
    """Share of the cross-entropy on the text in `distillation`; the rest is the divergence from the
    teacher."""
    temperature: float = 1.0
    """By which the logits of teacher and student are divided in the divergence."""
    checkpoint_every: int = 1000
    """Number of steps between checkpoints. Every stage also ends with a checkpoint."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            choices = ", ".join(sorted(OBJECTIVES))
            raise ConfigError(f"unknown objective {self.objective!r}; choose from {choices}")
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.micro is not None and self.micro < 1:
            raise ConfigError(f"micro must be at least 1, got {self.micro}")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"context must be at least 2, got {self.context}")
        if not 0 <= self.text <= 1:
            raise ConfigError(f"text must be from 0 to 1, got {self.text}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")
        if self.trained not in TRAINED:
            raise ConfigError(f"trained must be one of {', '.join(TRAINED)}, got {self.trained!r}")
        if self.lora is not None and self.trained != "all":
            raise ConfigError(
                f"trained={self.trained} is about full weights; with lora, name lora.modules"
            )
        if self.lora is not None and self.objective == "medusa":
            raise ConfigError("Medusa's heads are new and small: train them without lora")

    def parts(self, workers: int) -> int:
        """Number of forwards in which each worker goes through its share of a step."""
        share = self.batch // workers
        return 1 if self.micro is None else share // min(self.micro, share)


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
    """How often a run is resumed from its last checkpoint after a worker has died. What a worker
    refuses, such as a wrong tokenizer, would be refused again, and ends the run at once."""

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
    storage: str | None = None
    """Folder, or URI such as `s3://bucket/runs`, for checkpoints. null means the folder
    `checkpoints` beside `out`. All nodes must see it."""
    fresh: bool = field(default=False, compare=False, repr=False)
    """Whether to start over even if this run has finished or left a checkpoint."""

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.batch % self.workers.count:
                raise ConfigError(
                    f"batch {stage.batch} must be a multiple of the {self.workers.count} workers"
                )
            share = stage.batch // self.workers.count
            if stage.micro is not None and share % min(stage.micro, share):
                raise ConfigError(
                    f"micro {stage.micro} must divide the {share} blocks of a worker (batch "
                    f"{stage.batch} on {self.workers.count} workers)"
                )
        for stage in self.stages[:-1]:
            if stage.lora is not None and not stage.lora.merge:
                raise ConfigError(
                    "lora.merge=false is for the last stage: another one would train on weights "
                    "without what was learned"
                )

    def key(self) -> str:
        """A hash that is equal for runs with equal settings and equal inputs. Where files lie, and
        on how many workers a run goes, does not matter: it may be taken up elsewhere."""
        settings = {
            "name": self.name,
            "student": None if isinstance(self.student, Path) else _settings(self.student),
            "teacher": self.teacher is not None,
            "linear": None if self.linear is None else self.linear.to_dict(),
            "stages": [_settings(stage, without=_NO_MATTER) for stage in self.stages],
            "gpu": self.workers.gpu,
            "autocast": self.workers.autocast,
            "seed": self.seed,
            "eval_blocks": self.eval_blocks,
        }
        text = json.dumps(settings, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8)
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

    def checkpoints(self, key: str) -> str:
        """Folder or URI of this run's checkpoints."""
        root = self.storage or str(self.out.parent / "checkpoints")
        return f"{root.rstrip('/')}/{self.out.name}-{key}"

    def absolute(self) -> Run:
        student = self.student.absolute() if isinstance(self.student, Path) else self.student
        teacher = None if self.teacher is None else self.teacher.absolute()
        return replace(
            self,
            data=self.data.absolute(),
            out=self.out.absolute(),
            student=student,
            teacher=teacher,
            storage=_absolute(self.storage),
        )


_NO_MATTER = ("micro", "checkpointing", "checkpoint_every")
"""Fields of a stage that do not change what it learns."""


def _settings(value: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A dataclass as JSON can hold it, with its type's name."""
    fields = dataclasses.asdict(value)
    kept = {name: fields[name] for name in fields if name not in without}
    return {"kind": type(value).__name__, **kept}


def _absolute(storage: str | None) -> str | None:
    return storage if storage is None or "://" in storage else str(Path(storage).absolute())


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
