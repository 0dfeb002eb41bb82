"""In which order each microbatch passes the stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.base.errors import UsageError


@dataclass(frozen=True)
class SwapSchedule:
    """Stages 1 to `stages`, and `micro` microbatches per iteration, numbered from 0.

    swaps: every second microbatch takes the first two stages and the last two in exchanged order
    (2, 1, 3, ..., L, L-1), so that each of the four learns to act as its partner. Microbatches from
    `micro` on are for evaluation and take the normal order.

    Source: Blagoev et al. 2025 (arXiv 2506.15461), the out-of-order pipeline of CheckFree+.

    >>> SwapSchedule(stages=6, micro=2, swaps=True).order(1)
    (2, 1, 3, 4, 6, 5)
    """

    stages: int
    micro: int = 2
    swaps: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"stages": 6, "micro": 4, "swaps": True},)

    def __post_init__(self) -> None:
        if self.stages < 1 or self.micro < 1:
            raise UsageError(
                f"swap_schedule: stages={self.stages}, micro={self.micro}; need at least 1"
            )
        if self.swaps and (self.stages < 4 or self.micro < 2):
            raise UsageError(
                f"swap_schedule: stages={self.stages}, micro={self.micro} with swaps; need "
                "4 stages (two pairs) and 2 microbatches (one of each order) or more"
            )

    def swapped(self, micro: int) -> bool:
        """Whether a microbatch takes the exchanged order."""
        return self.swaps and micro < self.micro and micro % 2 == 1

    def order(self, micro: int) -> tuple[int, ...]:
        """The stages in the order in which a microbatch passes them forwards."""
        if not self.swapped(micro):
            return tuple(range(1, self.stages + 1))
        middle = range(3, self.stages - 1)
        return (2, 1, *middle, self.stages, self.stages - 1)

    def partner(self, stage: int) -> int | None:
        """Whose place a stage has learned to take; None where it has none."""
        if not self.swaps:
            return None
        last = self.stages
        return {1: 2, 2: 1, last - 1: last, last: last - 1}.get(stage)
