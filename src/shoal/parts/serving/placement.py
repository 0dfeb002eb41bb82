"""Which node takes which updates: bin packing over what nodes can still process at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.base.errors import UsageError

POLICIES = ("best_fit", "first_fit", "worst_fit", "round_robin")


@dataclass(frozen=True)
class Placement:
    """Updates to nodes with residual capacity RC_i = MC_i - k_i E_i.

    policy: "best_fit" fills the fullest node that still has room and opens another one only when
    none has, so that most traffic stays inside of few nodes; "first_fit" takes the first one with
    room; "worst_fit" the emptiest (least connections); "round_robin" the next one.
    Breaks when capacities are wrong: a node that is given more than it can do holds up the tree.
    Source: LIFL (Qi et al. 2024), section on locality-aware placement.

    >>> nodes = Placement("best_fit").assign(45, capacity=[20, 20, 20])
    >>> [nodes.count(node) for node in range(3)]
    [20, 20, 5]
    """

    policy: str = "best_fit"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"policy={self.policy!r}; need one of {', '.join(POLICIES)}")

    def assign(
        self, updates: int | Sequence[float], capacity: Sequence[float],
        load: Sequence[float] | None = None,
    ) -> tuple[int, ...]:  # fmt: skip
        """The node of each update, in their order; UsageError when one fits nowhere.

        updates: how many of size 1, or their sizes; capacity: MC_i, what node i can process at
        once; load: k_i E_i, what it is busy with already (None = nothing).
        """
        sizes = [1.0] * updates if isinstance(updates, int) else list(updates)
        busy = [0.0] * len(capacity) if load is None else list(load)
        if len(busy) != len(capacity) or any(size < 0 for size in sizes):
            raise UsageError(
                f"{len(busy)} loads of {len(capacity)} nodes, sizes from {min(sizes, default=0)}; "
                "need a load for each node and sizes of 0 or more"
            )
        room = [most - now for most, now in zip(capacity, busy, strict=True)]
        is_open = [now > 0 for now in busy]
        nodes: list[int] = []
        for size in sizes:
            fit = [node for node, left in enumerate(room) if left >= size]
            if not fit:
                raise UsageError(
                    f"update {len(nodes)} of size {size:g} fits no node: {sum(room):g} of "
                    f"{sum(capacity):g} are free (raise capacity, or take fewer updates at once)"
                )
            node = self._choose(fit, room, is_open, nodes[-1] if nodes else -1)
            room[node] -= size
            is_open[node] = True
            nodes.append(node)
        return tuple(nodes)

    def _choose(self, fit: list[int], room: list[float], is_open: list[bool], last: int) -> int:
        if self.policy == "first_fit":
            return fit[0]
        if self.policy == "worst_fit":
            return max(fit, key=lambda node: (room[node], -node))
        if self.policy == "round_robin":
            return min(fit, key=lambda node: (node - last - 1) % len(room))
        return min(fit, key=lambda node: (not is_open[node], room[node], node))
