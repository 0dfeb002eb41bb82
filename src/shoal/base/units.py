"""Virtual time is an integer of nanoseconds inside and a float of seconds outside."""

from __future__ import annotations

import math

from shoal.base.errors import UsageError

NANOSECONDS = 1_000_000_000
FOREVER = (1 << 62) - 1


def to_ns(time_s: float) -> int:
    """Seconds to nanoseconds, rounded to nearest; infinity becomes FOREVER.

    >>> to_ns(1.5)
    1500000000
    """
    if -4e9 < time_s < 4e9:
        return round(time_s * NANOSECONDS)
    if math.isnan(time_s):
        raise UsageError("time: nan is no time (compute the deadline from peer.now())")
    return FOREVER if time_s > 0 else -FOREVER


def to_s(time_ns: int) -> float:
    """Nanoseconds to seconds; FOREVER becomes infinity."""
    if -FOREVER < time_ns < FOREVER:
        return time_ns / NANOSECONDS
    return math.inf if time_ns > 0 else -math.inf
