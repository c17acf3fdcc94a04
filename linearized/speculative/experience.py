"""What was learnt of decoding with a model on this machine: what rounds take, and what drafters are
worth. Knows no texts: it outlives the engine in which it was learnt.
"""

from __future__ import annotations

from collections.abc import Hashable

from linearized.speculative.costs import Clock, Costs
from linearized.speculative.drafters.base import Drafter
from linearized.speculative.planner import Planner

MOST = 64
"""Drafters that are remembered."""


class Experience:
    """Of engines with as many rows and nodes, one after the other; not of two at a time."""

    def __init__(self, costs: Costs) -> None:
        self.clock = Clock(costs)
        self._planners: dict[Hashable, Planner] = {}

    def knows(self, drafter: Drafter) -> bool:
        return drafter.identity in self._planners

    def planner(self, drafter: Drafter, max_nodes: int) -> Planner:
        """The one that knows this drafter, or one alike."""
        identity = drafter.identity
        if identity not in self._planners:
            while len(self._planners) >= MOST:
                del self._planners[next(iter(self._planners))]
            self._planners[identity] = Planner(
                self.clock,
                max_depth=drafter.depth,
                max_nodes=max_nodes,
                steady=drafter.steady,
            )
        return self._planners[identity]
