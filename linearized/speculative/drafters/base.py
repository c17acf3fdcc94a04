"""Who guesses how a text goes on. A guess changes the speed and never the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import ref

from transformers import PreTrainedModel

from linearized.config import is_whole
from linearized.errors import ConfigError
from linearized.speculative.drafters.foresight import Foresight
from linearized.speculative.pool import Pool
from linearized.speculative.text import Text
from linearized.speculative.tree import TokenTree

Trust = Callable[[float, int], float]
"""How often a guess is right that the drafter finds so probable, and the first, second, … best."""


def as_said(step: float, rank: int) -> float:
    """As probable as the drafter says."""
    return step


def check_sizes(**sizes: int) -> None:
    """Raises ConfigError for one that is no number of guesses."""
    for name, size in sizes.items():
        if not is_whole(size) or size < 1:
            raise ConfigError(f"a drafter's {name} must be at least 1, and whole, got {size!r}")


@dataclass(frozen=True, slots=True)
class Ask:
    """For a tree on top of a text."""

    text: Text
    depth: int
    """Levels, at most."""
    nodes: int
    """At most."""
    follow: float = 0.0
    """A guess whose whole path is less likely right than this is not worth the time to follow it
    any further; it may be a leaf."""
    trust: Trust = as_said
    """How often a guess is right, given that all before it are."""
    worth: tuple[float, ...] | None = None
    """Seconds that it is worth to wait for the first level of its tree, for the second, …; None: as
    long as it takes."""


class Drafter(ABC):
    """Remembers what it likes of texts, and can always rebuild it from their tokens."""

    depth: int
    """Beyond which it has no guesses."""
    needs_hidden: ClassVar[bool] = False
    """Does it read `Text.hidden`?"""
    steady: ClassVar[bool] = True
    """Does it take about as long each time? One that works beside the target is there at once, or
    has to be waited for."""

    @abstractmethod
    def propose(self, asks: Sequence[Ask]) -> list[TokenTree]:
        """A tree each, maybe an empty one. A text has grown since the last time it was asked for,
        maybe by more than what was guessed."""

    def foresee(
        self, foresights: Sequence[Foresight], depths: Sequence[int], *, wide: bool = False
    ) -> None:
        """Look one step further ahead for each text, so many levels at most. Whoever asks does so
        again until `Foresight.seen` says that there is nothing more to see, and texts may go on in
        between. `wide`: nobody waits for it, so look behind as many guesses as is cheapest for
        each."""
        new = [(known, depth) for known, depth in zip(foresights, depths, strict=True) if depth]
        asks = [Ask(known.text, depth, known.most) for known, depth in new]
        for (known, _), tree in zip(new, self.propose(asks) if asks else [], strict=True):
            known.replace(tree)

    def serves(self, text: Text) -> bool:
        """May it guess for this text, and is it able to?"""
        return True

    @property
    def identity(self) -> Hashable:
        """Equal for drafters that guess alike: what was learnt of one holds for the other. No
        drafter is like another, unless its class says so."""
        return ref(self)

    def join(self, model: PreTrainedModel, pool: Pool[Text]) -> None:
        """It will draft for this target, whose states of the texts are in `pool`."""
        return

    def forget(self, text: Text) -> None:
        """The text has ended."""
        return
