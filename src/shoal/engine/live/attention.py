"""A clock for time-outs that counts only the time in which this process could have heard."""

from __future__ import annotations

import asyncio

_TICK_S = 0.05


class Attention:
    """Seconds in which the loop was there to hear others; it stands still while the loop is behind.

    A process that is held up (by its own work, by others on its cores, by a suspended machine) has
    not heard its peers for a while, and that says nothing about them. So each step of this clock is
    at most two of its ticks of 50 ms, however long the loop was away; a peer that answers nothing
    while this process listens is found out after the same time as ever.

    The loop hands out what has arrived before it looks at timers, so after a stall everything that
    came meanwhile is heard before the clock goes on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now_s = 0.0
        self.lag_s = 0.0
        """by how much the last tick was late"""
        self._loop = loop
        self._last_s = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Tick until `stop`."""
        if self._handle is None:
            self._last_s = self._loop.time()
            self._handle = self._loop.call_later(_TICK_S, self._tick)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        passed_s = self._loop.time() - self._last_s
        self._last_s += passed_s
        self.lag_s = max(0.0, passed_s - _TICK_S)
        self.now_s += min(passed_s, 2 * _TICK_S)
        self._handle = self._loop.call_later(_TICK_S, self._tick)
