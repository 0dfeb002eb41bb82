"""Faults of one world as moments: when each peer lives, and what happens to its links.

Lockstep handles a whole round at once, so it asks about times instead of waiting for them. A
moment tied to a round becomes known when the first peer enters that round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.world.faults import Crash, Fault, Hold, Join, Leave, Loss, Moment, Partition, Round, Slow
from shoal.world.record import Happening

_SUPPORTED = (Crash, Join, Leave, Partition, Slow, Loss, Hold)


def beyond(faults: Iterable[Fault], hub: int | None) -> str:
    """Why lockstep cannot run these faults message for message, or "" when it can.

    hub: the exchange's. Rounds are computed whole here, so whatever takes place between two of
    them, or is known only later, needs the event engine.
    """
    faults = tuple(faults)
    for fault in faults:
        if not isinstance(fault, _SUPPORTED):
            return f"{fault.kind} faults need a clock or a wire of their own"
        if isinstance(fault, Hold) and isinstance(fault.until, Round):
            return "a hold that ends at a round, which is not known when messages leave"
        if isinstance(fault, Leave) and isinstance(fault.at, Round) and hub in fault.who:
            return "a hub that leaves at a round, which begins with what it sends"
    for leave in (f for f in faults if isinstance(f, Leave)):
        for crash in (f for f in faults if isinstance(f, Crash)):
            both = set(leave.who) & set(crash.who)
            if both and not _no_later(crash.at, leave.at):
                return f"a crash of peer {min(both)}, which may be in the middle of its leaving"
    return ""


def _no_later(first: Moment, second: Moment) -> bool:
    """Whether this is certain before the run: seconds and rounds do not compare."""
    if isinstance(first, Round) and isinstance(second, Round):
        return first.round <= second.round
    both = not isinstance(first, Round) and not isinstance(second, Round)
    return both and float(first) <= float(second)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Moment:
    """Something happens to a peer: "crash", "restart", "join" or "leave"."""

    time_s: float
    what: str
    kept: bool = True
    round: int = 0
    """a peer that comes up at a moment tied to a round begins with that round at the earliest"""


@dataclass(frozen=True)
class Life:
    """From birth to death of one peer; `hard` and `kept` describe the death."""

    birth_s: float
    death_s: float = math.inf
    hard: bool = True
    kept: bool = True
    round: int = 0


class Timeline:
    """One seed's faults. birth and death [peers] bound each peer's present life."""

    def __init__(self, faults: tuple[Fault, ...], peers: int, hub: int | None = None) -> None:
        if reason := beyond(faults, hub):
            raise UsageError(f"lockstep: {reason} (use engine='event')")
        self.faults = faults
        self.birth = torch.zeros(peers, dtype=torch.float64, device="cpu")
        self.death = torch.full((peers,), math.inf, dtype=torch.float64, device="cpu")
        self.hard = torch.ones(peers, dtype=torch.bool, device="cpu")
        self.kept = torch.ones(peers, dtype=torch.bool, device="cpu")
        self._past: list[tuple[Tensor, Tensor]] = []
        """(birth, death) of each peer's first life, second, ... once it has a later one"""
        self._times: dict[int, float] = {}
        self._seen: set[tuple[int, bool]] = set()
        self._absent = {p for f in faults if isinstance(f, Join) for p in f.who}
        self._moments: dict[int, list[_Moment]] = {p: [] for f in faults for p in f.who}
        self._number = dict.fromkeys(self._moments, 0)
        for peer in self._absent:
            self.birth[peer] = math.inf
        self._resolve()

    def rounds(self) -> set[int]:
        """Rounds to which moments are tied that are not known yet."""
        tied = {m.round for f in self.faults for m in (f.at, f.until) if isinstance(m, Round)}
        return tied - set(self._times)

    def enter(self, round: int, time_s: float) -> None:
        """The first peer enters a round."""
        self._times[round] = time_s
        self._resolve()

    def at(self, moment: Moment | None) -> float:
        """Seconds; infinity while unknown."""
        if moment is None:
            return math.inf
        if isinstance(moment, Round):
            return self._times.get(moment.round, math.inf)
        return float(moment)

    def _resolve(self) -> None:
        for number, fault in enumerate(self.faults):
            for end, moment in ((False, fault.at), (True, fault.until)):
                time_s = self.at(moment)
                if time_s == math.inf or (number, end) in self._seen:
                    continue
                self._seen.add((number, end))
                self._add(fault, end, time_s)

    def _add(self, fault: Fault, end: bool, time_s: float) -> None:
        tied = fault.until if end else fault.at
        round = tied.round if isinstance(tied, Round) else 0
        if isinstance(fault, Crash):
            what = "restart" if end else "crash"
        elif isinstance(fault, Join | Leave) and not end:
            what = fault.kind
        else:
            return
        # One whose end comes before its beginning does not take place.
        if what == "restart" and self.at(fault.at) > time_s:
            return
        if what == "crash" and self.at(fault.until) < time_s:
            return
        kept = not (isinstance(fault, Crash) and fault.store == "lost")
        for peer in fault.who:
            self._moments[peer].append(_Moment(time_s, what, kept, round))
            self._moments[peer].sort(key=lambda each: each.time_s)
            self._set(peer, self._number[peer])

    def _lives(self, peer: int) -> list[Life]:
        """All lives of a peer as far as they are known, in order; the rules are `event`'s.

        A peer is down while any of its crashes lasts, and comes back only if a crash or its later
        join kept it from running; who left stays away.
        """
        absent = peer in self._absent
        lives = [] if absent else [Life(0.0)]
        alive, due, down = not absent, False, 0
        for moment in self._moments[peer]:
            starts = False
            if moment.what == "crash":
                down += 1
                if alive:
                    alive, due = False, True
                    lives[-1] = replace(lives[-1], death_s=moment.time_s, kept=moment.kept)
                elif lives and not moment.kept:
                    lives[-1] = replace(lives[-1], kept=False)
            elif moment.what == "restart":
                down -= 1
                starts = due and not down
            elif moment.what == "join":
                starts = absent and not down
                due = due or (absent and down > 0)
                absent = False
            else:
                absent = due = False
                if alive:
                    alive = False
                    lives[-1] = replace(lives[-1], death_s=moment.time_s, hard=False)
            if starts:
                alive, due = True, False
                lives.append(Life(moment.time_s, round=moment.round))
        return lives

    def _set(self, peer: int, number: int) -> bool:
        lives = self._lives(peer)
        if number >= len(lives):
            if number == self._number[peer]:
                # What became known since (a crash at a round) undid this life.
                self.birth[peer] = self.death[peer] = math.inf
            return False
        life = lives[number]
        self._number[peer] = number
        self.birth[peer], self.death[peer] = life.birth_s, life.death_s
        self.hard[peer], self.kept[peer] = life.hard, life.kept
        return True

    def next_life(self, peer: int) -> bool:
        """Move on to the life after the present death; False when there is none (yet)."""
        number = self._number[peer]
        birth, death = self.birth[peer].clone(), self.death[peer].clone()
        if not self._set(peer, number + 1):
            return False
        if number == len(self._past):
            none = torch.full_like(self.birth, math.inf)
            self._past.append((none, -none))
        self._past[number][0][peer], self._past[number][1][peer] = birth, death
        return True

    def lives_through(self, peer: Tensor, from_s: Tensor, until_s: Tensor) -> Tensor:
        """Whether peers live in one piece from when a message leaves until it arrives.

        Past lives count: others may be rounds ahead of a peer that has already been given its next
        one. All tensors of one shape.
        """
        there = (from_s >= self.birth[peer]) & (until_s < self.death[peer])
        for birth, death in self._past:
            there |= (from_s >= birth[peer]) & (until_s < death[peer])
        return there

    def first_round(self, peer: int) -> int:
        """The earliest round of the present life."""
        return self._lives(peer)[self._number[peer]].round if peer in self._moments else 0

    def slowness(self, start: Tensor) -> Tensor:
        """Factor on computations that begin at `start` [peers]."""
        factor = torch.ones_like(start)
        for fault in self.faults:
            if isinstance(fault, Slow):
                who = torch.tensor(fault.who)
                begin, end = self.at(fault.at), self.at(fault.until)
                inside = (start[who] >= begin) & (start[who] < end)
                factor[who] = torch.where(inside, factor[who] * fault.factor, factor[who])
        return factor

    def on_links(
        self, source: Tensor, target: Tensor, sent_s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(blocked, extra loss probability, held until) of messages; all tensors of one shape."""
        blocked = torch.zeros_like(source, dtype=torch.bool)
        passing = torch.ones_like(sent_s)
        held = torch.zeros_like(sent_s)
        for fault in self.faults:
            if not isinstance(fault, Partition | Loss | Hold):
                continue
            begin, end = self.at(fault.at), self.at(fault.until)
            member = torch.zeros_like(self.birth, dtype=torch.bool)
            member[torch.tensor(fault.who)] = True
            out, into = member[source], member[target]
            during = (sent_s >= begin) & (sent_s < end)
            if isinstance(fault, Partition):
                cut = (out & ~into) if fault.one_way else (out ^ into)
                blocked |= during & cut
            elif isinstance(fault, Loss):
                passing = torch.where(
                    during & (out | into), passing * (1.0 - fault.probability), passing
                )
            else:
                held = torch.where(during & (out | into), held.clamp(min=end), held)
        return blocked, 1.0 - passing, held

    def happenings(self, horizon_s: float) -> list[Happening]:
        """Marks for the report, up to the end of the run."""
        marks = []
        for fault in self.faults:
            names = (fault.kind, "restart" if isinstance(fault, Crash) else f"{fault.kind} ends")
            for name, moment in zip(names, (fault.at, fault.until), strict=True):
                time_s = self.at(moment)
                if time_s <= horizon_s:
                    marks.append(Happening(time_s, name, fault.who))
        return sorted(marks, key=lambda mark: mark.time_s)
