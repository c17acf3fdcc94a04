"""Every error that this project raises on purpose. Knows nothing of HTTP or exit codes.

LinearizedError
├── ConfigError        a setting has a value that cannot work
├── ModelError         a model cannot be linearized, loaded or driven as asked
├── StateError         a decode state does not fit the model or call it is given to
├── DataError          a corpus, tokenizer, checkpoint or file of blocks cannot be read or written
├── TrainingError      training cannot go on: its loss is not finite, or its memory is used up
├── RequestError       one generation request cannot be served (carries the parameter's name)
├── ClusterError       a Ray cluster did not start, answer or end
└── JobError           a submitted job failed (carries its name, status and last log lines)
"""

from __future__ import annotations

from collections.abc import Sequence


class LinearizedError(Exception):
    """Base of the tree. Its message is one sentence for the user: the value and the remedy."""


class ConfigError(LinearizedError, ValueError):
    pass


class ModelError(LinearizedError):
    pass


class StateError(LinearizedError):
    pass


class DataError(LinearizedError):
    pass


class TrainingError(LinearizedError):
    pass


class RequestError(LinearizedError):
    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ClusterError(LinearizedError):
    pass


class JobError(LinearizedError):
    def __init__(self, message: str, *, job: str, status: str, tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.job = job
        self.status = status
        self.tail = tuple(tail)
