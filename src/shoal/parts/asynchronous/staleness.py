"""How much a late work still counts, and from when on it does not count at all."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.base.errors import UsageError

DECAYS = ("constant", "polynomial", "hinge")
BEYOND = ("drop", "weigh")


@dataclass(frozen=True)
class Staleness:
    """Staleness counts the versions that were made between pull and push.

    decay: "constant" 1; "polynomial" (staleness + 1) ** -exponent; "hinge" 1 up to `start`, then
    1 / (exponent * (staleness - start) + 1). bound: the most that is taken (None = any); beyond it,
    "drop" leaves a work out, and "weigh" multiplies its weight by (bound + 1) / (staleness + 1).

    Breaks where versions are no measure of time: a server that makes a version per push ages works
    faster than one that collects ten.
    Source: Xie et al. 2019, section 5.2 (arXiv 1903.03934).

    >>> Staleness(decay="polynomial", exponent=0.5).weight(3)
    0.5
    >>> Staleness(bound=5).admits(6), Staleness(bound=1, beyond="weigh").weight(3)
    (False, 0.5)
    """

    bound: int | None = None
    beyond: str = "drop"
    decay: str = "constant"
    exponent: float = 0.5
    start: int = 0

    def __post_init__(self) -> None:
        if self.bound is not None and self.bound < 0:
            raise UsageError(f"staleness: bound={self.bound}; need 0 or more, or None for no bound")
        if self.beyond not in BEYOND or self.decay not in DECAYS:
            raise UsageError(
                f"staleness: beyond={self.beyond!r}, decay={self.decay!r}; need one of "
                f"{', '.join(BEYOND)} and one of {', '.join(DECAYS)}"
            )
        if not 0.0 <= self.exponent < float("inf") or self.start < 0:
            raise UsageError(
                f"staleness: exponent={self.exponent}, start={self.start}; need numbers >= 0"
            )

    def admits(self, staleness: int) -> bool:
        """Whether a work of this staleness is taken at all."""
        return self.bound is None or self.beyond == "weigh" or staleness <= self.bound

    def weight(self, staleness: int) -> float:
        """What a work of this staleness counts, in (0, 1]."""
        late = 1.0
        if self.bound is not None and staleness > self.bound:
            late = (self.bound + 1) / (staleness + 1)
        if self.decay == "polynomial":
            return late * float(staleness + 1) ** -self.exponent
        if self.decay == "hinge" and staleness > self.start:
            return late / (self.exponent * (staleness - self.start) + 1.0)
        return late
