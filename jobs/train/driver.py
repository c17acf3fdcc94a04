"""A run from its key to its result: starts workers under Ray Train, again where one has died."""

from __future__ import annotations

import json
import os
import re
import uuid
from typing import Any

from cluster.progress import note
from cluster.session import session
from jobs.run import Run
from jobs.train import checkpoints
from linearized.errors import JobError, LinearizedError
from linearized.training.tokenizer import check_tokenizer

_LOST = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out", re.IGNORECASE)
"""What a worker says when another one is gone."""


def fit(run: Run) -> dict[str, Any]:
    """Train, export to `run.out`, and return what `run.out/run.json` holds. A run that finished
    with the same settings and inputs is not repeated; one that was interrupted goes on.

    Raises:
        LinearizedError: what a worker refuses, as it says it.
        JobError: workers have failed more often than `run.workers.max_failures`, or in a way that
            would repeat.
    """
    run = run.absolute()
    run.check_out()
    key = run.key()
    for model in run.inputs:
        if model != run.data:
            check_tokenizer(run.data, model)
    root = run.checkpoints(key)
    report = run.out / "run.json"
    if run.fresh:
        checkpoints.clear(root)
    elif report.exists():
        done: dict[str, Any] = json.loads(report.read_text())
        if done.get("key") == key:
            note(f"{run.name}: reused {run.out}")
            return done
    # Ray gives its workers nice 15: beside anything else they would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with session(num_cpus=run.workers.count * run.workers.cpus):
        _say_what_is_missing(run)
        _try(run, key, root)
    checkpoints.clear(root)
    return dict(json.loads(report.read_text()))


def _try(run: Run, key: str, root: str) -> None:
    from ray.train import TrainingFailedError

    for left in reversed(range(run.workers.max_failures + 1)):
        try:
            _trainer(run, key, root).fit()
            return
        except TrainingFailedError as error:
            reasons = _reasons(error)
            for reason in reasons:
                if isinstance(reason, LinearizedError):
                    raise reason from None
            said = _first_line(reasons[0])
            if not left or not any(map(_may_pass, reasons)):
                raise JobError(
                    f"training {run.name} failed: {said}; what the last checkpoint holds is not "
                    "lost: run the same command again once the cause is gone",
                    job=run.name,
                    status="FAILED",
                ) from error
            note(f"{run.name}: a worker failed ({said}); goes on from the last checkpoint")


def _trainer(run: Run, key: str, root: str) -> Any:
    from ray.train import (
        CheckpointConfig,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
    )
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.train.worker import Task, work

    checkpoint, damaged = checkpoints.latest(root)
    for name in damaged:
        note(f"{run.name}: checkpoint {name} is damaged or of another version, and is passed over")
    if checkpoint is not None:
        at = checkpoint.position
        note(f"{run.name}: goes on after step {at.step} of {run.stages[at.stage].objective}")
    workers, attempt = run.workers, uuid.uuid4().hex[:8]
    return TorchTrainer(
        work,
        train_loop_config={
            "task": Task(run=run, key=key, root=root, attempt=attempt, checkpoint=checkpoint)
        },
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        # Checkpoints are ours, so Ray has none to take up a run from, and does not try again.
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"ray-{attempt}",
            storage_path=root,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            # Its controller would show a traceback of what a worker refuses, beside our one line.
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _say_what_is_missing(run: Run) -> None:
    import ray

    wanted = run.workers.count * run.workers.cpus
    there = ray.cluster_resources().get("CPU", 0)
    if there < wanted:
        note(f"{run.name}: waits for {wanted} CPUs, of which the cluster has {there:g} now")


def _reasons(error: Any) -> list[BaseException]:
    """What workers raised or died of; else what Ray itself stumbled over."""
    found = list(getattr(error, "worker_failures", {}).values())
    found = found or [getattr(error, "controller_failure", error)]
    return [getattr(reason, "_base_exc", reason) for reason in found]


def _may_pass(reason: BaseException) -> bool:
    """Might it go well another time? It would not if a worker's own code raised it."""
    from ray.exceptions import RayError

    return isinstance(reason, RayError) or bool(_LOST.search(str(reason)))


def _first_line(reason: BaseException) -> str:
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return f"{type(reason).__name__}: {lines[0] if lines else 'it says nothing'}"
