"""What every worker of a run does: build, train stage by stage, measure, export.

Batches are a pure function of the step, and a checkpoint holds all the rest that decides how
training goes on. So a run that is interrupted goes on with the same losses, also on another number
of workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from jobs.likelihood import negative_log_likelihood
from jobs.run import Heads, Run
from jobs.train import engine, lora, models
from jobs.train.checkpoints import Checkpoint, Position, Writer
from jobs.train.engine import MOMENTS, Engine
from jobs.train.export import export
from jobs.train.guard import Guard
from jobs.train.log import Log
from linearized.errors import ConfigError, DataError, LinearizedError, TrainingError
from linearized.evaluation import ablation
from linearized.training.batch import Batch
from linearized.training.blocks import Blocks
from linearized.training.objective import OBJECTIVES, chosen

EVALUATED = 8
"""Number of held-out blocks in a forward."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker is told."""

    run: Run
    key: str
    root: str
    """Folder or URI of the run's checkpoints."""
    attempt: str
    """Of all tries to do the run, another one each time."""
    checkpoint: Checkpoint | None
    """Where to go on."""


@dataclass(kw_only=True)
class State:
    """What a checkpoint holds beside tensors."""

    taken: int = 0
    """Steps of the stage that have changed weights."""
    skipped: int = 0
    recent: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    left_out: int = 0
    """Steps of all stages before this one that were left out."""
    perplexity: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """How long earlier tries have taken, up to their last checkpoint."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds by what they were spent on."""


def work(config: dict[str, Any]) -> None:
    """The function that Ray Train calls in every worker.

    Raises:
        LinearizedError: what cannot be helped by trying again.
    """
    from ray import train

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    try:
        Worker(config["task"], rank=rank, world=world, device=train.torch.get_device()).work()
    except LinearizedError:
        _say_no_more()
        raise
    except (ConnectionError, TimeoutError):  # another worker is gone
        raise
    except OSError as error:  # no room, no permission
        _say_no_more()
        raise DataError(f"cannot read or write {error.filename or 'a file'}: {error}") from error
    except torch.OutOfMemoryError as error:
        _say_no_more()
        raise TrainingError(
            "the GPU's memory is used up; set a smaller micro, checkpointing=true, or "
            "workers.zero=3"
        ) from error


class Worker:
    """One of `world` processes of a process group."""

    def __init__(self, task: Task, *, rank: int, world: int, device: torch.device) -> None:
        self.run, self.task = task.run, task
        self.rank, self.world = rank, world
        self.checkpoint = task.checkpoint
        self.state = State() if task.checkpoint is None else State(**task.checkpoint.state)
        self._earlier = self.state.seconds
        self._began = time.perf_counter()
        torch.set_num_threads(self.run.workers.cpus)
        torch.manual_seed(self.run.seed)
        engine.prepare()
        self.blocks = Blocks(self.run.data / "train")
        self.held_out = Blocks(self.run.data / "held_out")
        self.student, self.teacher = models.build(self.run, device)
        self.changed: set[int] = set()
        """Of the parameters that stages before this one have trained, their ids."""
        self.writer = Writer(task.root, rank=self.rank, world=self.world, attempt=task.attempt)

    def work(self) -> None:
        """Raises what `Engine`, `Guard` and `Writer` do."""
        if self.checkpoint is None:
            self._measure_before()
        first = 0 if self.checkpoint is None else self.checkpoint.position.stage
        for index in range(first, len(self.run.stages)):
            self._stage(index)
        self.writer.wait()
        found = self._measure_after()
        last = self.run.stages[-1].lora
        adapters = {} if last is None else lora.take_out(self.student, merge=last.merge)
        self.times("checkpoints", self.writer.seconds)
        done = {
            "name": self.run.name,
            "key": self.task.key,
            "seconds": round(self._seconds(), 1),
            "perplexity": self.state.perplexity,
            **found,
            "parameters": _count(self.student),
            "tokens": sum(self._tokens(index) for index in range(len(self.run.stages))),
            "left_out": self.state.left_out,
            "times": {name: round(spent, 2) for name, spent in self.state.times.items()},
            "losses": self.state.losses,
        }
        kept = {} if last is None or last.merge else adapters
        export(self.run, self.student, kept, done, first=self.rank == 0)
        torch.distributed.barrier()

    def _stage(self, index: int) -> None:
        """Train one stage, from where the checkpoint is, if it is of this stage."""
        stage, state = self.run.stages[index], self.state
        torch.manual_seed(_seed(self.run.seed, index, -1))  # adapters begin at random
        only = chosen(self.student, stage.trained)
        if stage.lora is not None:
            only = lora.put_in(self.student, stage.lora)
        saved, first = self.checkpoint, 0
        self.checkpoint = None
        if saved is not None:
            first = saved.position.step
            engine.put(self.student, self._noted(saved.tensors("value/")))
        with _recomputed(self.student, stage.checkpointing, self.run.workers.zero):
            objective = OBJECTIVES[stage.objective](
                self.student,
                self.teacher if OBJECTIVES[stage.objective].needs_teacher else None,
                text=stage.text,
                temperature=stage.temperature,
                only=only,
            )
            trainer = Engine(objective, stage, self.run.workers)
            if saved is not None:
                moments = {key: saved.tensors(f"{key}/") for key in MOMENTS}
                values = saved.tensors("value/")
                trainer.restore(steps=state.taken, values=values, moments=moments)
            self._steps(index, trainer, first)
            self.changed |= {id(parameter) for _, parameter in trainer.trained()}
            trainer.close()
        state.left_out += state.skipped
        state.taken, state.skipped, state.recent = 0, 0, []
        if stage.lora is not None and index + 1 < len(self.run.stages):
            self.changed |= lora.bases(self.student)
            lora.take_out(self.student, merge=True)

    def _steps(self, index: int, trainer: Engine, first: int) -> None:
        run, stage, state = self.run, self.run.stages[index], self.state
        guard = Guard(f"{run.name}: {stage.objective}", recent=state.recent, skipped=state.skipped)
        tokens = self._tokens(index) // stage.steps
        with Log(run, index, first=first, tokens=tokens, speaks=self.rank == 0) as log:
            for step in range(first, stage.steps):
                began = time.perf_counter()
                batch = self.blocks.batch(
                    step, batch_size=stage.batch, rank=self.rank, world_size=self.world,
                    seed=run.seed + index,
                )  # fmt: skip
                if stage.context is not None:
                    batch = batch.first(stage.context)
                self.times("data", time.perf_counter() - began)
                began = time.perf_counter()
                # Dropout is a function of the step, too.
                torch.manual_seed(_seed(run.seed, index, step * self.world + self.rank))
                scale = stage.optim.scale(step, stage.steps)
                found = trainer.step(batch, scale, guard.objection)
                self.times("steps", time.perf_counter() - began)
                log.step(step, found, trainer.rates()[0])
                if found.taken:
                    state.taken += 1
                    guard.done(found.loss)
                else:
                    guard.left_out(step, found.objection)
                state.recent, state.skipped = list(guard.recent), guard.skipped
                if (step + 1) % stage.checkpoint_every == 0 or step + 1 == stage.steps:
                    state.losses += log.losses
                    log.losses = []
                    self._save(Position(stage=index, step=step + 1), trainer)

    def _save(self, at: Position, trainer: Engine) -> None:
        began = time.perf_counter()
        wanted = self.changed | {id(parameter) for _, parameter in trainer.trained()}
        names = {n for n, p in self.student.named_parameters() if id(p) in wanted}
        tensors: dict[str, torch.Tensor] = {}
        sizes = [0] * self.world
        sources = [("value/", trainer.values(names))]
        sources += [(f"{key}/", trainer.moments(key)) for key in MOMENTS]
        for prefix, found in sources:
            for name, tensor in found:
                owner = sizes.index(min(sizes))
                sizes[owner] += tensor.numel()
                if owner == self.rank:
                    tensors[prefix + name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.times("checkpoints", time.perf_counter() - began)
        self.state.seconds = self._seconds()
        self.writer.save(at, asdict(self.state), tensors)

    def _noted(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        """The tensors; their parameters have been changed."""
        parameters = dict(self.student.named_parameters())
        for name, tensor in tensors:
            if name not in parameters or _shape(parameters[name]) != tensor.shape:
                raise DataError(
                    f"a checkpoint in {self.task.root} holds {name}, which this student does not "
                    "have; run with fresh=true"
                )
            self.changed.add(id(parameters[name]))
            yield name, tensor

    def _measure_before(self) -> None:
        began = time.perf_counter()
        if self.teacher is not None:
            self.state.perplexity["teacher"] = self._perplexity(self.teacher)
        if isinstance(self.run.student, Path):
            self.state.perplexity["before"] = self._perplexity(self.student)
        self.times("evaluation", time.perf_counter() - began)

    def _measure_after(self) -> dict[str, Any]:
        began = time.perf_counter()
        found: dict[str, Any] = {}
        if isinstance(self.run.student, Heads):
            found["accuracies"] = self._accuracies()
        else:
            self.state.perplexity["after"] = self._perplexity(self.student)
            for name, without in self._parts().items():
                with without():
                    self.state.perplexity[name] = self._perplexity(self.student)
        self.times("evaluation", time.perf_counter() - began)
        return found

    def _parts(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        """What the student can do without for a while: a score says little without its score then.
        Nothing, where its weights are shared out over workers."""
        student = self.student
        shared = any(hasattr(parameter, "ds_id") for parameter in student.parameters())
        if shared or not isinstance(student, PreTrainedModel):
            return {}
        return ablation.parts(student)

    def _perplexity(self, model: Any) -> float:
        """Of all workers together, each on its share of the held-out blocks."""
        totals = torch.zeros(2, dtype=torch.float64)
        with engine.reading(model, self.run.stages[-1], self.run.workers) as call:
            for batch, counts in self._share():
                found = call(lambda batch=batch: negative_log_likelihood(model, batch))
                totals += counts * torch.tensor(found, dtype=torch.float64)
        nats, count = self._summed(totals).tolist()
        return round(math.exp(nats / count), 4)

    def _accuracies(self) -> list[list[float]]:
        """[head][rank], how often a guess is what the target says, on held-out text."""
        heads: Any = self.student
        target: Any = self.teacher
        heads.eval()
        found = [
            counts * heads.right(target, batch.tokens.to(target.device))
            for batch, counts in self._share()
        ]
        sums = self._summed(torch.stack(found).sum(0))
        rates = sums[:, :-1] / sums[:, -1:]
        heads.accuracies = [[round(rate, 4) for rate in row] for row in rates.tolist()]
        return heads.accuracies  # type: ignore[no-any-return]

    def _share(self) -> Iterator[tuple[Batch, bool]]:
        """This worker's batches of the held-out blocks that are evaluated, and whether they count.
        All workers have equally many, since each may need the others to read one."""
        count = min(self.run.eval_blocks, len(self.held_out))
        spread = [i * len(self.held_out) // count for i in range(count)]  # over all documents
        mine = spread[self.rank :: self.world]
        for first in range(0, len(spread[:: self.world]), EVALUATED):
            rows = mine[first : first + EVALUATED]
            yield self.held_out.batch_of(rows or spread[:1]), bool(rows)

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Over all workers."""
        device = next(self.student.parameters()).device
        found = values.to(device)
        torch.distributed.all_reduce(found)
        return found

    def _tokens(self, index: int) -> int:
        """Number of tokens that a stage trains on."""
        stage = self.run.stages[index]
        return stage.steps * stage.batch * (stage.context or self.blocks.block)

    def _seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._began

    def times(self, name: str, seconds: float) -> None:
        self.state.times[name] = self.state.times.get(name, 0.0) + seconds


@contextlib.contextmanager
def _recomputed(student: nn.Module, wanted: bool, zero: int) -> Iterator[None]:
    """Layers are computed again in the backward pass, if that is wanted."""
    if not wanted:
        yield
        return
    if not getattr(student, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(student).__name__} cannot be trained with checkpointing=true")
    assert isinstance(student, PreTrainedModel)
    # What is recomputed is compared with what was there by shape, which ZeRO-3 takes away.
    _checkpointing(student, "enable")({"use_reentrant": zero == 3})
    if zero == 3:
        student.enable_input_require_grads()
    try:
        yield
    finally:
        _checkpointing(student, "disable")()
        if zero == 3:
            student.disable_input_require_grads()


def _checkpointing(student: PreTrainedModel, verb: str) -> Callable[..., None]:
    """What transformers 5.24 calls activation checkpointing was gradient checkpointing before."""
    found = getattr(student, f"activation_checkpointing_{verb}", None)
    method: Callable[..., None] = found or getattr(student, f"gradient_checkpointing_{verb}")
    return method


def _seed(seed: int, stage: int, place: int) -> int:
    return ((seed * 1_000_003 + stage) * 1_000_000_007 + place + 1) % 2**63


def _count(student: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _say_no_more() -> None:
    """Ray logs a traceback of whatever a worker raises. A refusal is said once, by the driver."""
    logging.getLogger("ray.train.v2._internal.util").disabled = True
