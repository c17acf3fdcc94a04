"""AdamW: settings, parameter groups, learning-rate curve, steps. Knows no loss and no engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearized.errors import ConfigError
from linearized.models import new_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """Settings of AdamW. The learning rate warms up linearly and then follows a cosine down to
    `floor`."""

    lr: float
    new_lr: float = 1e-2
    """Learning rate of the parameters that linearizing added. They start at zero, and Adam moves a
    parameter by at most lr × steps: a fine-tuning rate would hardly move them."""
    warmup: int = 20
    """Number of steps of the warm-up."""
    weight_decay: float = 0.1
    """Weight decay of matrices. Vectors and new parameters have none."""
    floor: float = 0.1
    """Share of the learning rate that is left at the end. 1 keeps it constant."""
    clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("lr", "new_lr", "clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must be from 0 to 1, got {self.floor}")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")

    def scale(self, step: int, steps: int) -> float:
        """The factor of every group's learning rate at this step, of `steps`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min((step - self.warmup) / max(steps - self.warmup, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for torch and DeepSpeed optimizers. They hold the parameters that
        require a gradient."""
        new = {id(p) for p in new_parameters(model)}
        trained = [p for p in model.parameters() if p.requires_grad]
        old = [p for p in trained if id(p) not in new]
        groups = [
            {
                "name": "matrices",
                "params": [p for p in old if _ndim(p) >= 2],
                "lr": self.lr,
                "weight_decay": self.weight_decay,
            },
            {
                "name": "vectors",
                "params": [p for p in old if _ndim(p) < 2],
                "lr": self.lr,
                "weight_decay": 0.0,
            },
            {
                "name": "new",
                "params": [p for p in trained if id(p) in new],
                "lr": self.new_lr,
                "weight_decay": 0.0,
            },
        ]
        return [group for group in groups if group["params"]]


class Descent:
    """AdamW in one process, over so many steps, with the rates of `Optim`."""

    def __init__(
        self,
        optim: Optim,
        model: nn.Module,
        steps: int,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._optim, self._steps, self._taken = optim, steps, 0
        self._optimizer = torch.optim.AdamW(optim.groups(model), betas=betas)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def clip(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Scale the gradients of these down to `Optim.clip`. Returns their norm before that."""
        return nn.utils.clip_grad_norm_(parameters, self._optim.clip)

    def step(self) -> None:
        """One step along the gradients that are there; then there are none."""
        scale = self._optim.scale(self._taken, self._steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        # Inside autocast, copies of the weights of before this step would be used on.
        torch.clear_autocast_cache()
        self._taken += 1


def _ndim(parameter: nn.Parameter) -> int:
    """DeepSpeed empties parameters that are shared out over workers and keeps their shape aside."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
