"""Waking tasks of the same peer: what a program has in place of a condition variable."""

from __future__ import annotations

from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle

# A clock of nanoseconds may show slightly less than the moment slept for.
_TICK_S = 1e-8


class Signal:
    """`await wait(until_s)` sleeps until then, or until somebody calls `fire`.

    Nothing is remembered: whoever waits looks at what it waits for first, and again afterwards.
    Between that look and the wait nobody else runs, so no signal is missed.
    """

    __slots__ = ("_group", "_peer", "_sleepers")

    def __init__(self, peer: Peer, group: TaskGroup) -> None:
        self._peer = peer
        self._group = group
        self._sleepers: list[TaskHandle] = []

    async def wait(self, until_s: float) -> None:
        """Until `fire`, or until the clock shows this moment or more."""
        sleeper = self._group.start(self._peer.sleep_until(until_s + _TICK_S), isolate=True)
        self._sleepers.append(sleeper)
        try:
            await sleeper.join()
        finally:
            sleeper.cancel()

    def fire(self) -> None:
        """Wake everybody who waits now."""
        sleepers, self._sleepers = self._sleepers, []
        for each in sleepers:
            each.cancel()
