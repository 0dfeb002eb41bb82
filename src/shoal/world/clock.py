"""A peer's own clock: an affine map of the run's time, changed by `Skew` faults."""

from __future__ import annotations

from shoal.base.units import FOREVER


class Clock:
    """local = since_local + (run - since_run) * rate, in integer nanoseconds.

    >>> clock = Clock()
    >>> clock.skew(1000, 50, 0.0)
    >>> clock.local_ns(1000), clock.run_ns(1050)
    (1050, 1000)
    """

    __slots__ = ("_drift", "_local", "_run", "true")

    def __init__(self) -> None:
        self._run = 0
        self._local = 0
        self._drift = 0.0
        self.true = True

    def local_ns(self, run_ns: int) -> int:
        """What this clock shows at a moment of the run."""
        if self.true:
            return run_ns
        passed = run_ns - self._run
        return self._local + passed + round(passed * self._drift)

    def run_ns(self, local_ns: int) -> int:
        """The first moment of the run at which this clock shows at least `local_ns`."""
        if self.true or local_ns >= FOREVER:
            return local_ns
        passed = local_ns - self._local
        run = self._run + round(passed / (1.0 + self._drift))
        # Rounding may fall one nanosecond short; a deadline must never fire early.
        while self.local_ns(run) < local_ns:
            run += 1
        return run

    def skew(self, run_ns: int, offset_ns: int, drift: float) -> None:
        """From `run_ns` on: shifted by `offset_ns`, running at 1 + drift."""
        self._local = self.local_ns(run_ns) + offset_ns
        self._run = run_ns
        self._drift = drift
        self.true = False
