"""What a code over workers promises: who computes what, what is sent, and from whom it is decoded.

`plan` says which parts of the work a worker does, `encode` makes one message of their results, and
`decode` gives the sum over all parts back from the messages of any worker set that is `enough`.
Who is missing is known (an erasure); messages that lie are another matter (`berrut_code`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class SumCode(Protocol):
    """A linear code for a sum over `parts` parts of the work. Frozen; arithmetic is float64."""

    @property
    def workers(self) -> int: ...

    @property
    def parts(self) -> int:
        """How many parts of equal size the work is cut into."""
        ...

    @property
    def tolerates(self) -> int:
        """How many workers, whichever they are, may be missing."""
        ...

    def plan(self, worker: int) -> tuple[int, ...]:
        """The parts that a worker computes."""
        ...

    def encode(self, worker: int, results: Tensor) -> Tensor:
        """One message [...] of the results [planned, ...] of a worker's parts, in plan's order."""
        ...

    def enough(self, ids: Sequence[int]) -> bool:
        """Whether the messages of these workers can be decoded."""
        ...

    def decode(self, ids: Sequence[int], messages: Tensor) -> Tensor:
        """The sum [...] over all parts, from messages [ids, ...] of these workers."""
        ...
