"""What a person sees of a stage while it trains: a line of progress, and TensorBoard files."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.progress import Progress, note
from jobs.run import Run
from jobs.train.engine import Step

EVERY = 10
"""Every so many steps the loss is kept for run.json."""


class Log:
    """Of one stage. Only the first worker says anything."""

    def __init__(self, run: Run, index: int, *, first: int, tokens: int, speaks: bool) -> None:
        """`first` is the step that comes first now, `tokens` the number of tokens in a step."""
        stage = run.stages[index]
        self._title = run.name if len(run.stages) == 1 else f"{run.name}: {stage.objective}"
        self._index, self._steps, self._first, self._tokens = index, stage.steps, first, tokens
        self._before = sum(stage.steps for stage in run.stages[:index])
        self._speaks = speaks
        self._progress = Progress(self._title, total=stage.steps, unit="steps", quiet=not speaks)
        self._board = _board(run.out, self._before + first) if speaks else None
        self._began = time.perf_counter()
        self.losses: list[list[float]] = []
        """[stage, step, loss, learning rate, tokens per second] of every few steps."""

    def __enter__(self) -> Self:
        self._progress.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._board is not None:
            self._board.close()
        self._progress.__exit__(kind, error, trace)

    def step(self, step: int, found: Step, rate: float) -> None:
        """`rate` is the learning rate of the student's own weights."""
        speed = (step + 1 - self._first) * self._tokens / (time.perf_counter() - self._began)
        memory = memory_gb()
        if found.taken and (step % EVERY == 0 or step + 1 == self._steps):
            self.losses.append([self._index, step, round(found.loss, 4), rate, round(speed)])
        if not found.taken and self._speaks:
            note(f"{self._title}: step {step} is left out: {found.objection}")
        self._progress.update(
            step + 1,
            loss=round(found.loss, 3),
            tokens_per_second=round(speed),
            memory=f"{memory:.1f} GB",
        )
        if self._board is not None:
            at = self._before + step
            for name, value in (
                ("loss", found.loss), ("learning_rate", rate), ("gradient_norm", found.norm),
                ("tokens_per_second", speed), ("memory_gb", memory),
            ):  # fmt: skip
                if value is not None:
                    self._board.add_scalar(name, value, at)


def memory_gb() -> float:
    """Of this worker: the most that its GPU has held, or what the process holds now."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return float(psutil.Process().memory_info().rss / 2**30)


def board_folder(out: Path) -> Path:
    return out.parent / "tensorboard" / out.name


def _board(out: Path, step: int) -> Any:
    """A writer that goes on at this step, as seen over all stages."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(board_folder(out)), purge_step=step, flush_secs=10)
