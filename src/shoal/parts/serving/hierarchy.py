"""How many aggregators a node needs: the load that is expected, cut into leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.parts.serving.placement import Placement


@dataclass(frozen=True)
class NodePlan:
    """What one node runs. middle: it merges its leaves; top: it merges the nodes."""

    updates: int
    leaves: int
    middle: bool
    top: bool


@dataclass(frozen=True)
class Hierarchy:
    """Leaves, a middle per node and one top, planned from a smoothed load.

    The load of a node is how many updates it aggregates at once: by Little's law Q = k E, arrival
    rate times mean time per update, smoothed as Q <- a Q + (1 - a) k E. A node gets ceil(Q / I)
    leaves of `fan_in` I updates each, and a middle if it has more than one leaf; the top is on the
    busiest node. fan_in 2 gives the most parallelism. A load of None (nothing is known yet) counts
    as all updates at once.
    Source: LIFL (Qi et al. 2024), section on hierarchy planning.

    >>> Hierarchy(fan_in=2).leaves(7.0)
    4
    >>> round(Hierarchy().smoothed(0.0, rate_per_s=5.0, each_s=2.0), 9)
    3.0
    """

    fan_in: int = 2
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        if self.fan_in < 1:
            raise UsageError(f"Hierarchy: fan_in={self.fan_in}; need at least 1 update per leaf")
        if not 0 <= self.smoothing < 1:
            raise UsageError(
                f"Hierarchy: smoothing={self.smoothing}; need a share in [0, 1) for the past"
            )

    def smoothed(self, before: float | None, rate_per_s: float, each_s: float) -> float:
        """The load after another observation."""
        if not (rate_per_s >= 0 and each_s >= 0):
            raise UsageError(f"rate_per_s={rate_per_s}, each_s={each_s}; need numbers >= 0")
        now = rate_per_s * each_s
        return now if before is None else self.smoothing * before + (1 - self.smoothing) * now

    def leaves(self, load: float) -> int:
        """ceil(Q / I), and one at least where there is anything to do."""
        # Rounding of a smoothed load must not make a leaf of its own.
        return max(1, math.ceil(load / self.fan_in - 1e-9)) if load > 0 else 0

    def plan(self, updates: Sequence[int], loads: Sequence[float | None]) -> tuple[NodePlan, ...]:
        """The plan of every node. updates: how many each will get; loads: smoothed, per node."""
        top = max(range(len(updates)), key=lambda node: (updates[node], -node))
        plans = []
        for node, (count, load) in enumerate(zip(updates, loads, strict=True)):
            expected = count if load is None else min(max(load, 1e-6), count)
            leaves = self.leaves(float(expected)) if count else 0
            middle = count > self.fan_in
            plans.append(NodePlan(count, leaves, middle, node == top and count > 0))
        return tuple(plans)


def plan(
    load: int | Sequence[float], capacities: Sequence[float], policy: str = "best_fit",
    fan_in: int = 2,
) -> tuple[NodePlan, ...]:  # fmt: skip
    """Place a load of concurrent updates on nodes and plan each node's aggregators.

    load: how many updates, or their sizes; capacities: MC_i, see `Placement`.

    >>> [(node.updates, node.leaves, node.top) for node in plan(5, [4, 4])]
    [(4, 2, True), (1, 1, False)]
    """
    nodes = Placement(policy).assign(load, capacities)
    counts = [nodes.count(node) for node in range(len(capacities))]
    return Hierarchy(fan_in).plan(counts, [None] * len(capacities))
