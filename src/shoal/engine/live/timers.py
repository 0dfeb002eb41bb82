"""Deadlines of the peers of one process, on their own clocks, as one timer of the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic_ns
from typing import TYPE_CHECKING

from shoal.base.units import FOREVER
from shoal.kernel.waits import Wait
from shoal.world.clock import Clock

if TYPE_CHECKING:
    from shoal.kernel.runtime import Runtime


class Timers:
    """A heap of waits by the moment of the run, in nanoseconds since its announced start.

    The loop gets one timer, for the earliest of them: deadlines are set and dropped with every
    message, and a timer of the loop each would stay in its heap until it is due.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, settle: Callable[[], None]) -> None:
        self.start_ns = 0
        self.fired = 0
        self._loop = loop
        self._settle = settle
        self._heap: list[tuple[int, int, Wait, Runtime, int]] = []
        self._sequence = count().__next__
        self._clocks: dict[int, Clock] = {}
        self._handle: asyncio.TimerHandle | None = None
        self._armed_ns = FOREVER
        self._live = 0
        self._dead = 0

    def now_ns(self) -> int:
        """Time of the run, true on every peer."""
        return monotonic_ns() - self.start_ns

    def local_ns(self, peer: int) -> int:
        """Now, on a peer's clock."""
        clock = self._clocks.get(peer)
        now = monotonic_ns() - self.start_ns
        return now if clock is None else clock.local_ns(now)

    def loop_s(self, run_ns: int) -> float:
        """A moment of the run on the loop's clock."""
        return (self.start_ns + run_ns) / 1e9

    def set(self, runtime: Runtime, local_ns: int, wait: Wait) -> None:
        if local_ns >= FOREVER:
            return
        clock = self._clocks.get(runtime.id)
        at = local_ns if clock is None else clock.run_ns(local_ns)
        wait.timed = True
        self._live += 1
        heappush(self._heap, (at, self._sequence(), wait, runtime, local_ns))
        if at < self._armed_ns:
            self._arm(at)

    def dropped(self) -> None:
        """A timed wait was resolved before its time; its entry goes when enough others do."""
        self._live -= 1
        self._dead += 1
        if self._dead > self._live + 1000:
            self._heap = [entry for entry in self._heap if not entry[2].done]
            heapify(self._heap)
            self._dead = 0

    def skew(self, peers: Collection[int], offset_ns: int, drift: float) -> None:
        """Change clocks; deadlines are times on a peer's clock, so its pending ones move."""
        now = self.now_ns()
        for peer in peers:
            self._clocks.setdefault(peer, Clock()).skew(now, offset_ns, drift)
        self._heap = [
            (self._clocks[runtime.id].run_ns(local_ns), number, wait, runtime, local_ns)
            if runtime.id in peers
            else (at, number, wait, runtime, local_ns)
            for at, number, wait, runtime, local_ns in self._heap
        ]
        heapify(self._heap)
        self._rearm()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._heap.clear()

    def _arm(self, at: int) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._armed_ns = at
        self._handle = self._loop.call_at(self.loop_s(at), self._due)

    def _rearm(self) -> None:
        self._armed_ns = FOREVER
        if self._heap:
            self._arm(self._heap[0][0])

    def _due(self) -> None:
        # The loop may call a moment early; a deadline must not.
        now = self.now_ns()
        while self._heap and self._heap[0][0] <= now:
            wait = heappop(self._heap)[2]
            if wait.done:
                self._dead -= 1
            else:
                self._live -= 1
                self.fired += 1
                wait.expire()
                self._settle()
        self._rearm()
