"""Faults of a live run: what happens to the peers of this process, and when.

Every process of a run has the whole list and keeps its own time, so nothing has to be agreed on
but rounds: the process whose peer enters a round first tells the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.base.units import to_ns
from shoal.engine.fault_schedule import Action, FaultSchedule
from shoal.world.faults import Crash, Fault, Hold, Join, Leave, Skew, Slow

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver


def check_faults(faults: Iterable[Fault]) -> None:
    """Refuse what a real machine cannot do."""
    for fault in faults:
        if isinstance(fault, Slow) and fault.factor < 1.0:
            raise UsageError(
                f"slow: factor={fault.factor}; on real sockets a peer can only be slowed down "
                "(factor >= 1), or run on the event engine"
            )


class Schedule(FaultSchedule):
    """The fault list of one run, in progress, as far as it concerns one driver."""

    def __init__(self, driver: Driver, faults: tuple[Fault, ...]) -> None:
        super().__init__(faults)
        self._driver = driver
        self._entered = -1
        self._handles: list[asyncio.TimerHandle] = []

    def stop(self) -> None:
        for handle in self._handles:
            handle.cancel()

    def awaits(self, round: int) -> bool:
        """Whether entering this round is news that something is tied to."""
        return round > self._entered and super().awaits(round)

    def entered(self, round: int, *, running: bool = False) -> None:
        """A peer entered a round; what is tied to it, or to one that was skipped, happens.

        running: called from inside a program's step, where links and devices may change at once
        (so that it holds for the first message of the round, as in simulation), but no program may
        begin or be closed.
        """
        self._entered = max(self._entered, round)
        while super().awaits(round):
            number, action = self._next()
            if running and isinstance(self._faults[number], Crash | Join | Leave):
                self._driver.loop.call_soon(action, number)
            else:
                action(number)

    # What peers of other processes do, those of this one must know.

    def _crash(self, number: int, fault: Crash) -> None:
        super()._crash(number, fault)
        self._driver.delivery.forget(fault.who)

    def _restart(self, fault: Crash) -> None:
        super()._restart(fault)
        self._driver.expect(fault.who)

    def _join(self, fault: Join) -> None:
        super()._join(fault)
        self._driver.expect(fault.who)

    def _own(self, fault: Fault) -> list[int]:
        return [peer for peer in fault.who if peer in self._driver.runtimes]

    def _at(self, time_s: float, action: Action, number: int) -> None:
        self._call(self._driver.timers.loop_s(to_ns(time_s)), lambda: action(number))

    def _call(self, loop_s: float, action: Callable[[], None]) -> None:
        def turn() -> None:
            action()
            self._driver.settle()
            self._driver.tell_idle()

        self._handles.append(self._driver.loop.call_at(loop_s, turn))

    def _note(self, what: str, peers: tuple[int, ...]) -> None:
        self._driver.note(what, peers)

    def _lives(self, peer: int) -> bool:
        return self._driver.runtimes[peer].alive

    def _start(self, peer: int, round: int) -> None:
        self._driver.revive(peer, round)

    def _stop(self, peer: int) -> None:
        self._driver.halt(peer)

    def _leave(self, peer: int, grace_s: float) -> None:
        driver, runtime = self._driver, self._driver.runtimes[peer]
        if runtime.alive:
            runtime.leave()
            incarnation = runtime.incarnation
            self._call(driver.loop.time() + grace_s, lambda: self._left(peer, incarnation))

    def _left(self, peer: int, incarnation: int) -> None:
        runtime = self._driver.runtimes[peer]
        if runtime.incarnation == incarnation and runtime.alive:
            self._driver.halt(peer)

    def _lose_store(self, peer: int) -> None:
        self._driver.memory.lose(peer)

    def _slow(self, peer: int, factor: float) -> None:
        self._driver.slow[peer] = factor

    def _skew(self, fault: Skew, *, begins: bool) -> None:
        self._driver.timers.skew(self._own(fault), fault, begins)

    def _link_begins(self, number: int, fault: Any) -> None:
        self._driver.delivery.proxy.begin(fault)

    def _link_ends(self, number: int, fault: Any) -> None:
        self._driver.delivery.proxy.end(fault)
        if isinstance(fault, Hold):
            self._driver.delivery.release(fault)
