"""What DADAO is compared with on quadratics: dual and primal accelerated methods, and plain ones.

A synchronous method is a generator of the peers' points [peers, dim], one per iteration, in which
every peer takes one gradient and every edge carries `waves` exchanges (one vector each way).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from scipy.linalg import eigvalsh

from shoal.parts.topology._gossip_rates import GossipRates
from shoal.parts.topology._measures import effective_resistance, laplacian
from shoal.systems.training._dadao_flow import Array
from shoal.systems.training._dadao_loop import Agenda, Problem


@dataclass(frozen=True, eq=False)
class World:
    """A problem on a graph. mu, smoothness: of the worst peer; start: [peers, dim]."""

    problem: Problem
    mu: float
    smoothness: float
    start: Array
    rates: GossipRates

    @property
    def condition(self) -> float:
        return self.smoothness / self.mu

    @cached_property
    def gossip(self) -> tuple[Array, float]:
        """The Laplacian over its largest eigenvalue [peers, peers]; its smallest positive one."""
        matrix = laplacian(len(self.start), self.rates.edges)
        values = eigvalsh(matrix)
        scaled = np.asarray(matrix / values[-1], dtype=np.float64)
        return scaled, float(values[1] / values[-1])

    def gradient(self, points: Array) -> Array:
        away = points - self.problem.centres
        return np.einsum("pij,pj->pi", self.problem.matrices, away)

    @cached_property
    def _inverses(self) -> Array:
        return np.linalg.inv(self.problem.matrices)

    def dual_gradient(self, slopes: Array) -> Array:
        """Where each peer's gradient is its row of `slopes`."""
        return self.problem.centres + np.einsum("pij,pj->pi", self._inverses, slopes)


def ssda(world: World) -> Iterator[Array]:
    """Single-step dual acceleration (Scaman et al. 2017, algorithm 1; arXiv 1702.08704)."""
    matrix, gap = world.gossip
    root = math.sqrt(world.condition)
    momentum = (root - math.sqrt(gap)) / (root + math.sqrt(gap))
    return _dual(world, lambda x: matrix @ x, world.mu, momentum)


def msda(world: World) -> Iterator[Array]:
    """Multi-step dual acceleration: Chebyshev gossip (Scaman et al. 2017, algorithm 2)."""
    matrix, gap = world.gossip
    waves = chebyshev_waves(world)
    if waves == 1:
        return ssda(world)
    c_1 = (1.0 - math.sqrt(gap)) / (1.0 + math.sqrt(gap))
    c_2 = (1.0 + gap) / (1.0 - gap)
    scaled = np.eye(len(matrix)) - 2.0 / (1.0 + gap) * matrix
    power = c_1**waves
    root = math.sqrt(world.condition)
    step = world.mu * (1.0 + c_1 ** (2 * waves)) / (1.0 + power) ** 2
    momentum = ((1.0 + power) * root - 1.0 + power) / ((1.0 + power) * root + 1.0 - power)

    def polynomial(x: Array) -> Array:
        # 1 - T_K(c_2 (1 - c_3 W)) / T_K(c_2), by the recurrence of Chebyshev polynomials.
        before, now = x, c_2 * (scaled @ x)
        a_before, a_now = 1.0, c_2
        for _ in range(1, waves):
            before, now = now, 2.0 * c_2 * (scaled @ now) - before
            a_before, a_now = a_now, 2.0 * c_2 * a_now - a_before
        return x - now / a_now

    return _dual(world, polynomial, step, momentum)


def chebyshev_waves(world: World) -> int:
    """How many waves of exchanges an iteration of MSDA has."""
    return max(1, math.floor(1.0 / math.sqrt(world.gossip[1]) + 1e-9))


def _dual(
    world: World, mix: Callable[[Array], Array], step: float, momentum: float
) -> Iterator[Array]:
    x = y = np.zeros_like(world.start)
    while True:
        points = world.dual_gradient(x)
        yield points
        new = x - step * mix(points)
        x, y = (1.0 + momentum) * new - momentum * y, new


def adom_plus(world: World, consensus: bool = False) -> Iterator[Array]:
    """ADOM+ (Kovalev et al. 2021; arXiv 2106.04469) with its theory's constants.

    consensus: each iteration mixes often enough that the graph counts as one of chi = 2.
    """
    matrix, gap = world.gossip
    mu, smoothness, chi = world.mu, world.smoothness, 1.0 / gap
    waves = consensus_waves(world) if consensus else 1
    if waves > 1:
        chi = 2.0
        identity = np.eye(len(matrix))
        matrix = identity - np.linalg.matrix_power(identity - matrix, waves)
    tau_2 = math.sqrt(mu / smoothness)
    tau_1 = 1.0 / (1.0 / tau_2 + 0.5)
    sigma_2 = tau_2 / (16.0 * chi)
    sigma_1 = 1.0 / (1.0 / sigma_2 + 0.5)
    eta, alpha, beta, nu = 1.0 / (smoothness * tau_2), mu / 2.0, 0.5 / smoothness, mu / 2.0
    delta, zeta = 1.0 / (17.0 * smoothness), 0.5
    gamma, theta = nu / (14.0 * sigma_2 * chi**2), nu / (4.0 * sigma_2)
    shrink = 1.0 + eta * alpha
    x = x_f = world.start
    y = y_f = z = z_f = m = np.zeros_like(x)
    while True:
        x_g = tau_1 * x + (1.0 - tau_1) * x_f
        y_g = sigma_1 * y + (1.0 - sigma_1) * y_f
        z_g = sigma_1 * z + (1.0 - sigma_1) * z_f
        pull = world.gradient(x_g) - nu * x_g
        # x and y stand on both sides of their updates; two equations, solved for y first.
        known = x + eta * alpha * x_g - eta * pull
        right = y + theta * beta * pull - theta * ((y_g + z_g) / nu + known / shrink)
        y_new = right / (1.0 + theta * beta + theta * eta / shrink)
        x_new = (known + eta * y_new) / shrink
        told = gamma / nu * (y_g + z_g) + m
        mixed = matrix @ told
        z_new = z + gamma * delta * (z_g - z) - mixed
        m = told - mixed
        x_f = x_g + tau_2 * (x_new - x)
        y_f = y_g + sigma_2 * (y_new - y)
        z_f = z_g - zeta * (matrix @ (y_g + z_g))
        x, y, z = x_new, y_new, z_new
        yield x


def consensus_waves(world: World) -> int:
    """How many waves of exchanges an iteration of ADOM+ has with multi-consensus."""
    return max(1, math.ceil(math.log(2.0) / world.gossip[1] - 1e-9))


def gradient_tracking(world: World, lr: float) -> Iterator[Array]:
    """Adapt, then combine; Metropolis weights; two vectors per exchange (Pu and Nedic 2021)."""
    edges = world.rates.edges
    degree = np.bincount(edges.ravel(), minlength=len(world.start))
    weights = 1.0 / (1.0 + np.maximum(degree[edges[:, 0]], degree[edges[:, 1]]))
    matrix = np.eye(len(degree)) - laplacian(len(degree), edges, weights)
    x = world.start
    before = tracker = world.gradient(x)
    while True:
        x = matrix @ (x - lr / world.smoothness * tracker)
        now = world.gradient(x)
        tracker = matrix @ (tracker + now - before)
        before = now
        yield x


def continuized(world: World, events: Agenda, target: float) -> tuple[int, float, bool]:
    """Randomised dual gossip (Even et al. 2021, appendix H; arXiv 2106.07644).

    events: gossip alone, one per unit of time in all. (events run, the last mean squared distance,
    whether it was `target` or less); each event takes two dual gradients.
    """
    edges = world.rates.edges
    share = np.full(len(edges), 1.0 / len(edges))
    values = eigvalsh(laplacian(len(world.start), edges, share))
    resistance = effective_resistance(len(world.start), edges, share)
    most, mu = float(resistance.max()), world.mu
    eta = math.sqrt(values[1] / (2.0 * most) * mu / world.smoothness)
    fast = math.sqrt(world.smoothness * mu / (2.0 * values[1] * most))
    step = np.zeros((len(world.start), len(world.start)))
    step[edges[:, 0], edges[:, 1]] = mu / (2.0 * most) * resistance
    return _continuized(
        events.dates, events.first, events.second, world._inverses, world.problem.centres,
        world.problem.minimum, eta, step, fast, target,
    )  # fmt: skip


@njit(cache=True)
def _continuized(dates, first, second, inverses, centres, minimum, eta, step, fast, target):
    peers, dim = centres.shape
    y, z = np.zeros((peers, dim)), np.zeros((peers, dim))
    last, apart = np.zeros(peers), np.zeros(peers)
    for peer in range(peers):
        apart[peer] = _apart(centres[peer], minimum)
    points = np.zeros((2, dim))
    for event in range(len(dates)):
        ends = (first[event], second[event])
        for end in range(2):
            peer = ends[end]
            # The sum of y and z stays, their difference decays.
            decay = np.exp(-2.0 * eta * (dates[event] - last[peer]))
            for i in range(dim):
                middle = 0.5 * (y[peer, i] + z[peer, i])
                half = 0.5 * decay * (y[peer, i] - z[peer, i])
                y[peer, i], z[peer, i] = middle + half, middle - half
            last[peer] = dates[event]
            _times(inverses[peer], y[peer], centres[peer], 1.0, points[end])
        a, b = ends
        for i in range(dim):
            gap = points[0, i] - points[1, i]
            y[a, i] -= step[a, b] * gap
            y[b, i] += step[a, b] * gap
            z[a, i] -= fast * gap
            z[b, i] += fast * gap
        for end in range(2):
            _times(inverses[ends[end]], z[ends[end]], centres[ends[end]], 1.0, points[end])
            apart[ends[end]] = _apart(points[end], minimum)
        if apart.mean() <= target:
            return event + 1, apart.mean(), True
    return len(dates), apart.mean(), False


@njit(cache=True)
def _times(matrix, vector, offset, scale, found):
    """found = scale * offset + matrix vector."""
    for i in range(len(vector)):
        found[i] = scale * offset[i]
        for j in range(len(vector)):
            found[i] += matrix[i, j] * vector[j]


@njit(cache=True)
def _apart(point, minimum):
    total = 0.0
    for i in range(len(point)):
        total += (point[i] - minimum[i]) ** 2
    return total


def asynchronous_gossip(world: World, events: Agenda, lr: float, marks: int) -> Array:
    """Gradient steps and pairwise averages at DADAO's events: distances at times [marks]."""
    whole = float(events.dates[-1])
    return _gossip(
        events.dates, events.first, events.second, world.start.copy(),
        np.ascontiguousarray(world.problem.matrices), world.problem.centres,
        world.problem.minimum, lr / world.smoothness, whole / marks, np.zeros(marks),
    )  # fmt: skip


@njit(cache=True)
def _gossip(dates, first, second, x, matrices, centres, minimum, lr, width, distances):
    peers, dim = x.shape
    mark = 0
    away, slope = np.zeros(dim), np.zeros(dim)
    for event in range(len(dates)):
        while mark < len(distances) and dates[event] >= (mark + 1) * width:
            for peer in range(peers):
                distances[mark] += _apart(x[peer], minimum) / peers
            mark += 1
        a, b = first[event], second[event]
        if b < 0:
            for i in range(dim):
                away[i] = x[a, i] - centres[a, i]
            _times(matrices[a], away, away, 0.0, slope)
            for i in range(dim):
                x[a, i] -= lr * slope[i]
        else:
            for i in range(dim):
                x[a, i] = x[b, i] = 0.5 * (x[a, i] + x[b, i])
    for peer in range(peers):
        distances[mark:] += _apart(x[peer], minimum) / peers
    return distances
