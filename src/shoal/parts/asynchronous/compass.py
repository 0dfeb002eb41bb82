"""COMPASS: as many local steps for each client as let groups of clients return together.

The scheduler knows each client's speed from its returns. A client joins the arrival group for which
it can make the most steps, or creates one that is due when an older group will be due again. It
knows neither models nor messages: it is told who returned when, and says what follows.

Li et al. 2024, algorithms 1 and 2 (arXiv 2309.14675); which numbers the algorithms leave open is as
in the authors' public code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

import msgspec

from shoal.base.errors import UsageError

_ROUNDING = 1e-9
"""A count of steps within this of the next whole one is that one: times are sums of floats."""
_TICK_S = 1e-9
"""Clocks count nanoseconds, so no measured time is shorter."""


class Arrival(Enum):
    """How a client returned: from work that was only measured, with its group, or after it."""

    SINGLE = "single"
    GROUPED = "grouped"
    LATE = "late"


@dataclass(frozen=True)
class Assignment:
    """What a client is told. group: None when its speed is not known yet."""

    client: int
    steps: int
    start_s: float
    group: int | None


@dataclass
class Group:
    """Clients that return together. expected_s: when; latest_s: until when the group is open."""

    number: int
    began_s: float
    expected_s: float
    latest_s: float
    waiting: set[int] = field(default_factory=set)
    arrived: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class CompassSettings:
    """min_steps, max_steps: local steps per assignment; their ratio is how much speeds may differ
    within a group. latest_factor: a group is open for that many times its expected duration.
    momentum: weight of the newest measurement of a speed. first_steps: what a client gets whose
    speed is not known (None = max_steps).

    >>> CompassSettings(max_steps=50).min_steps
    20
    """

    min_steps: int = 20
    max_steps: int = 100
    latest_factor: float = 1.2
    momentum: float = 0.9
    first_steps: int | None = None

    def __post_init__(self) -> None:
        low, high, first = self.min_steps, self.max_steps, self.first_steps
        if not 1 <= low <= high:
            raise UsageError(
                f"compass: min_steps={low}, max_steps={high}; need 1 <= min_steps <= max_steps "
                "(swap them)"
            )
        if not 1.0 <= self.latest_factor < math.inf:
            raise UsageError(
                f"compass: latest_factor={self.latest_factor}; need a finite number >= 1 (1 = a "
                "group closes when it is expected)"
            )
        if not 0.0 < self.momentum <= 1.0:
            raise UsageError(
                f"compass: momentum={self.momentum}; need more than 0, up to 1 (1 = the last "
                "measurement alone)"
            )
        if first is not None and not low <= first <= high:
            raise UsageError(
                f"compass: first_steps={first}; need {low} to {high}, as every assignment"
            )


class _Saved(msgspec.Struct, frozen=True):
    """A scheduler as it outlives a crash."""

    speeds: dict[int, float]
    groups: dict[int, Group]
    at_work: dict[int, Assignment]
    next: int


class Compass:
    """The scheduler: who has how many steps, in which group, and when groups close.

    Times are seconds on one clock, the server's. speeds: seconds per local step of clients, where
    they are known before they are measured. A speed is measured from assignment to return, so it
    holds the way there and back: the fewer steps, the slower a client seems.

    >>> compass = Compass(CompassSettings(), speeds={0: 1.0, 1: 4.0})
    >>> compass.assign(1, 0.0).steps, compass.assign(0, 300.0).steps
    (100, 100)
    >>> compass.returned(0, 400.0), compass.returned(1, 400.0)
    (<Arrival.GROUPED: 'grouped'>, <Arrival.GROUPED: 'grouped'>)
    >>> compass.full(), compass.close(0)
    ((0,), (0, 1))
    """

    def __init__(
        self, settings: CompassSettings | None = None, speeds: Mapping[int, float] | None = None
    ) -> None:
        self.settings = settings or CompassSettings()
        self._speeds: dict[int, float] = {}
        self._open: dict[int, Group] = {}
        self._at_work: dict[int, Assignment] = {}
        self._next = 0
        for client, seconds in (speeds or {}).items():
            if not 0.0 < seconds < math.inf:
                raise UsageError(
                    f"compass: client {client} takes {seconds} seconds per step; need a positive "
                    "number (leave it out to have it measured)"
                )
            self._speeds[client] = float(seconds)

    @property
    def speeds(self) -> Mapping[int, float]:
        """Seconds per local step of each client that was measured; the smaller the faster."""
        return MappingProxyType(self._speeds)

    @property
    def groups(self) -> Mapping[int, Group]:
        """The open groups by number."""
        return MappingProxyType(self._open)

    @property
    def at_work(self) -> Mapping[int, Assignment]:
        """What each client is doing now."""
        return MappingProxyType(self._at_work)

    @property
    def due_s(self) -> float:
        """When the next open group closes whoever is missing, inf without any."""
        return min((group.latest_s for group in self._open.values()), default=math.inf)

    def assign(self, client: int, now_s: float) -> Assignment:
        """New work for a client, which begins now. What it had before is forgotten."""
        self.forget(client)
        settings = self.settings
        speed_s = self._speeds.get(client)
        if speed_s is None:
            made = Assignment(client, settings.first_steps or settings.max_steps, now_s, None)
        else:
            steps, group = self._join(speed_s, now_s) or self._create(speed_s, now_s)
            group.waiting.add(client)
            made = Assignment(client, steps, now_s, group.number)
        self._at_work[client] = made
        return made

    def returned(self, client: int, now_s: float) -> Arrival:
        """A client returned its work: measure its speed, and say what it is to its group."""
        made = self._at_work.pop(client, None)
        if made is None:
            raise UsageError(
                f"compass: client {client} returned, but has no assignment (assign it first)"
            )
        measured_s = max(now_s - made.start_s, _TICK_S) / made.steps
        before_s = self._speeds.get(client)
        weight = 1.0 if before_s is None else self.settings.momentum
        self._speeds[client] = (1.0 - weight) * (before_s or 0.0) + weight * measured_s
        if made.group is None:
            return Arrival.SINGLE
        group = self._open.get(made.group)
        if group is None:
            return Arrival.LATE
        group.waiting.discard(client)
        if now_s > group.latest_s:
            return Arrival.LATE
        group.arrived.append(client)
        return Arrival.GROUPED

    def full(self) -> tuple[int, ...]:
        """Open groups that wait for nobody, by number: they can be closed."""
        return tuple(number for number, group in self._open.items() if not group.waiting)

    def due(self, now_s: float) -> tuple[int, ...]:
        """Open groups whose latest moment has come, by number: they must be closed."""
        return tuple(number for number, group in self._open.items() if group.latest_s <= now_s)

    def close(self, number: int) -> tuple[int, ...]:
        """Close a group: who arrived, fastest first. Who is missing will be late.

        A group that is closed already gives nobody, so that a timer may come too late.
        """
        group = self._open.pop(number, None)
        if group is None:
            return ()
        return tuple(sorted(group.arrived, key=lambda client: (self._speeds[client], client)))

    def forget(self, client: int) -> None:
        """A client is gone, or begins anew: its group does not wait for it. Its speed is kept."""
        made = self._at_work.pop(client, None)
        if made is not None and made.group in self._open:
            self._open[made.group].waiting.discard(client)

    def save(self) -> bytes:
        """All that it knows, for `load`."""
        return msgspec.json.encode(_Saved(self._speeds, self._open, self._at_work, self._next))

    def load(self, data: bytes) -> None:
        """Go on from `save`; groups may be due by now."""
        saved = msgspec.json.decode(data, type=_Saved)
        self._speeds, self._open = saved.speeds, saved.groups
        self._at_work, self._next = saved.at_work, saved.next

    def _join(self, speed_s: float, now_s: float) -> tuple[int, Group] | None:
        """The open group before whose expected moment the most steps can be made."""
        best: tuple[int, Group] | None = None
        for group in self._open.values():
            steps = _whole((group.expected_s - now_s) / speed_s)
            if not self.settings.min_steps <= steps <= self.settings.max_steps:
                continue
            if best is None or steps > best[0]:
                best = steps, group
        return best

    def _create(self, speed_s: float, now_s: float) -> tuple[int, Group]:
        """A group that is due when the fastest of an open one can be back a second time."""
        low, high = self.settings.min_steps, self.settings.max_steps
        best: int | None = None
        for group in self._open.values():
            members = [*group.waiting, *group.arrived]
            if now_s >= group.latest_s or not members:
                continue
            again_s = group.latest_s + high * min(self._speeds[client] for client in members)
            found = _whole((again_s - now_s) / speed_s)
            if found <= high:
                best = found if best is None else max(best, found)
        steps = high if best is None else max(best, low)
        made = Group(
            self._next, now_s, now_s + steps * speed_s,
            now_s + self.settings.latest_factor * steps * speed_s,
        )  # fmt: skip
        self._open[self._next] = made
        self._next += 1
        return steps, made


def _whole(steps: float) -> int:
    return math.floor(steps + _ROUNDING)
