"""What a fault list does to the peers of a run, whatever engine it is.

A fault whose end comes before its beginning (one tied to a round, the other to seconds) does not
take place. A peer is down while any of its crashes lasts; it restarts only if a crash or its later
join stopped it from running, so a peer whose program ended, or that left, stays as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from math import prod
from typing import Any

from shoal.world.faults import Crash, Fault, Join, Leave, Moment, Round, Skew, Slow

Action = Callable[[int], None]


class FaultSchedule(ABC):
    """The fault list of one run, in progress. Engines say when a moment is, and how to do it."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.to_come = 0
        """revivals of own peers that are certain to come: the run must not end before them"""
        self.absent = {peer for fault in faults if isinstance(fault, Join) for peer in fault.who}
        self._faults = faults
        self._begun = [False] * len(faults)
        self._over = [False] * len(faults)
        self._awaited = [False] * len(faults)
        self._rounds: list[tuple[int, int, Action]] = []
        self._down: dict[int, int] = {}
        self._due_back: set[int] = set()
        self._factors: dict[int, list[float]] = {}

    def begin(self) -> None:
        """Put every beginning and end where it belongs: to its time or under its round."""
        for number, fault in enumerate(self._faults):
            for moment, action in ((fault.at, self._begin), (fault.until, self._end)):
                if isinstance(moment, Round):
                    self._rounds.append((moment.round, number, action))
                elif moment == 0 and not isinstance(fault, Crash | Join | Leave):
                    # What surrounds the peers is so before they take their first step.
                    action(number)
                elif moment is not None:
                    self._at(moment, action, number)
            if isinstance(fault, Join) and not isinstance(fault.at, Round) and self._own(fault):
                self._await(number)
        # Latest first, so that the next one is popped off the end; within a round as listed.
        self._rounds.reverse()
        self._rounds.sort(key=lambda entry: -entry[0])

    def awaits(self, round: int) -> bool:
        """Whether something is tied to this round, or to one before it, and is still to happen."""
        return bool(self._rounds) and self._rounds[-1][0] <= round

    def may_live(self, peer: int) -> bool:
        """Whether no crash is in force; a peer that may not is due back when the last one ends."""
        if self._down.get(peer):
            self._due_back.add(peer)
            return False
        return True

    def _next(self) -> tuple[int, Action]:
        """What happens next of what is tied to rounds."""
        _, number, action = self._rounds.pop()
        return number, action

    def _await(self, number: int) -> None:
        self._awaited[number] = True
        self.to_come += 1

    def _arrived(self, number: int) -> None:
        if self._awaited[number]:
            self._awaited[number] = False
            self.to_come -= 1

    def _begin(self, number: int) -> None:
        fault = self._faults[number]
        self._arrived(number)
        if self._over[number] or self._begun[number]:
            return
        self._begun[number] = True
        self._note(fault.kind, fault.who)
        if isinstance(fault, Crash):
            self._crash(number, fault)
        elif isinstance(fault, Join):
            self._join(fault)
        elif isinstance(fault, Leave):
            for peer in self._own(fault):
                self.absent.discard(peer)
                self._due_back.discard(peer)
                self._leave(peer, fault.grace_s)
        elif isinstance(fault, Slow):
            for peer in self._own(fault):
                self._factors.setdefault(peer, []).append(fault.factor)
                self._slow(peer, prod(self._factors[peer]))
        elif isinstance(fault, Skew):
            self._skew(fault, begins=True)
        else:
            self._link_begins(number, fault)

    def _end(self, number: int) -> None:
        fault = self._faults[number]
        self._arrived(number)
        if self._over[number]:
            return
        self._over[number] = True
        if not self._begun[number]:
            return
        self._note("restart" if isinstance(fault, Crash) else f"{fault.kind} ends", fault.who)
        if isinstance(fault, Crash):
            self._restart(fault)
        elif isinstance(fault, Slow):
            for peer in self._own(fault):
                self._factors[peer].remove(fault.factor)
                self._slow(peer, prod(self._factors[peer]))
        elif isinstance(fault, Skew):
            self._skew(fault, begins=False)
        elif not isinstance(fault, Join | Leave):
            self._link_ends(number, fault)

    def _crash(self, number: int, fault: Crash) -> None:
        for peer in self._own(fault):
            self._down[peer] = self._down.get(peer, 0) + 1
            if self._lives(peer):
                self._due_back.add(peer)
                self._stop(peer)
            if fault.store == "lost":
                self._lose_store(peer)
        comes_back = fault.until is not None and not isinstance(fault.until, Round)
        if comes_back and not self._due_back.isdisjoint(fault.who):
            self._await(number)

    def _restart(self, fault: Crash) -> None:
        for peer in self._own(fault):
            self._down[peer] -= 1
            if not self._down[peer] and peer in self._due_back:
                self._due_back.discard(peer)
                self._start(peer, _before(fault.until))

    def _join(self, fault: Join) -> None:
        for peer in self._own(fault):
            if peer not in self.absent:
                continue
            self.absent.discard(peer)
            if self._down.get(peer):
                self._due_back.add(peer)
            else:
                self._start(peer, _before(fault.at))

    # How an engine does it.

    def _own(self, fault: Fault) -> Collection[int]:
        """Those of its peers that this schedule is about."""
        return fault.who

    @abstractmethod
    def _at(self, time_s: float, action: Action, number: int) -> None: ...

    @abstractmethod
    def _note(self, what: str, peers: tuple[int, ...]) -> None: ...

    @abstractmethod
    def _lives(self, peer: int) -> bool: ...

    @abstractmethod
    def _start(self, peer: int, round: int) -> None:
        """Begin another incarnation, which has that round behind it."""

    @abstractmethod
    def _stop(self, peer: int) -> None: ...

    @abstractmethod
    def _leave(self, peer: int, grace_s: float) -> None: ...

    @abstractmethod
    def _lose_store(self, peer: int) -> None: ...

    @abstractmethod
    def _slow(self, peer: int, factor: float) -> None: ...

    @abstractmethod
    def _skew(self, fault: Skew, *, begins: bool) -> None: ...

    @abstractmethod
    def _link_begins(self, number: int, fault: Any) -> None: ...

    @abstractmethod
    def _link_ends(self, number: int, fault: Any) -> None: ...


def _before(moment: Moment | None) -> int:
    """The round that a peer which starts now has behind it; a round's own arrivals take part."""
    return moment.round - 1 if isinstance(moment, Round) else -1
