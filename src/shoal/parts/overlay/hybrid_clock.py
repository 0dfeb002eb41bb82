"""Time stamps that respect causality even when machines' clocks differ: hybrid logical clocks.

A stamp is (time_ns, count): the largest physical time that its maker had seen, its own or that of
another, and a counter for events within that time. If one event may have caused another, its stamp
is smaller, and stamps stay as close to physical time as clocks are to each other.
Source: Kulkarni et al. 2014, Logical Physical Clocks, figure 5.
"""

from __future__ import annotations

from dataclasses import dataclass

Stamp = tuple[int, int]
"""(time_ns, count), compared in this order."""

MOST_COUNT = (1 << 31) - 1
_BEFORE_ALL = -(1 << 62)


@dataclass(frozen=True)
class HybridClock:
    """The last stamp made or seen; every step makes a new clock.

    time_ns, count: that stamp. The physical time is handed in, so that a program uses its peer's
    clock, which may be skewed and may jump back. A stamp from the far future would drag every clock
    along: refuse those that `too_far` names before `observed` takes them in.

    >>> clock = HybridClock().tick(1000)
    >>> clock = clock.observed((5000, 3), now_ns=1001)
    >>> clock.stamp, clock.tick(1002).stamp, clock.tick(9000).stamp
    ((5000, 4), (5000, 5), (9000, 0))
    """

    time_ns: int = _BEFORE_ALL
    count: int = 0

    @property
    def stamp(self) -> Stamp:
        """The last stamp made or seen."""
        return self.time_ns, self.count

    def tick(self, now_ns: int) -> HybridClock:
        """After an event of one's own: its `stamp` is larger than all before."""
        if now_ns > self.time_ns:
            return HybridClock(now_ns, 0)
        return self._after(self.time_ns, self.count)

    def observed(self, stamp: Stamp, now_ns: int) -> HybridClock:
        """After an event that another stamped: larger than both clocks."""
        time_ns, count = max(stamp, self.stamp)
        if now_ns > time_ns:
            return HybridClock(now_ns, 0)
        return self._after(time_ns, count)

    def seen(self, stamp: Stamp) -> HybridClock:
        """Not smaller than `stamp`: like `observed`, where taking a message is no event itself."""
        return self if stamp <= self.stamp else HybridClock(*stamp)

    @staticmethod
    def too_far(stamp: Stamp, now_ns: int, ahead_ns: int) -> bool:
        """Whether a stamp lies more than `ahead_ns` after this peer's physical time."""
        return stamp[0] > now_ns + ahead_ns

    @staticmethod
    def _after(time_ns: int, count: int) -> HybridClock:
        # The counter is bounded on the wire; past its end the next nanosecond begins.
        if count >= MOST_COUNT:
            return HybridClock(time_ns + 1, 0)
        return HybridClock(time_ns, count + 1)
