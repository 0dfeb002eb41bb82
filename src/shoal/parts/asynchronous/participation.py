"""When clients take part, and how much they then do: their own choice, unknown to the server.

`Habits` is what a worker follows. How long it rests is a `Rest`: an exponential time, the hours of
the day, or a battery. Draws are keyed by client and work, so they are the same on every engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shoal.base.errors import UsageError
from shoal.kernel.peer import Peer

Ready = Callable[[int, int, float], float]
"""(number, steps, now_s) -> when a client takes part again, now that it has made so many steps of
this work; number and steps are 0 before the first one. A moment that is past means: at once."""


class Rest(Protocol):
    """How clients rest between works; frozen settings."""

    def begin(self, peer: Peer) -> Ready:
        """One client's life."""
        ...


@dataclass(frozen=True)
class Exponential:
    """Rests of an exponential time with mean `mean_s`.

    by_client: (client, mean) pairs for those who rest longer or shorter. With rests that are long
    against the work, works arrive as Poisson processes, independent of the clients' data unless
    their rests are not.

    >>> Exponential(10.0, by_client=((3, 1.25),)).mean_of(3)
    1.25
    """

    mean_s: float
    by_client: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        pairs = tuple((int(client), float(mean_s)) for client, mean_s in self.by_client)
        object.__setattr__(self, "by_client", pairs)
        for mean_s in (self.mean_s, *(mean_s for _, mean_s in pairs)):
            if not 0 <= mean_s < math.inf:
                raise UsageError(f"rest: a mean of {mean_s} s; need a finite time >= 0")

    def mean_of(self, client: int) -> float:
        """The mean rest of a client."""
        return dict(self.by_client).get(client, self.mean_s)

    def begin(self, peer: Peer) -> Ready:
        mean_s = self.mean_of(peer.id)

        def ready(number: int, steps: int, now_s: float) -> float:
            return now_s - math.log1p(-peer.uniform("rest", number)) * mean_s

        return ready


@dataclass(frozen=True)
class Diurnal:
    """Clients take part in the first `share` of every period of `period_s`, one after the other.

    spread: how far their days are shifted against each other, as a share of the period, drawn by
    client; 0 = all have the same hours. A work that has begun is finished in the night.
    """

    period_s: float = 86400.0
    share: float = 0.3
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.period_s < math.inf and 0 < self.share <= 1 and 0 <= self.spread <= 1):
            raise UsageError(
                f"rest: period_s={self.period_s}, share={self.share}, spread={self.spread}; need a "
                "finite period above 0, a share in (0, 1] and a spread in [0, 1]"
            )

    def begin(self, peer: Peer) -> Ready:
        shift_s = self.spread * self.period_s * peer.uniform("day")

        def ready(number: int, steps: int, now_s: float) -> float:
            day, hour_s = divmod(now_s + shift_s, self.period_s)
            if hour_s < self.share * self.period_s:
                return now_s
            return (day + 1.0) * self.period_s - shift_s

        return ready


@dataclass(frozen=True)
class Battery:
    """Clients work while there is charge for it and rest until there is `enough` again.

    capacity, enough: in local steps; charge_per_s: steps that a second of rest or work gives,
    uneven by a factor drawn from exp(+-spread) for each client. Clients begin with a charge drawn
    from [0, capacity]; after a crash the battery is full.
    """

    capacity: float = 100.0
    charge_per_s: float = 1.0
    enough: float = 10.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.enough <= self.capacity < math.inf and self.charge_per_s > 0):
            raise UsageError(
                f"rest: capacity={self.capacity}, enough={self.enough}, "
                f"charge_per_s={self.charge_per_s}; need 0 < enough <= capacity and a charge above "
                "0"
            )
        if not 0 <= self.spread < math.inf:
            raise UsageError(f"rest: spread={self.spread}; need a finite number >= 0")

    def begin(self, peer: Peer) -> Ready:
        per_s = self.charge_per_s * math.exp(self.spread * (2.0 * peer.uniform("charger") - 1.0))
        first = peer.store.get("outbox") is None
        charge = self.capacity * (peer.uniform("charge") if first else 1.0)
        since_s = peer.now()

        def ready(number: int, steps: int, now_s: float) -> float:
            nonlocal charge, since_s
            charge = min(self.capacity, charge + per_s * (now_s - since_s)) - steps
            since_s = now_s
            return now_s + max(0.0, self.enough - charge) / per_s

        return ready


@dataclass(frozen=True)
class Habits:
    """A worker's habits: `low` to `high` local steps per work, drawn anew each time, and its rest.

    by_client: (client, low, high) for those who do otherwise. rest None: never. The server may
    decide about steps instead (see `rule.Send`); then these are not used.

    >>> Habits(2, 9).range_of(4), Habits(by_client=((4, 1, 1),), low=9).range_of(4)
    ((2, 9), (1, 1))
    """

    low: int = 1
    high: int | None = None
    rest: Rest | None = None
    by_client: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        ranges = [(self.low, self.low if self.high is None else self.high)]
        ranges += [(low, high) for _, low, high in self.by_client]
        for low, high in ranges:
            if not 1 <= low <= high:
                raise UsageError(
                    f"habits: {low} to {high} local steps; need at least 1 and an order (swap them)"
                )

    def range_of(self, client: int) -> tuple[int, int]:
        """The fewest and the most steps of a client's works."""
        for who, low, high in self.by_client:
            if who == client:
                return low, high
        return self.low, self.low if self.high is None else self.high

    def steps(self, peer: Peer, number: int) -> int:
        """How many steps a client makes of its work `number`."""
        low, high = self.range_of(peer.id)
        return low + int(peer.uniform("steps", number) * (high - low + 1))
