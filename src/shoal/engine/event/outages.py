"""Faults in the event engine: when each begins and ends, and what it does to peers.

Faults on links are `delivery`'s; here are crashes, joins, leaves, slow devices and skewed clocks.
A fault whose end comes before its beginning (one tied to a round, the other to seconds) does not
take place. A peer is down while any of its crashes lasts; it restarts only if a crash or its later
join stopped it from running, so a peer whose program ended, or that left, stays as it is.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from shoal.base.units import to_ns
from shoal.world.faults import Crash, Fault, Join, Leave, Round, Skew, Slow

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime


class Outages:
    """The fault list of one run, in progress."""

    def __init__(self, simulation: Simulation, faults: tuple[Fault, ...]) -> None:
        self.to_come = 0
        """revivals that are certain to come: the run must not end before them"""
        self.absent = {p for f in faults if isinstance(f, Join) for p in f.who}
        self._simulation = simulation
        self._faults = faults
        self._begun = [False] * len(faults)
        self._over = [False] * len(faults)
        self._awaited = [False] * len(faults)
        self._rounds: list[tuple[int, int, Any]] = []
        self._down = [0] * simulation.network.peers
        self._due_back: set[int] = set()
        self._factors: list[list[float]] = [[] for _ in self._down]

    def schedule(self) -> None:
        """Put every beginning and end where it belongs: into the heap or under its round."""
        for number, fault in enumerate(self._faults):
            for moment, action in ((fault.at, self._begin), (fault.until, self._end)):
                if isinstance(moment, Round):
                    self._rounds.append((moment.round, number, action))
                elif moment == 0 and not isinstance(fault, Crash | Join | Leave):
                    # What surrounds the peers is so before they take their first step.
                    action(number)
                elif moment is not None:
                    self._simulation.at(to_ns(moment), action, number)
            if isinstance(fault, Join) and not isinstance(fault.at, Round):
                self._await(number)
        # Latest first, so that the next one is popped off the end; within a round as listed.
        self._rounds.reverse()
        self._rounds.sort(key=lambda entry: -entry[0])

    def entered(self, peer: int, round: int) -> None:
        """A peer enters a round; what is tied to it, or to one that was skipped, happens.

        At once, so that it holds for the first message of the round as for the last. Only the
        peer's own crash waits until its step ends: it can't be closed from inside its own code.
        """
        rounds = self._rounds
        while rounds and rounds[-1][0] <= round:
            _, number, action = rounds.pop()
            fault = self._faults[number]
            if isinstance(fault, Crash) and peer in fault.who:
                self._simulation.runtimes[peer].mute()
                self._simulation.at(self._simulation.now_ns, action, number)
            else:
                action(number)

    def _await(self, number: int) -> None:
        self._awaited[number] = True
        self.to_come += 1

    def _arrived(self, number: int) -> None:
        if self._awaited[number]:
            self._awaited[number] = False
            self.to_come -= 1
            self._simulation.halt = True

    def _begin(self, number: int, _: Any = None) -> None:
        fault = self._faults[number]
        self._arrived(number)
        if self._over[number] or self._begun[number]:
            return
        self._begun[number] = True
        simulation = self._simulation
        simulation.note(fault.kind, fault.who)
        if isinstance(fault, Crash):
            self._crash(number, fault)
        elif isinstance(fault, Join):
            self._join(fault)
        elif isinstance(fault, Leave):
            self._leave(fault)
        elif isinstance(fault, Slow):
            for peer in fault.who:
                self._factors[peer].append(fault.factor)
                simulation.slow[peer] = prod(self._factors[peer])
        elif isinstance(fault, Skew):
            simulation.skew(fault, begins=True)
        else:
            simulation.delivery.begin(number, fault)

    def _end(self, number: int, _: Any = None) -> None:
        fault = self._faults[number]
        self._arrived(number)
        if self._over[number]:
            return
        self._over[number] = True
        if not self._begun[number]:
            return
        simulation = self._simulation
        simulation.note("restart" if isinstance(fault, Crash) else f"{fault.kind} ends", fault.who)
        if isinstance(fault, Crash):
            self._restart(fault)
        elif isinstance(fault, Slow):
            for peer in fault.who:
                self._factors[peer].remove(fault.factor)
                simulation.slow[peer] = prod(self._factors[peer])
        elif isinstance(fault, Skew):
            simulation.skew(fault, begins=False)
        else:
            simulation.delivery.end(number)

    def _crash(self, number: int, fault: Crash) -> None:
        simulation = self._simulation
        for peer in fault.who:
            self._down[peer] += 1
            runtime = simulation.runtimes[peer]
            if runtime.alive:
                self._due_back.add(peer)
                simulation.stop(runtime)
            if fault.store == "lost":
                simulation.forget_store(peer)
        comes_back = fault.until is not None and not isinstance(fault.until, Round)
        if comes_back and not self._due_back.isdisjoint(fault.who):
            self._await(number)

    def _restart(self, fault: Crash) -> None:
        for peer in fault.who:
            self._down[peer] -= 1
            if not self._down[peer] and peer in self._due_back:
                self._due_back.discard(peer)
                self._simulation.start(self._simulation.runtimes[peer], _before(fault.until))

    def _join(self, fault: Join) -> None:
        for peer in fault.who:
            if peer not in self.absent:
                continue
            self.absent.discard(peer)
            if self._down[peer]:
                self._due_back.add(peer)
            else:
                self._simulation.start(self._simulation.runtimes[peer], _before(fault.at))

    def _leave(self, fault: Leave) -> None:
        simulation = self._simulation
        for peer in fault.who:
            self.absent.discard(peer)
            self._due_back.discard(peer)
            runtime = simulation.runtimes[peer]
            if runtime.alive:
                runtime.leave()
                gone = simulation.now_ns + to_ns(fault.grace_s)
                simulation.at(gone, self._left, runtime, runtime.incarnation)

    def _left(self, runtime: Runtime, incarnation: int) -> None:
        if runtime.incarnation == incarnation and runtime.alive:
            self._simulation.stop(runtime)


def _before(moment: Any) -> int:
    """The round that a peer which starts now has behind it; a round's own arrivals take part."""
    return moment.round - 1 if isinstance(moment, Round) else -1
