"""Faults of a live run: what happens to the peers of this process, and when.

Every process of a run has the whole list and keeps its own time, so nothing has to be agreed on
but rounds: the process whose peer enters a round first tells the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.base.units import to_ns
from shoal.world.faults import Crash, Fault, Hold, Join, Leave, Round, Skew, Slow

if TYPE_CHECKING:
    from shoal.engine.live.driver import Driver

Action = Callable[[Any], None]


def check_faults(faults: Iterable[Fault]) -> None:
    """Refuse what a real machine cannot do."""
    for fault in faults:
        if isinstance(fault, Slow) and fault.factor < 1.0:
            raise UsageError(
                f"slow: factor={fault.factor}; on real sockets a peer can only be slowed down "
                "(factor >= 1), or run on the event engine"
            )


class Schedule:
    """The fault list, applied to a driver."""

    def __init__(self, driver: Driver, faults: Sequence[Fault]) -> None:
        self.to_come = 0
        """how many restarts and joins of own peers, tied to seconds, are still ahead"""
        self.by_round: dict[int, list[tuple[Action, Fault]]] = {}
        self._driver = driver
        self._faults = faults
        self._round = -1
        self._handles: list[asyncio.TimerHandle] = []

    def begin(self) -> None:
        """Apply what holds from the start, and set timers for the rest."""
        for fault in self._faults:
            first, last = self._actions(fault)
            for moment, action in ((fault.at, first), (fault.until, last)):
                if moment is None or action is None:
                    continue
                if isinstance(moment, Round):
                    self.by_round.setdefault(moment.round, []).append((action, fault))
                    continue
                # A restart or a join is still to come: the run must not end before it.
                reviving = bool(self._own(fault)) and (
                    isinstance(fault, Join) or (isinstance(fault, Crash) and action is last)
                )
                self.to_come += reviving
                at = to_ns(moment)
                if at == 0 and not reviving:
                    action(fault)
                else:
                    at_s = self._driver.timers.loop_s(at)
                    loop = self._driver.loop
                    self._handles.append(loop.call_at(at_s, self._apply, action, fault, reviving))

    def stop(self) -> None:
        for handle in self._handles:
            handle.cancel()

    def absent(self) -> set[int]:
        """Who is not there at the start."""
        return {peer for fault in self._faults if isinstance(fault, Join) for peer in fault.who}

    def entered(self, round: int) -> bool:
        """Apply what is tied to rounds up to this one; whether the round is news."""
        if round <= self._round:
            return False
        while self._round < round:
            self._round += 1
            for action, fault in self.by_round.pop(self._round, ()):
                action(fault)
        return True

    def is_news(self, round: int) -> bool:
        """Whether nobody is known to have entered this round yet."""
        return round > self._round

    def _apply(self, action: Action, fault: Fault, reviving: bool) -> None:
        self.to_come -= reviving
        action(fault)
        self._driver.settle()
        self._driver.tell_idle()

    def _actions(self, fault: Fault) -> tuple[Action | None, Action | None]:
        if isinstance(fault, Crash):
            return self._crash, self._restart
        if isinstance(fault, Join):
            return self._restart, None
        if isinstance(fault, Leave):
            return self._leave, None
        if isinstance(fault, Slow):
            return (lambda f: self._slow(f, f.factor)), (lambda f: self._slow(f, 1.0 / f.factor))
        if isinstance(fault, Skew):
            return self._skew, None
        return self._begin_link, self._end_link

    def _own(self, fault: Fault) -> list[int]:
        return [peer for peer in fault.who if peer in self._driver.runtimes]

    def _crash(self, fault: Crash) -> None:
        driver = self._driver
        driver.note("crash", fault.who)
        for peer in self._own(fault):
            driver.halt(peer)
            if fault.store == "lost":
                driver.memory.lose(peer)
        driver.delivery.forget(fault.who)

    def _restart(self, fault: Fault) -> None:
        driver = self._driver
        driver.note("join" if isinstance(fault, Join) else "restart", fault.who)
        for peer in self._own(fault):
            driver.revive(peer)
        driver.expect(fault.who)

    def _leave(self, fault: Leave) -> None:
        driver = self._driver
        driver.note("leave", fault.who)
        for peer in self._own(fault):
            runtime = driver.runtimes[peer]
            runtime.leave()
            self._handles.append(
                driver.loop.call_later(fault.grace_s, self._left, peer, runtime.incarnation)
            )

    def _left(self, peer: int, incarnation: int) -> None:
        runtime = self._driver.runtimes[peer]
        if runtime.incarnation == incarnation and runtime.alive:
            self._driver.halt(peer)
            self._driver.settle()
            self._driver.tell_idle()

    def _slow(self, fault: Slow, factor: float) -> None:
        self._driver.note("slow" if factor == fault.factor else "slow ends", fault.who)
        for peer in self._own(fault):
            self._driver.slow[peer] = self._driver.slow.get(peer, 1.0) * factor

    def _skew(self, fault: Skew) -> None:
        self._driver.note("skew", fault.who)
        self._driver.timers.skew(self._own(fault), round(fault.offset_s * 1e9), fault.drift)

    def _begin_link(self, fault: Fault) -> None:
        self._driver.note(fault.kind, fault.who)
        self._driver.delivery.proxy.begin(fault)

    def _end_link(self, fault: Fault) -> None:
        self._driver.note(f"{fault.kind} ends", fault.who)
        self._driver.delivery.proxy.end(fault)
        if isinstance(fault, Hold):
            self._driver.delivery.release(fault)
