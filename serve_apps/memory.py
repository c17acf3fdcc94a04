"""What a replica needs of its machine's memory, worked out before anything is loaded. Knows models
without weights; knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from linearized.allocation import state_bytes
from linearized.errors import ConfigError
from linearized.folder import outline
from serve_apps.weights import DTYPES

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much a container may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes of models in one replica."""

    weights: int
    states: int

    @classmethod
    def of(cls, path: str, *, dtype: str, rows: int, max_context: int) -> Needs:
        """Of the model in this folder, with states for so many texts of so many tokens. Weights
        that are laid out once more are not counted: whether that is done is measured.

        Raises:
            ModelError: the folder's config makes no model, or one that decodes no text.
        """
        model = outline(path, dtype=DTYPES[dtype])
        return cls(
            weights=sum(weight.nbytes for weight in model.parameters()),
            states=rows * state_bytes(model, max_context),
        )

    def __add__(self, other: Needs) -> Needs:
        return Needs(weights=self.weights + other.weights, states=self.states + other.states)

    def check(self, name: str, *, device: str, remedy: str) -> None:
        """
        Raises:
            ConfigError: this machine has not that much.
        """
        needed, there = self.weights + self.states, available(device)
        if needed > there:
            place = "its GPU" if device == "cuda" else "this machine"
            raise ConfigError(
                f"{name}: a replica needs {_gb(needed)} GB, {_gb(self.weights)} of weights and "
                f"{_gb(self.states)} of states, and {place} has {_gb(there)}; {remedy}"
            )


def available(device: str) -> int:
    """Bytes that a process of this machine may have in all."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    limits = [int(text) for file in _LIMITS if (text := _read(file)).isdigit()]
    return min([psutil.virtual_memory().total, *limits])


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
