"""Faults in the event engine, in virtual time; those on links are `delivery`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.base.units import to_ns
from shoal.engine.fault_schedule import Action, FaultSchedule
from shoal.world.faults import Crash, Fault, Skew

if TYPE_CHECKING:
    from shoal.engine.event.simulation import Simulation
    from shoal.kernel.runtime import Runtime


class Outages(FaultSchedule):
    """The fault list of one simulation, in progress."""

    def __init__(self, simulation: Simulation, faults: tuple[Fault, ...]) -> None:
        super().__init__(faults)
        self._simulation = simulation

    def entered(self, peer: int, round: int) -> None:
        """A peer enters a round; what is tied to it, or to one that was skipped, happens.

        At once, so that it holds for the first message of the round as for the last. Only the
        peer's own crash waits until its step ends: it can't be closed from inside its own code.
        """
        while self.awaits(round):
            number, action = self._next()
            fault = self._faults[number]
            if isinstance(fault, Crash) and peer in fault.who:
                self._simulation.runtimes[peer].mute()
                self._simulation.at(self._simulation.now_ns, _act, action, number)
            else:
                action(number)

    def _at(self, time_s: float, action: Action, number: int) -> None:
        self._simulation.at(to_ns(time_s), _act, action, number)

    def _arrived(self, number: int) -> None:
        if self._awaited[number]:
            self._simulation.halt = True
        super()._arrived(number)

    def _note(self, what: str, peers: tuple[int, ...]) -> None:
        self._simulation.note(what, peers)

    def _lives(self, peer: int) -> bool:
        return self._simulation.runtimes[peer].alive

    def _start(self, peer: int, round: int) -> None:
        self._simulation.start(self._simulation.runtimes[peer], round)

    def _stop(self, peer: int) -> None:
        self._simulation.stop(self._simulation.runtimes[peer])

    def _leave(self, peer: int, grace_s: float) -> None:
        simulation, runtime = self._simulation, self._simulation.runtimes[peer]
        if runtime.alive:
            runtime.leave()
            gone = simulation.now_ns + to_ns(grace_s)
            simulation.at(gone, self._left, runtime, runtime.incarnation)

    def _left(self, runtime: Runtime, incarnation: int) -> None:
        if runtime.incarnation == incarnation and runtime.alive:
            self._simulation.stop(runtime)

    def _lose_store(self, peer: int) -> None:
        self._simulation.forget_store(peer)

    def _slow(self, peer: int, factor: float) -> None:
        self._simulation.slow[peer] = factor

    def _skew(self, fault: Skew, *, begins: bool) -> None:
        self._simulation.skew(fault, begins)

    def _link_begins(self, number: int, fault: Any) -> None:
        self._simulation.delivery.begin(number, fault)

    def _link_ends(self, number: int, fault: Any) -> None:
        self._simulation.delivery.end(number)


def _act(action: Action, number: int) -> None:
    action(number)
