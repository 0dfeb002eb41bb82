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
from shoal.world.faults import Skew

if TYPE_CHECKING:
    from shoal.kernel.runtime import Runtime

_SLACK = 1000


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
        self._sweep_at = _SLACK

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
        if len(self._heap) >= self._sweep_at:
            self._sweep()
        heappush(self._heap, (at, self._sequence(), wait, runtime, local_ns))
        if at < self._armed_ns:
            self._arm(at)

    def _sweep(self) -> None:
        """Forget waits that were resolved before their time.

        Called when the heap has doubled since the last time, so that a timer costs constant time
        on average and the heap stays below twice the live waits plus `_SLACK`.
        """
        self._heap = [entry for entry in self._heap if not entry[2].done]
        heapify(self._heap)
        self._sweep_at = 2 * len(self._heap) + _SLACK

    def skew(self, peers: Collection[int], fault: Skew, begins: bool) -> None:
        """Change clocks; deadlines are times on a peer's clock, so its pending ones move."""
        now = self.now_ns()
        for peer in peers:
            clock = self._clocks.setdefault(peer, Clock())
            change = clock.skew if begins else clock.right
            change(now, round(fault.offset_s * 1e9), fault.drift)
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
            if not wait.done:
                self.fired += 1
                wait.expire()
                self._settle()
        self._rearm()
