"""Which steps are left out, and when that has been too many. Knows numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from linearized.errors import TrainingError

WINDOW = 32
"""Number of losses that a new one is compared with."""
SPIKE = 2.0
"""A loss above this times the largest of them is a spike."""
LIMIT = 5
"""After so many steps in a row that were left out, training ends."""


class Guard:
    """Watches the losses of one stage. A step whose loss is not finite, or a spike, must not reach
    the weights: one bad batch would cost what thousands have taught."""

    def __init__(self, title: str, *, recent: Iterable[float] = (), skipped: int = 0) -> None:
        """`recent` and `skipped` are those of an earlier guard of the stage."""
        self._title = title
        self.recent = deque(recent, maxlen=WINDOW)
        self.skipped = skipped
        """Number of steps that were left out."""
        self._in_a_row = 0

    def objection(self, loss: float) -> str | None:
        """Why a step of this loss is to be left out. None: it is not."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self.recent) == WINDOW and loss > SPIKE * max(self.recent):
            return f"the loss is {loss:.4g}, and was at most {max(self.recent):.4g} before"
        return None

    def done(self, loss: float) -> None:
        """A step was taken."""
        self.recent.append(loss)
        self._in_a_row = 0

    def left_out(self, step: int, reason: str) -> None:
        """A step was left out.

        Raises:
            TrainingError: too many were, one after another.
        """
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= LIMIT:
            raise TrainingError(
                f"{self._title}: {LIMIT} steps in a row were left out, up to step {step}: "
                f"{reason}; lower optim.lr and optim.new_lr, or raise optim.warmup. What the last "
                "checkpoint holds is not lost"
            )
