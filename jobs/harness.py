"""Tasks of lm-evaluation-harness, which is installed apart (`pip install lm-eval`). Knows the
harness's calls; `harness_model.py` knows what it asks of a model.

    python -m jobs.evaluate quick model=path/to/model harness=[hellaswag,gsm8k]
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from linearized.errors import ConfigError, DataError

MISSING = (
    "harness tasks need lm-evaluation-harness; install it with `pip install lm-eval`, or leave "
    "`harness` out"
)


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_tokens: int = 4096,
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Numbers of each task, by the harness's own names (`acc,none`). `folder` holds tasks of one's
    own, as YAML files. `limit`: the first so many questions of each task. `shots`: examples before
    each question, None as the task has it.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
        DataError: it cannot get a task's data.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from jobs.harness_model import HarnessModel
    except ImportError as error:
        raise ConfigError(MISSING) from error
    with _quiet():
        manager = TaskManager(include_path=None if folder is None else str(folder))
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if unknown:
            raise ConfigError(
                f"lm-evaluation-harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them"
            )
        adapter = HarnessModel(model, tokenizer, batch_tokens=batch_tokens)
        try:
            found: Any = lm_eval.simple_evaluate(
                model=adapter, tasks=list(tasks), num_fewshot=shots, limit=limit,
                task_manager=manager, log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
        except (OSError, ConnectionError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"cannot get the data of {', '.join(tasks)}: {reason}") from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: Any) -> dict[str, float]:
    return {
        name: round(float(value), 5)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and the libraries that it brings warn of their own affairs."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
