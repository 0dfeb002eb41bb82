"""The order of a ring: a round tour over measured links that costs least.

A search is a generator of `Slice`s, small pieces of pure work, so that the same search runs at once
(`done_here`) or beside a program's other duties (`search`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.tensor.threads import one_thread

Matrix = np.ndarray
Order = tuple[int, ...]

_SETS = 4096
"""Sets of peers in a slice of the exact search."""
_BLOCK = 1 << 16
"""Elements that local search holds at once."""
_SLICE = 1 << 20
"""Elements of a slice of local search, if one step has no more."""


@dataclass(frozen=True)
class Slice:
    """A piece of a search: `function(*args, *static)`, pure, of tensors; some `elements` of
    work."""

    function: Callable[..., Any]
    args: tuple[Tensor, ...]
    static: tuple[int, ...]
    elements: int

    def done_here(self) -> Any:
        return self.function(*self.args, *self.static)


Steps = Generator[Slice, Any, Order]


def done_here(steps: Steps) -> Order:
    """The outcome of a search, slice after slice in this thread."""
    found = None
    while True:
        try:
            found = steps.send(found).done_here()
        except StopIteration as stop:
            return stop.value


@dataclass(frozen=True)
class Tour:
    """A round tour over all peers of a cost matrix [peers, peers], from row to column.

    Up to `exact` peers the cheapest tour; above that the best of `starts` nearest-neighbour tours
    after `improved` steps, which end early once they have looked at `effort` elements (some 0.1 s).
    The costs may be asymmetric. Local search gives no bound.

    >>> Tour().order(np.array([[0, 9, 1], [1, 0, 9], [9, 1, 0]]))
    (0, 2, 1)
    """

    exact: int = 12
    starts: int = 8
    seed: int = 0
    effort: int = 20_000_000

    def __post_init__(self) -> None:
        if not 1 <= self.exact <= 20 or self.starts < 1 or self.effort < 1:
            raise UsageError(
                f"tour: exact={self.exact}, starts={self.starts}, effort={self.effort}; need exact "
                "from 1 to 20 (memory doubles with each peer), starts and effort >= 1"
            )

    def order(self, cost: Matrix) -> Order:
        """Peers in the order of the tour, beginning with 0."""
        cost = np.asarray(cost, np.float64)
        if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not np.isfinite(cost).all():
            raise UsageError(
                f"tour: cost of shape {cost.shape}; need a square matrix of finite numbers"
            )
        with one_thread():
            return done_here(cheapest(cost)) if len(cost) <= self.exact else self._search(cost)

    def _search(self, cost: Matrix) -> Order:
        found = []
        left = self.effort
        for start in range(min(self.starts, len(cost))):
            first = int(keyed.uniform(self.seed, "tour", start) * len(cost))
            tour = _nearest(cost, first)
            steps, after = descent(cost, tour), None
            # What is found when the effort is spent is a tour like any other.
            while left > 0:
                try:
                    piece = steps.send(after)
                except StopIteration:
                    break
                left -= piece.elements
                after = piece.done_here()
                tour = tuple(after.tolist())
            found.append((tour_cost(cost, tour), tour))
            if left <= 0:
                break
        return from_zero(min(found)[1])


def tour_cost(cost: Matrix, order: Order) -> float:
    """Sum of the edges of the round tour."""
    place = np.array(order, np.int64)
    return float(np.asarray(cost)[place, np.roll(place, -1)].sum())


def link_cost(rate_bit_per_s: Matrix) -> Matrix:
    """1000 / Mbit/s of each link: the edge cost of PCCL's topology optimisation."""
    with np.errstate(divide="ignore"):
        cost = 1e9 / np.asarray(rate_bit_per_s, np.float64)
    return np.where(np.isfinite(cost), cost, 1e9)


def from_zero(order: Order) -> Order:
    """The same round tour, beginning with peer 0."""
    at = order.index(0)
    return order[at:] + order[:at]


# The cheapest tour.


def cheapest(cost: Matrix) -> Steps:
    """The cheapest tour, O(2^n n^2) (Held and Karp 1962, doi 10.1137/0110015), set size by set
    size: paths of two sizes are held at once, and of the others where they came from, one byte
    per set and peer: 10 MB for 20 peers.

    best[set, j]: cheapest path from 0 through all of the set (of 1..n-1) that ends in j.
    """
    rest = len(cost) - 1
    if rest < 1:
        return tuple(range(rest + 1))
    there, back = torch.from_numpy(cost[0, 1:].copy()), torch.from_numpy(cost[1:, 0].copy())
    between = torch.from_numpy(cost[1:, 1:].copy())
    numbers = np.arange(1 << rest, dtype=np.int64)
    sizes = sum((numbers >> peer) & 1 for peer in range(rest))
    sets = torch.from_numpy(numbers[sizes == 1])
    best = torch.where(torch.eye(rest, dtype=torch.bool, device="cpu"), there, math.inf)
    came: list[tuple[Tensor, Tensor]] = []
    for size in range(2, rest + 1):
        larger = torch.from_numpy(numbers[sizes == size])
        parts = []
        for some in larger.split(_SETS):
            elements = len(some) * size * rest
            parts.append((yield Slice(_longer_paths, (sets, best, some, between), (), elements)))
        sets, best = larger, torch.cat([part[0] for part in parts])
        came.append((sets, torch.cat([part[1] for part in parts])))
    last = int((best[0] + back).argmin())
    path, through = [last], (1 << rest) - 1
    for sets, before in reversed(came):
        at = int(torch.searchsorted(sets, through))
        through, last = through ^ (1 << last), int(before[at, last])
        path.append(last)
    return (0, *(peer + 1 for peer in reversed(path)))


def _longer_paths(
    sets: Tensor, best: Tensor, larger: Tensor, between: Tensor
) -> tuple[Tensor, Tensor]:
    """Paths through some sets that have one peer more: (costs, peers before the last)."""
    rest = len(between)
    costs = torch.full((len(larger), rest), math.inf, dtype=best.dtype, device=best.device)
    before = torch.zeros(len(larger), rest, dtype=torch.int8, device=best.device)
    for last in range(rest):
        here = (larger >> last & 1).nonzero()[:, 0]
        paths = best[torch.searchsorted(sets, larger[here] ^ (1 << last))] + between[:, last]
        least = paths.min(1)
        costs[here, last] = least.values
        before[here, last] = least.indices.to(torch.int8)
    return costs, before


# Local search.


def descent(cost: Matrix, tour: Order, keep: Callable[[Order], None] = lambda order: None) -> Steps:
    """`improved` again and again, until no step makes the tour cheaper; `keep` is told each."""
    peers = len(tour)
    steps = max(1, _SLICE // peers**3)
    table, place = torch.from_numpy(cost), torch.tensor(tour, dtype=torch.int64, device="cpu")
    while True:
        after = yield Slice(improved, (table, place), (steps,), steps * peers**3)
        if torch.equal(after, place):
            return tuple(place.tolist())
        place = after
        keep(from_zero(tuple(place.tolist())))


def improved(cost: Tensor, place: Tensor, steps: int) -> Tensor:
    """The tour [peers] after at most so many steps, each the best of all exchanges of two
    neighbouring segments (which keeps directions) and all reversals of one. Every exchange is
    looked at, in a few operations on blocks of them."""
    total = _total(cost, place)
    for _ in range(steps):
        kept = min(_exchanged(cost, place), _reversed(cost, place), key=lambda way: way[0])
        after = _total(cost, kept[1])
        # Compared anew, as rounding in a gain could go on for ever.
        if not (kept[0] < 0 and after < total):
            return place
        place, total = kept[1], after
    return place


def _total(cost: Tensor, place: Tensor) -> float:
    return float(cost[place, place.roll(-1)].sum())


def _exchanged(cost: Tensor, place: Tensor) -> tuple[float, Tensor]:
    """a b c -> a c b with b = place[i:j], c = place[j:k], 1 <= i < j < k <= peers: (gain, tour)."""
    peers = len(place)
    cyclic = torch.cat((place, place[:1]))
    # along[x, y]: from place x - 1 to place y; its diagonal are the edges of the tour.
    along = cost[place][:, cyclic]
    along = torch.cat((along[-1:], along))
    edge = along.diagonal()
    upper = torch.where(
        torch.ones_like(along, dtype=torch.bool).triu(1), along - edge[:, None], math.inf
    )
    best, cut = 0.0, (1, 1, 1)
    block = max(1, _BLOCK // (peers + 1) ** 2)
    for start in range(1, peers - 1, block):
        some = slice(start, min(start + block, peers - 1))
        # [i, j, k] = (i - 1 to j) + (k - 1 to i) + (j - 1 to k), less the edges that go.
        change = upper[some, :, None] + (along[:, some].T - edge)[:, None, :] + upper
        least = int(change.argmin())
        value = float(change.view(-1)[least])
        if value < best:
            i, rest = divmod(least, (peers + 1) ** 2)
            best, cut = value, (start + i, *divmod(rest, peers + 1))
    i, j, k = cut
    return best, torch.cat((place[:i], place[j:k], place[i:j], place[k:]))


def _reversed(cost: Tensor, place: Tensor) -> tuple[float, Tensor]:
    """a b c -> a (b backwards) c with b = place[i:j], 1 <= i < j <= peers: (gain, tour)."""
    peers = len(place)
    cyclic = torch.cat((place, place[:1]))
    edges, backwards = cost[cyclic[:-1], cyclic[1:]], cost[cyclic[1:], cyclic[:-1]]
    # What all edges up to a place cost more when they are run backwards.
    more = torch.cat((edges.new_zeros(1), (backwards - edges).cumsum(0)))
    table = cost[cyclic][:, cyclic]
    i = torch.arange(1, peers, device=cost.device)[:, None]
    j = torch.arange(2, peers + 1, device=cost.device)[None, :]
    change = table[i - 1, j - 1] + table[i, j] - edges[i - 1] - edges[j - 1] + more[j - 1] - more[i]
    change = torch.where(j > i, change, math.inf)
    least = int(change.argmin())
    value = float(change.view(-1)[least])
    row, column = divmod(least, peers - 1)
    at, end = row + 1, column + 2
    return value, torch.cat((place[:at], place[at:end].flip(0), place[end:]))


def _nearest(cost: Matrix, first: int) -> Order:
    tour, left = [first], np.ones(len(cost), bool)
    left[first] = False
    while left.any():
        tour.append(int(np.where(left, cost[tour[-1]], math.inf).argmin()))
        left[tour[-1]] = False
    return tuple(tour)
