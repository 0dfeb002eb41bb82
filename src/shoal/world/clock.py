"""A peer's own clock: an affine map of the run's time, changed by `Skew` faults."""

from __future__ import annotations

from shoal.base.units import FOREVER


class Clock:
    """local = since_local + (run - since_run) * rate, in integer nanoseconds.

    Several skews add their offsets and multiply their rates; `right` takes one of them back, with
    what it had drifted meanwhile, so that a clock without skews shows the run's time again.

    >>> clock = Clock()
    >>> clock.skew(1000, 50, 0.0)
    >>> clock.local_ns(1000), clock.run_ns(1050)
    (1050, 1000)
    >>> clock.right(2000, 50, 0.0)
    >>> clock.local_ns(2000)
    2000
    """

    __slots__ = ("_drift", "_local", "_run", "_skews", "true")

    def __init__(self) -> None:
        self._run = 0
        self._local = 0
        self._drift = 0.0
        self._skews: list[tuple[int, float, int]] = []
        self.true = True

    def local_ns(self, run_ns: int) -> int:
        """What this clock shows at a moment of the run."""
        if self.true:
            return run_ns
        passed = run_ns - self._run
        return self._local + passed + round(passed * self._drift)

    def run_ns(self, local_ns: int) -> int:
        """The first moment of the run, since the last change, at which this clock shows at least
        `local_ns`."""
        if self.true or local_ns >= FOREVER:
            return local_ns
        passed = local_ns - self._local
        run = self._run + round(passed / (1.0 + self._drift))
        # Rounding may miss by a few nanoseconds; a deadline must fire neither early nor late.
        while self.local_ns(run) < local_ns:
            run += 1
        while self.local_ns(run - 1) >= local_ns:
            run -= 1
        return run

    def skew(self, run_ns: int, offset_ns: int, drift: float) -> None:
        """From `run_ns` on: shifted by `offset_ns`, running 1 + drift times as fast."""
        self._skews.append((offset_ns, drift, run_ns))
        self._change(run_ns, offset_ns)

    def right(self, run_ns: int, offset_ns: int, drift: float) -> None:
        """Take back the oldest skew of this offset and drift."""
        known = [(offset, rate) for offset, rate, _ in self._skews]
        number = known.index((offset_ns, drift))
        _, _, since = self._skews.pop(number)
        if not self._skews:
            self._run = self._local = 0
            self._drift = 0.0
            self.true = True
            return
        self._change(run_ns, -offset_ns - round((run_ns - since) * drift))

    def _change(self, run_ns: int, step_ns: int) -> None:
        self._local = self.local_ns(run_ns) + step_ns
        self._run = run_ns
        rate = 1.0
        for _, drift, _ in self._skews:
            rate *= 1.0 + drift
        self._drift = rate - 1.0
        self.true = False
