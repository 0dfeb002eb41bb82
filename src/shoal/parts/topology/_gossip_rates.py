"""How often each edge of a graph should gossip: the smallest total rate that mixes fast enough.

Accelerated gossip needs rates with chi_1 * chi_2 <= 1/2 (see `gossip_constants`). For shares p of
one event per unit of time the total rate sqrt(2 chi_1 chi_2) achieves that, so that the best shares
are those with the smallest product. chi_1 and chi_2 are convex in p, their product is not: it is
searched along the ratio of the two, and each point of the search is a convex problem,

    minimise sum(rates)   such that   chi_1 <= ratio / sqrt(2)   and   chi_2 <= 1 / (sqrt(2) ratio),

a semidefinite program of which only the rates are unknown. An interior-point method solves it up to
a few hundred edges, a multiplicative subgradient method more roughly beyond.

Source: Nabli and Oyallon 2023 (arXiv 2208.00779); log-det barriers as in Boyd and Vandenberghe
2004, chapter 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, cholesky, eigh
from scipy.optimize import minimize_scalar

from shoal.base.errors import UsageError
from shoal.parts.topology._measures import Edges, gossip_constants
from shoal.world.topology import Topology

Rates = Literal["uniform", "optimal"]

INTERIOR_EDGES = 300
"""Up to here an interior-point step, cubic in the edges, takes milliseconds."""

_POINTS = 9
_ACCURACY = 1e-7
_SUBGRADIENT_STEPS = 3000

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GossipRates:
    """Rates per unit of time of a graph's edges, with chi_1 * chi_2 = 1/2.

    edges: int64 [edges, 2], the smaller peer first, ascending; rates: float64 [edges].
    """

    peers: int
    edges: NDArray[np.int64]
    rates: Array
    chi_1: float
    chi_2: float

    @property
    def total(self) -> float:
        """Events per unit of time on all edges together."""
        return float(self.rates.sum())

    def of(self) -> dict[tuple[int, int], float]:
        """Edge -> rate."""
        return {
            (int(a), int(b)): float(r) for (a, b), r in zip(self.edges, self.rates, strict=True)
        }


def gossip_rates(peers: int, edges: Edges, how: Rates = "uniform") -> GossipRates:
    """Rates for the edges of a connected graph: all equal, or those of the smallest total.

    edges: [edges, 2], each pair once. Raises UsageError for a disconnected graph.

    >>> triangles = [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5)]
    >>> equal, best = gossip_rates(6, triangles), gossip_rates(6, triangles, "optimal")
    >>> round(equal.total, 3), round(best.total, 3)
    (10.572, 8.221)
    """
    if how not in get_args(Rates):
        raise UsageError(f"gossip: rates={how!r}; need one of {', '.join(get_args(Rates))}")
    pairs = np.sort(np.asarray(edges, dtype=np.int64).reshape(-1, 2), axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    shares = np.full(len(pairs), 1.0 / max(1, len(pairs)))
    chi_1, chi_2 = gossip_constants(peers, pairs, shares)
    if how == "optimal" and len(pairs) > 1:
        shares = _best(peers, pairs, chi_1, chi_2)
        chi_1, chi_2 = gossip_constants(peers, pairs, shares)
    total = math.sqrt(2.0 * chi_1 * chi_2)
    if not total:
        return GossipRates(peers, pairs, shares, 0.0, 0.0)
    return GossipRates(peers, pairs, total * shares, chi_1 / total, chi_2 / total)


def _best(peers: int, pairs: NDArray[np.int64], chi_1: float, chi_2: float) -> Array:
    """The shares of the smallest chi_1 * chi_2; (chi_1, chi_2) are those of equal shares."""
    # Where resistances are weighed by the rates they sum to peers - 1 (Foster), so that the largest
    # is never below that and chi_2 of shares never below this.
    least = (peers - 1) / 2.0
    highest = 0.5 * math.log(max(1.0, chi_1 * chi_2 / least**2))
    if highest < 1e-9:
        return np.full(len(pairs), 1.0 / len(pairs))
    if len(pairs) > INTERIOR_EDGES:
        return _subgradient(peers, pairs)
    columns = _columns(peers, pairs)
    points = np.linspace(0.0, highest, _POINTS)
    totals = [_smallest(columns, point, 1e-4).sum() for point in points]
    near = int(np.argmin(totals))
    found = minimize_scalar(
        lambda point: _smallest(columns, point, _ACCURACY).sum(),
        bounds=(points[max(0, near - 1)], points[min(near + 1, _POINTS - 1)]),
        method="bounded", options={"xatol": 1e-4},
    )  # fmt: skip
    rates = _smallest(columns, float(found.x), _ACCURACY)
    return rates / rates.sum()


def _columns(peers: int, pairs: NDArray[np.int64]) -> Array:
    """e_i - e_j of each edge in an orthonormal basis of what sums to 0 [peers - 1, edges]."""
    incidence = np.zeros((peers, len(pairs)))
    place = np.arange(len(pairs))
    incidence[pairs[:, 0], place] = 1.0
    incidence[pairs[:, 1], place] = -1.0
    basis = np.linalg.qr(np.column_stack((np.ones(peers), np.eye(peers)[:, 1:])))[0][:, 1:]
    return basis.T @ incidence


@dataclass(frozen=True)
class _Barrier:
    """Value, gradient and Hessian of the barrier at given rates; None outside of its domain."""

    columns: Array
    chi_1: float
    chi_2: float

    def value(self, rates: Array) -> float | None:
        if rates.min() <= 0.0:
            return None
        parts = self._parts(rates)
        if parts is None:
            return None
        above, _, slack = parts
        value = -2.0 * np.log(np.diag(above)).sum() - np.log(slack).sum() - np.log(rates).sum()
        return float(value)

    def slopes(self, rates: Array) -> tuple[Array, Array]:
        parts = self._parts(rates)
        assert parts is not None
        above, gram, slack = parts
        weight = 1.0 / slack
        spread = self.columns.T @ cho_solve((above, True), self.columns)
        squares = gram**2
        gradient = -np.diag(spread) - squares @ weight - 1.0 / rates
        hessian = spread**2 + (squares * weight**2) @ squares
        hessian += 2.0 * gram * ((gram * weight) @ gram)
        hessian[np.diag_indices_from(hessian)] += rates**-2.0
        return gradient, hessian

    def _parts(self, rates: Array) -> tuple[Array, Array, Array] | None:
        """Factor of (Laplacian - 1/chi_1), inner products through the inverse, slack of chi_2."""
        matrix = (self.columns * rates) @ self.columns.T
        try:
            above = cholesky(matrix - np.eye(len(matrix)) / self.chi_1, lower=True)
            factor = cholesky(matrix, lower=True)
        except LinAlgError:
            return None
        gram = self.columns.T @ cho_solve((factor, True), self.columns)
        slack = 2.0 * self.chi_2 - np.diag(gram)
        return (above, gram, slack) if slack.min() > 0.0 else None


def _smallest(columns: Array, log_ratio: float, accuracy: float) -> Array:
    """The smallest rates [edges] with chi_1 and chi_2 in this ratio and of product 1/2."""
    ratio = math.exp(log_ratio) / math.sqrt(2.0)
    barrier = _Barrier(columns, ratio, 0.5 / ratio)
    size, edges = columns.shape
    second, resistance = _equal(columns)
    rates = np.full(edges, 2.0 * max(1.0 / (second * ratio), resistance * ratio))
    parameter = size + 2 * edges
    sharpness = parameter / rates.sum()
    while True:
        rates = _centre(barrier, rates, sharpness)
        if parameter <= accuracy * sharpness * rates.sum():
            return rates
        sharpness *= 12.0


def _equal(columns: Array) -> tuple[float, float]:
    """lambda_2 and the largest resistance of an edge when every rate is 1."""
    matrix = columns @ columns.T
    solved = np.linalg.solve(matrix, columns)
    return float(np.linalg.eigvalsh(matrix)[0]), float((columns * solved).sum(0).max())


def _centre(barrier: _Barrier, rates: Array, sharpness: float) -> Array:
    """Damped Newton steps to the minimum of sharpness * sum(rates) + barrier."""
    value = barrier.value(rates)
    assert value is not None
    value += sharpness * rates.sum()
    for _ in range(60):
        gradient, hessian = barrier.slopes(rates)
        gradient += sharpness
        step = -cho_solve(cho_factor(hessian, lower=True), gradient)
        decrement = float(-gradient @ step)
        if decrement < 1e-9:
            break
        length = 1.0
        while length > 1e-12:
            there = rates + length * step
            new = barrier.value(there)
            if new is not None:
                new += sharpness * there.sum()
                if new <= value - 0.1 * length * decrement:
                    break
            length *= 0.5
        else:
            break
        rates, value = there, new
    return rates


def _subgradient(peers: int, pairs: NDArray[np.int64]) -> Array:
    """Shares of a small product, by multiplicative steps along a subgradient of its logarithm."""
    columns = _columns(peers, pairs)
    shares = np.full(len(pairs), 1.0 / len(pairs))
    best, least = shares, math.inf
    for step in range(_SUBGRADIENT_STEPS):
        matrix = (columns * shares) @ columns.T
        values, vectors = eigh(matrix)
        product = columns.T @ (vectors / values) @ vectors.T @ columns
        worst = int(np.argmax(np.diag(product)))
        reached = float(product[worst, worst] / values[0])
        if reached < least:
            best, least = shares, reached
        slope = (columns.T @ vectors[:, 0]) ** 2 / values[0]
        slope += product[worst] ** 2 / product[worst, worst]
        shares = shares * np.exp(slope / slope.max() / math.sqrt(1.0 + step))
        shares = np.maximum(shares / shares.sum(), 1e-9 / len(pairs))
        shares /= shares.sum()
    return best


def gossip_edges(topology: Topology, round: int = 0) -> NDArray[np.int64]:
    """The undirected edges of a topology's round, int64 [edges, 2], the smaller peer first.

    Raises UsageError when a peer may talk to one that may not talk to it: gossip is both ways.

    >>> from shoal.parts.topology.ring import Ring
    >>> gossip_edges(Ring(4)).tolist()
    [[0, 1], [0, 3], [1, 2], [2, 3]]
    """
    told = {(a, b) for a in range(topology.peers) for b in topology.neighbors(a, round)}
    for a, b in sorted(told):
        if (b, a) not in told:
            raise UsageError(
                f"gossip: peer {a} talks to {b}, but not {b} to {a}; pairs gossip both ways (take "
                "an undirected topology)"
            )
    return np.array(sorted(pair for pair in told if pair[0] < pair[1]), dtype=np.int64).reshape(
        -1, 2
    )
