"""The order of a ring: a round tour over measured links that costs least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shoal.base import keyed
from shoal.base.errors import UsageError

Matrix = np.ndarray


@dataclass(frozen=True)
class Tour:
    """A round tour over all peers of a cost matrix [peers, peers], from row to column.

    Up to `exact` peers the cheapest tour (Held and Karp 1962, O(2^n n^2)); above that the best of
    `starts` nearest-neighbour tours after moving segments (or-opt, which keeps directions) and
    exchanging three edges. The costs may be asymmetric. Local search gives no bound.

    >>> Tour().order(np.array([[0, 9, 1], [1, 0, 9], [9, 1, 0]]))
    (0, 2, 1)
    """

    exact: int = 12
    starts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.exact <= 16 or self.starts < 1:
            raise UsageError(
                f"tour: exact={self.exact}, starts={self.starts}; need exact from 1 to 16 (memory "
                "doubles with each peer) and starts >= 1"
            )

    def order(self, cost: Matrix) -> tuple[int, ...]:
        """Peers in the order of the tour, beginning with 0."""
        cost = np.asarray(cost, np.float64)
        if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not np.isfinite(cost).all():
            raise UsageError(
                f"tour: cost of shape {cost.shape}; need a square matrix of finite numbers"
            )
        peers = len(cost)
        if peers < 4:
            ways = [tuple(range(peers)), *([(0, 2, 1)] if peers == 3 else [])]
            return min(ways, key=lambda way: tour_cost(cost, way))
        return _held_karp(cost) if peers <= self.exact else self._search(cost)

    def _search(self, cost: Matrix) -> tuple[int, ...]:
        found = []
        for start in range(min(self.starts, len(cost))):
            first = int(keyed.uniform(self.seed, "tour", start) * len(cost))
            tour = _improved(cost, _nearest(cost, first))
            found.append((tour_cost(cost, tour), tour))
        best = min(found)[1]
        at = best.index(0)
        return best[at:] + best[:at]


def tour_cost(cost: Matrix, order: tuple[int, ...]) -> float:
    """Sum of the edges of the round tour."""
    place = np.array(order)
    return float(np.asarray(cost)[place, np.roll(place, -1)].sum())


def link_cost(rate_bit_per_s: Matrix) -> Matrix:
    """1000 / Mbit/s of each link: the edge cost of PCCL's topology optimisation."""
    with np.errstate(divide="ignore"):
        cost = 1e9 / np.asarray(rate_bit_per_s, np.float64)
    return np.where(np.isfinite(cost), cost, 1e9)


def _held_karp(cost: Matrix) -> tuple[int, ...]:
    """best[set, j]: cheapest path from 0 through all of the set (of 1..n-1) that ends in j."""
    rest = len(cost) - 1
    between = cost[1:, 1:]
    best = np.full((1 << rest, rest), math.inf)
    come = np.zeros((1 << rest, rest), np.int8)
    each = np.arange(rest)
    best[1 << each, each] = cost[0, 1:]
    by_size: list[list[int]] = [[] for _ in range(rest + 1)]
    for number in range(1, 1 << rest):
        by_size[number.bit_count()].append(number)
    for size in range(2, rest + 1):
        sets = np.array(by_size[size])
        for last in range(rest):
            here = sets[(sets >> last) & 1 == 1]
            paths = best[here ^ (1 << last)] + between[:, last]
            come[here, last] = paths.argmin(1)
            best[here, last] = paths.min(1)
    everyone = (1 << rest) - 1
    last = int((best[everyone] + cost[1:, 0]).argmin())
    path = []
    while everyone:
        path.append(last + 1)
        everyone, last = everyone ^ (1 << last), int(come[everyone, last])
    return (0, *reversed(path))


def _nearest(cost: Matrix, first: int) -> tuple[int, ...]:
    tour, left = [first], np.ones(len(cost), bool)
    left[first] = False
    while left.any():
        tour.append(int(np.where(left, cost[tour[-1]], math.inf).argmin()))
        left[tour[-1]] = False
    return tuple(tour)


def _improved(cost: Matrix, tour: tuple[int, ...]) -> tuple[int, ...]:
    """Exchange two neighbouring segments while that helps: every three-edge exchange that keeps
    directions, which is all that an asymmetric cost leaves cheap to evaluate."""
    peers = len(tour)
    first, second = np.array(list(combinations(range(1, peers), 2))).T
    best = tour_cost(cost, tour)
    while True:
        place = np.array(tour)
        # a b c -> a c b, with b = place[i:j], c = place[j:k], for the best of all k.
        gain, cut = 0.0, (0, 0, 0)
        before = cost[place, np.roll(place, -1)]
        for end in range(3, peers + 1):
            i, j = first[second < end], second[second < end]
            after = place[end % peers]
            change = (
                cost[place[i - 1], place[j]] + cost[place[end - 1], place[i]]
                + cost[place[j - 1], after] - before[i - 1] - before[j - 1] - before[end - 1]
            )  # fmt: skip
            least = int(change.argmin())
            if change[least] < gain:
                gain, cut = float(change[least]), (int(i[least]), int(j[least]), end)
        i, j, k = cut
        moved = tour[:i] + tour[j:k] + tour[i:j] + tour[k:]
        total = tour_cost(cost, moved)
        # Compared anew, as rounding in `change` could go on for ever.
        if not total < best:
            return tour
        tour, best = moved, total
