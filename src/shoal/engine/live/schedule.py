"""Faults of a live run: what happens to the peers of this process, and when.

Every process of a run has the whole list and keeps its own time, so nothing has to be agreed on
but rounds: the process whose peer enters a round first tells the others. The rules are those of
simulation: a fault whose end comes before its beginning does not take place; a peer is down while
any of its crashes lasts; it restarts only if a crash or its later join stopped it from running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING

from shoal.base.errors import UsageError
from shoal.base.units import to_ns
from shoal.world.faults import Crash, Fault, Hold, Join, Leave, Round, Skew, Slow

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver

Action = Callable[[int, int], None]


def check_faults(faults: Iterable[Fault]) -> None:
    """Refuse what a real machine cannot do."""
    for fault in faults:
        if isinstance(fault, Slow) and fault.factor < 1.0:
            raise UsageError(
                f"slow: factor={fault.factor}; on real sockets a peer can only be slowed down "
                "(factor >= 1), or run on the event engine"
            )


class Schedule:
    """The fault list of one run, in progress, as far as it concerns one driver."""

    def __init__(self, driver: Driver, faults: tuple[Fault, ...]) -> None:
        self.to_come = 0
        """revivals of own peers that are certain to come: the run must not end before them"""
        self.absent = {p for f in faults if isinstance(f, Join) for p in f.who}
        self._driver = driver
        self._faults = faults
        self._begun = [False] * len(faults)
        self._over = [False] * len(faults)
        self._awaited = [False] * len(faults)
        self._rounds: list[tuple[int, int, Action]] = []
        self._entered = -1
        self._down: dict[int, int] = {}
        self._due_back: set[int] = set()
        self._factors: dict[int, list[float]] = {}
        self._handles: list[asyncio.TimerHandle] = []

    def begin(self) -> None:
        """Apply what the links and devices are like from the start; set timers for the rest."""
        for number, fault in enumerate(self._faults):
            for moment, action in ((fault.at, self._begin), (fault.until, self._end)):
                if isinstance(moment, Round):
                    self._rounds.append((moment.round, number, action))
                elif moment == 0 and not isinstance(fault, (Crash, Join, Leave)):
                    action(number, -1)
                elif moment is not None:
                    at_s = self._driver.timers.loop_s(to_ns(moment))
                    self._at(at_s, lambda number=number, action=action: action(number, -1))
            if isinstance(fault, Join) and not isinstance(fault.at, Round) and self._own(fault):
                self._await(number)
        # Latest first, so that the next one is popped off the end; within a round as listed.
        self._rounds.reverse()
        self._rounds.sort(key=lambda entry: -entry[0])

    def stop(self) -> None:
        for handle in self._handles:
            handle.cancel()

    def awaits(self, round: int) -> bool:
        """Whether entering this round is news that something is tied to."""
        return round > self._entered and bool(self._rounds) and self._rounds[-1][0] <= round

    def entered(self, round: int, *, running: bool = False) -> None:
        """A peer entered a round; what is tied to it, or to one that was skipped, happens.

        running: called from inside a program's step, where links and devices may change at once
        (so that it holds for the first message of the round, as in simulation), but no program may
        begin or be closed.
        """
        self._entered = max(self._entered, round)
        while self._rounds and self._rounds[-1][0] <= round:
            at, number, action = self._rounds.pop()
            if running and isinstance(self._faults[number], (Crash, Join, Leave)):
                self._driver.loop.call_soon(action, number, at - 1)
            else:
                action(number, at - 1)

    def may_live(self, peer: int) -> bool:
        """Whether no crash is in force; a peer that may not is due back when the last one ends."""
        if self._down.get(peer):
            self._due_back.add(peer)
            return False
        return True

    def _at(self, loop_s: float, action: Callable[[], None]) -> None:
        def turn() -> None:
            action()
            self._driver.settle()
            self._driver.tell_idle()

        self._handles.append(self._driver.loop.call_at(loop_s, turn))

    def _own(self, fault: Fault) -> list[int]:
        return [peer for peer in fault.who if peer in self._driver.runtimes]

    def _await(self, number: int) -> None:
        self._awaited[number] = True
        self.to_come += 1

    def _arrived(self, number: int) -> None:
        if self._awaited[number]:
            self._awaited[number] = False
            self.to_come -= 1

    def _begin(self, number: int, round: int) -> None:
        fault = self._faults[number]
        self._arrived(number)
        if self._over[number] or self._begun[number]:
            return
        self._begun[number] = True
        driver = self._driver
        driver.note(fault.kind, fault.who)
        if isinstance(fault, Crash):
            self._crash(number, fault)
        elif isinstance(fault, Join):
            self._join(fault, round)
        elif isinstance(fault, Leave):
            self._leave(fault)
        elif isinstance(fault, Slow):
            for peer in self._own(fault):
                self._factors.setdefault(peer, []).append(fault.factor)
                driver.slow[peer] = prod(self._factors[peer])
        elif isinstance(fault, Skew):
            driver.timers.skew(self._own(fault), fault, begins=True)
        else:
            driver.delivery.proxy.begin(fault)

    def _end(self, number: int, round: int) -> None:
        fault = self._faults[number]
        self._arrived(number)
        if self._over[number]:
            return
        self._over[number] = True
        if not self._begun[number]:
            return
        driver = self._driver
        driver.note("restart" if isinstance(fault, Crash) else f"{fault.kind} ends", fault.who)
        if isinstance(fault, Crash):
            self._restart(fault, round)
        elif isinstance(fault, Slow):
            for peer in self._own(fault):
                self._factors[peer].remove(fault.factor)
                driver.slow[peer] = prod(self._factors[peer])
        elif isinstance(fault, Skew):
            driver.timers.skew(self._own(fault), fault, begins=False)
        elif not isinstance(fault, (Join, Leave)):
            driver.delivery.proxy.end(fault)
            if isinstance(fault, Hold):
                driver.delivery.release(fault)

    def _crash(self, number: int, fault: Crash) -> None:
        driver = self._driver
        for peer in self._own(fault):
            self._down[peer] = self._down.get(peer, 0) + 1
            if driver.runtimes[peer].alive:
                self._due_back.add(peer)
                driver.halt(peer)
            if fault.store == "lost":
                driver.memory.lose(peer)
        driver.delivery.forget(fault.who)
        comes_back = fault.until is not None and not isinstance(fault.until, Round)
        if comes_back and not self._due_back.isdisjoint(fault.who):
            self._await(number)

    def _restart(self, fault: Crash, round: int) -> None:
        for peer in self._own(fault):
            self._down[peer] -= 1
            if not self._down[peer] and peer in self._due_back:
                self._due_back.discard(peer)
                self._driver.revive(peer, round)
        self._driver.expect(fault.who)

    def _join(self, fault: Join, round: int) -> None:
        for peer in self._own(fault):
            if peer not in self.absent:
                continue
            self.absent.discard(peer)
            if self._down.get(peer):
                self._due_back.add(peer)
            else:
                self._driver.revive(peer, round)
        self._driver.expect(fault.who)

    def _leave(self, fault: Leave) -> None:
        driver = self._driver
        for peer in self._own(fault):
            self.absent.discard(peer)
            self._due_back.discard(peer)
            runtime = driver.runtimes[peer]
            if runtime.alive:
                runtime.leave()
                self._at(
                    driver.loop.time() + fault.grace_s,
                    lambda peer=peer, number=runtime.incarnation: self._left(peer, number),
                )

    def _left(self, peer: int, incarnation: int) -> None:
        runtime = self._driver.runtimes[peer]
        if runtime.incarnation == incarnation and runtime.alive:
            self._driver.halt(peer)
