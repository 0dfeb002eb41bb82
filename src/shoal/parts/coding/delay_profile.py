"""How long workers took in each round, and how long they would have taken with more or less work.

Recorded on a system in use or made from a `StragglerTrace`. A round's time is taken to be linear in
the load; `fitted` measures the slope from profiles of one system at several loads.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.base.errors import UsageError


@dataclass(frozen=True, eq=False)
class DelayProfile:
    """seconds: float64 [workers, rounds], at this `load` (fraction of the data per worker and
    round); slope: seconds that a whole data set would add.

    Assumes that the slope is the same for all workers and rounds: a slow one, whose time is a
    multiple, is given less time for more work than it takes.

    >>> profile = DelayProfile(np.array([[1.0, 1.5], [1.0, 9.0]]), load=0.1, slope=10.0)
    >>> profile.at(0.2).tolist()
    [[2.0, 2.5], [2.0, 10.0]]
    """

    seconds: np.ndarray
    load: float
    slope: float = 0.0

    def __post_init__(self) -> None:
        seconds = np.asarray(self.seconds, dtype=np.float64)
        object.__setattr__(self, "seconds", seconds)
        if seconds.ndim != 2 or 0 in seconds.shape:
            raise UsageError(
                f"DelayProfile: seconds of shape {list(seconds.shape)}; need [workers, rounds]"
            )
        if not (np.isfinite(seconds).all() and (seconds > 0).all()):
            raise UsageError("DelayProfile: seconds must be finite and above 0 (mend the trace)")
        if not (0 <= self.load <= 1 and 0 <= self.slope < np.inf):
            raise UsageError(
                f"DelayProfile: load={self.load}, slope={self.slope}; need a load of 0 to 1 and a "
                "slope of 0 or more"
            )

    @property
    def workers(self) -> int:
        return self.seconds.shape[0]

    @property
    def rounds(self) -> int:
        return self.seconds.shape[1]

    def at(self, load: float) -> np.ndarray:
        """The seconds [workers, rounds] with another load, never less than nothing."""
        return np.maximum(self.seconds + (load - self.load) * self.slope, 1e-9)

    def part(self, start: int, stop: int) -> DelayProfile:
        """The rounds from `start` up to `stop`, counted from 0."""
        return DelayProfile(self.seconds[:, start:stop], self.load, self.slope)

    @classmethod
    def fitted(cls, profiles: Sequence[DelayProfile]) -> DelayProfile:
        """The first profile with the slope of least squares through all mean round times.

        Means are of each worker's median, which stragglers of a few rounds do not move.
        """
        loads = np.array([profile.load for profile in profiles])
        if len(np.unique(loads)) < 2:
            raise UsageError(
                "DelayProfile.fitted: need profiles at two different loads or more (record another)"
            )
        times = np.array([np.median(profile.seconds, axis=1).mean() for profile in profiles])
        slope = float(np.polyfit(loads, times, 1)[0])
        return cls(profiles[0].seconds, profiles[0].load, max(0.0, slope))

    @classmethod
    def read(cls, path: str | Path, load: float, slope: float = 0.0) -> DelayProfile:
        """From a CSV file: a line per round, a number of seconds per worker, maybe a heading."""
        with Path(path).open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line]
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append([float(cell) for cell in line])
            except ValueError:
                if number > 1:
                    raise UsageError(
                        f"{path}, line {number}: {', '.join(line)!r} are no numbers (seconds, one "
                        "for each worker, are needed)"
                    ) from None
        if not rows or len({len(row) for row in rows}) != 1:
            raise UsageError(
                f"{path}: {len(rows)} lines of different length, or none; need a line per round "
                "with one number for each worker"
            )
        return cls(np.array(rows).T, load, slope)

    def write(self, path: str | Path) -> None:
        """As a CSV file, which `read` reads without loss."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([repr(v) for v in row] for row in self.seconds.T.tolist())
