"""Which stragglers a scheme can do without, round by round: sets as bits of an integer.

Whatever a tolerance admits, a smaller set is admitted, too. A round in which everybody is waited
for counts as one without stragglers.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol


class Tolerance(Protocol):
    """What happened so far, as far as it matters; made anew for every run."""

    def admits(self, late: int) -> bool:
        """Whether this round may go on without the workers whose bits are set."""
        ...

    def advance(self, late: int) -> None:
        """The round ended without these workers, which `admits` allowed."""
        ...


class AllButOne:
    """Nobody is waited for but the first one."""

    def __init__(self, workers: int) -> None:
        self._everybody = (1 << workers) - 1

    def admits(self, late: int) -> bool:
        return late != self._everybody

    def advance(self, late: int) -> None:
        pass


class AtMost:
    """A number of stragglers in each round, whatever the other rounds were."""

    def __init__(self, count: int) -> None:
        self._count = count

    def admits(self, late: int) -> bool:
        return late.bit_count() <= self._count

    def advance(self, late: int) -> None:
        pass


class Covered:
    """Groups of `copies` neighbouring workers do the same: of each somebody must be there."""

    def __init__(self, workers: int, copies: int) -> None:
        group = (1 << copies) - 1
        self._groups = [group << first for first in range(0, workers, copies)]

    def admits(self, late: int) -> bool:
        return all(late & group != group for group in self._groups)

    def advance(self, late: int) -> None:
        pass


class Bursty:
    """The (B, W, lambda)-bursty model: see `admits`."""

    def __init__(self, burst: int, window: int, most: int) -> None:
        self._burst, self._most = burst, most
        self._past: deque[int] = deque([0] * (window - 1), maxlen=window - 1)

    def admits(self, late: int) -> bool:
        """Whether the last W rounds have at most lambda different stragglers, and no straggler of
        this round was one B or more rounds ago within the window."""
        seen = early = 0
        # From the newest round (1 ago) to the oldest one (W - 1 ago).
        for ago, past in enumerate(reversed(self._past), 1):
            seen |= past
            if ago >= self._burst:
                early |= past
        return not late & early and (seen | late).bit_count() <= self._most

    def advance(self, late: int) -> None:
        self._past.append(late)


class Repeating:
    """The bursty model where only rounds count for which the base code alone is not enough.

    Such rounds have more than `spare` stragglers, or repeats for an earlier round. The others ask
    nothing of later rounds, so that they count as rounds without stragglers.
    """

    def __init__(self, burst: int, window: int, most: int, spare: int, jobs: int) -> None:
        self._bursty = Bursty(burst, window, most)
        self._burst, self._spare, self._jobs = burst, spare, jobs
        self._round = 1
        self._owed: dict[int, int] = {}

    @property
    def repeats(self) -> int:
        """How many workers repeat a task of an earlier job in this round."""
        return self._owed.get(self._round, 0)

    def admits(self, late: int) -> bool:
        return self._suffices(late) or self._bursty.admits(late)

    def advance(self, late: int) -> None:
        self._bursty.advance(0 if self._suffices(late) else late)
        # Who repeats is not late where the model holds, so nobody is counted twice.
        missing = late.bit_count() + self._owed.pop(self._round, 0)
        if self._round <= self._jobs and missing > self._spare:
            self._owed[self._round + self._burst] = missing - self._spare
        self._round += 1

    def _suffices(self, late: int) -> bool:
        return not self.repeats and late.bit_count() <= self._spare
