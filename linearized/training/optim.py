"""Parameter groups and the learning-rate curve. Knows no optimizer, no engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from linearized.errors import ConfigError
from linearized.models import new_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """AdamW, with linear warm-up and a cosine down to a tenth."""

    lr: float
    new_lr: float = 1e-2
    """For what linearizing added. It starts at zero, and under Adam a parameter moves at most
    lr × steps: at a fine-tuning rate it would starve."""
    warmup: int = 20
    """Steps."""
    weight_decay: float = 0.1
    """Of matrices; vectors and new parameters have none."""
    clip: float = 1.0
    """Gradient norm."""

    def __post_init__(self) -> None:
        for name in ("lr", "new_lr", "clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")

    def scale(self, step: int, steps: int) -> float:
        """What multiplies every group's learning rate at this step."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min((step - self.warmup) / max(steps - self.warmup, 1), 1.0)
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for torch and DeepSpeed optimizers, of what requires a gradient."""
        new = {id(p) for p in new_parameters(model)}
        trained = [p for p in model.parameters() if p.requires_grad]
        old = [p for p in trained if id(p) not in new]
        groups = [
            {
                "name": "matrices",
                "params": [p for p in old if p.ndim >= 2],
                "lr": self.lr,
                "weight_decay": self.weight_decay,
            },
            {
                "name": "vectors",
                "params": [p for p in old if p.ndim < 2],
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
