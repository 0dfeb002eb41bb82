"""Who takes part in which server step, and the weights with which every client counts as it should.

A server step adds `d_i` times what client i changed, for each client i whose work it takes. Over
many steps client i counts with `d_i` times the share of steps in which it takes part, so a server
that gives all the same weight minimises another mean of the losses than the one that was asked for:
fast clients count more. `analyze_schedule` says by how much, before anything is trained.

Fraboni et al. 2023, the framework of stochastic aggregation weights (arXiv 2206.10189).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from shoal.base import keyed
from shoal.base.errors import UsageError

_ROUNDING = 1e-9
"""Times and counts that differ by less are the same: they are sums and quotients of floats."""
WARM_UP = 0.2
"""The part of a schedule that is left out of what is counted: clients begin all at once."""

Times = Sequence[float]
"""Seconds from a client's receiving a model to the return of its work, one number per client."""
ServerStep = tuple[float, tuple[int, ...]]
"""When a server step happens, and whose work it takes, in the order in which that is taken."""


class Scheme(Protocol):
    """A rule that says when the server steps, and whose work each step takes."""

    def check(self, clients: int) -> None:
        """UsageError when it cannot work with so many clients."""
        ...

    def steps(self, times: Times) -> Iterator[ServerStep]:
        """All server steps, without end, of clients that begin together at 0."""
        ...

    def shares(self, times: Times) -> tuple[float, ...] | None:
        """The share of steps in which each client takes part; None = it has to be counted."""
        ...


@dataclass(frozen=True)
class AllReturns:
    """A step when everybody has returned: federated averaging."""

    def check(self, clients: int) -> None:
        return

    def steps(self, times: Times) -> Iterator[ServerStep]:
        longest, everybody, n = max(times), tuple(range(len(times))), 0
        while True:
            n += 1
            yield n * longest, everybody

    def shares(self, times: Times) -> tuple[float, ...]:
        return (1.0,) * len(times)


@dataclass(frozen=True)
class EachReturn:
    """A step whenever one client returns; those of one moment in the order of their numbers."""

    def check(self, clients: int) -> None:
        return

    def steps(self, times: Times) -> Iterator[ServerStep]:
        made = [0] * len(times)
        while True:
            time_s, client = _next(
                list(enumerate((n + 1) * t for n, t in zip(made, times, strict=True)))
            )
            made[client] += 1
            yield time_s, (client,)

    def shares(self, times: Times) -> tuple[float, ...]:
        rate = math.fsum(1.0 / time_s for time_s in times)
        return tuple(1.0 / (time_s * rate) for time_s in times)


@dataclass(frozen=True)
class FixedTimes:
    """A step every `period_s` seconds, of all who have returned since the last: FedFix.

    A step that nobody has returned for is one all the same; it changes nothing.
    """

    period_s: float

    def __post_init__(self) -> None:
        if not 0.0 < self.period_s < math.inf:
            raise UsageError(f"schedule: period_s={self.period_s}; need a positive number")

    def check(self, clients: int) -> None:
        return

    def periods(self, time_s: float) -> int:
        """After how many steps a client that takes so long has returned."""
        return max(1, math.ceil(time_s / self.period_s - _ROUNDING))

    def steps(self, times: Times) -> Iterator[ServerStep]:
        periods, n = [self.periods(time_s) for time_s in times], 0
        while True:
            n += 1
            yield n * self.period_s, tuple(i for i, k in enumerate(periods) if n % k == 0)

    def shares(self, times: Times) -> tuple[float, ...]:
        return tuple(1.0 / self.periods(time_s) for time_s in times)


@dataclass(frozen=True)
class FirstReturns:
    """A step when `count` clients have returned, who wait for it: FedBuff."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"schedule: count={self.count}; need at least 1")

    def check(self, clients: int) -> None:
        if self.count > clients:
            raise UsageError(
                f"schedule: count={self.count} of {clients} clients; need at most all of them"
            )

    def steps(self, times: Times) -> Iterator[ServerStep]:
        due = list(times)
        waiting: list[int] = []
        while True:
            time_s, client = _next([(i, t) for i, t in enumerate(due) if i not in waiting])
            waiting.append(client)
            if len(waiting) == self.count:
                for each in waiting:
                    due[each] = time_s + times[each]
                yield time_s, tuple(sorted(waiting))
                waiting = []

    def shares(self, times: Times) -> None:
        return None


@dataclass(frozen=True)
class Drawn:
    """`count` clients per step, drawn without replacement by key; all of them are waited for."""

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"schedule: count={self.count}; need at least 1")

    def check(self, clients: int) -> None:
        FirstReturns(self.count).check(clients)

    def steps(self, times: Times) -> Iterator[ServerStep]:
        now_s, n = 0.0, 0
        while True:
            draws = [(keyed.uniform(self.seed, "drawn", n, i), i) for i in range(len(times))]
            chosen = sorted(client for _, client in sorted(draws)[: self.count])
            now_s += max(times[client] for client in chosen)
            n += 1
            yield now_s, tuple(chosen)

    def shares(self, times: Times) -> tuple[float, ...]:
        return (self.count / len(times),) * len(times)


@dataclass(frozen=True)
class Schedule:
    """What a scheme does to clients of given speeds; one number per client unless it says so.

    weights: `d_i`; shares: the part of the server steps in which a client takes part; counted:
    the mean weight with which a step counts a client, `d_i` times its share; importances: the same
    as parts of 1, hence what is minimised; bias: importances less those that were asked for.
    gap: sum of bias^2 / importances, 0 without a bias; inf when a client never returns.
    variance: sum over the clients of the mean of squared weights; largest: of all steps, the
    largest sum of weights. staleness: mean number of server steps that happen while a client works;
    staleness_most: the largest of anybody. steps_per_s: server steps per second.
    """

    weights: tuple[float, ...]
    shares: tuple[float, ...]
    counted: tuple[float, ...]
    importances: tuple[float, ...]
    bias: tuple[float, ...]
    gap: float
    variance: float
    largest: float
    staleness: tuple[float, ...]
    staleness_most: int
    steps_per_s: float


def unbiased_weights(shares: Sequence[float], importances: Sequence[float]) -> tuple[float, ...]:
    """Weights such that a client counts with its importance: `p_i / share_i`, 0 for share 0.

    >>> unbiased_weights(EachReturn().shares((1.0, 0.5)), (0.5, 0.5))
    (1.5, 0.75)
    """
    return tuple(p / s if s > 0 else 0.0 for p, s in zip(importances, shares, strict=True))


def identical_weights(shares: Sequence[float]) -> tuple[float, ...]:
    """The same weight for all, such that a step's weights add up to 1 in the mean.

    >>> identical_weights(EachReturn().shares((1.0, 0.5)))
    (1.0, 1.0)
    """
    return (1.0 / math.fsum(shares),) * len(shares)


def analyze_schedule(
    times: Times, importances: Sequence[float], scheme: Scheme, *, weighting: str = "unbiased",
    steps: int = 2000,
) -> Schedule:  # fmt: skip
    """Weights, importances, bias and staleness of a scheme for clients of known speeds.

    times [clients]: seconds per local round; importances [clients]: not negative, sum 1. weighting:
    "unbiased" or "identical". steps: how many server steps are looked at for what has no closed
    form (staleness, the largest weight, shares of `FirstReturns`); their first fifth is left out.

    >>> fast = analyze_schedule((1.0, 0.5), (0.5, 0.5), EachReturn(), weighting="identical")
    >>> [round(q, 3) for q in fast.importances], fast.staleness_most
    ([0.333, 0.667], 2)
    """
    _check(times, importances, weighting, steps)
    scheme.check(len(times))
    history = list(islice(scheme.steps(times), steps))
    skipped = int(steps * WARM_UP)
    taken = [0] * len(times)
    waits: list[list[int]] = [[] for _ in times]
    last = [-1] * len(times)
    for n, (_, clients) in enumerate(history):
        for client in clients:
            if n >= skipped:
                taken[client] += 1
                waits[client].append(n - last[client] - 1)
            last[client] = n
    shares = scheme.shares(times) or tuple(n / (steps - skipped) for n in taken)
    weights = (
        unbiased_weights(shares, importances)
        if weighting == "unbiased"
        else identical_weights(shares)
    )
    counted = tuple(d * s for d, s in zip(weights, shares, strict=True))
    whole = math.fsum(counted)
    found = tuple(each / whole for each in counted)
    bias = tuple(q - p for q, p in zip(found, importances, strict=True))
    gaps = [b * b / q if q > 0 else math.inf for b, q in zip(bias, found, strict=True) if b or q]
    began_s = history[skipped - 1][0]
    return Schedule(
        weights=weights, shares=shares, counted=counted, importances=found, bias=bias,
        gap=math.fsum(gaps),
        variance=math.fsum(d * d * s for d, s in zip(weights, shares, strict=True)),
        largest=max(math.fsum(weights[i] for i in clients) for _, clients in history[skipped:]),
        staleness=tuple(math.fsum(each) / len(each) if each else math.inf for each in waits),
        staleness_most=max((max(each) for each in waits if each), default=0),
        steps_per_s=(steps - skipped) / (history[-1][0] - began_s),
    )  # fmt: skip


def check_importances(importances: Sequence[float], clients: int) -> None:
    """UsageError unless there is one importance per client, none negative, and their sum is 1."""
    if len(importances) != clients:
        raise UsageError(
            f"importances: {len(importances)} for {clients} clients; need one for each"
        )
    whole = math.fsum(importances)
    if min(importances) < 0 or not abs(whole - 1.0) <= 1e-6:
        raise UsageError(
            f"importances: smallest {min(importances)}, sum {whole}; need numbers >= 0 of sum 1 "
            "(divide them by their sum)"
        )


def shares_of(importances: Sequence[float], clients: Sequence[int]) -> dict[int, float]:
    """Client -> its importance, in ascending order of clients; equal ones when none are given.

    >>> shares_of((), (3, 1)), shares_of((0.25, 0.75), (3, 1))
    ({1: 0.5, 3: 0.5}, {1: 0.25, 3: 0.75})
    """
    given = tuple(importances) or (1.0 / len(clients),) * len(clients)
    check_importances(given, len(clients))
    return dict(zip(sorted(clients), given, strict=True))


def _check(times: Times, importances: Sequence[float], weighting: str, steps: int) -> None:
    if not times:
        raise UsageError("analyze_schedule: no clients; need at least one")
    for client, time_s in enumerate(times):
        if not 0.0 < time_s < math.inf:
            raise UsageError(
                f"analyze_schedule: client {client} takes {time_s} seconds; need a positive number"
            )
    check_importances(importances, len(times))
    if weighting not in ("unbiased", "identical"):
        raise UsageError(f"analyze_schedule: weighting={weighting!r}; need unbiased or identical")
    if steps < 10:
        raise UsageError(f"analyze_schedule: steps={steps}; need at least 10 (raise it)")


def _next(due: Sequence[tuple[int, float]]) -> tuple[float, int]:
    """Who is due first, the smallest number of those that are due at one moment."""
    first_s = min(time_s for _, time_s in due)
    return next((t, client) for client, t in due if t <= first_s + _ROUNDING * max(1.0, first_s))
