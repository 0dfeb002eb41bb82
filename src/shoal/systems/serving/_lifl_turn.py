"""What a gateway of LIFL does for one attempt at a round."""

from __future__ import annotations

import math

from shoal.parts.serving.aggregation_tree import AggregationTree
from shoal.systems.serving._lifl_wire import Plan


class Turn:
    """The tree, who has sent, and when it was."""

    def __init__(self, plan: Plan, fan_in: int, eager: bool, merge: int) -> None:
        self.plan = plan
        self.tree = AggregationTree(
            fan_in, eager=eager, expected=plan.goal, nodes=plan.nodes, merge=merge
        )
        self.clients: set[int] = set()
        self.partials: set[int] = set()
        self.first_s, self.last_s = math.inf, -math.inf
        self.leaf_s: list[float] = []
        self.delivered = False

    @property
    def number(self) -> tuple[int, int]:
        return self.plan.round, self.plan.attempt

    def span(self, first_s: float, last_s: float) -> None:
        """Updates arrived between these moments."""
        self.first_s, self.last_s = min(self.first_s, first_s), max(self.last_s, last_s)
