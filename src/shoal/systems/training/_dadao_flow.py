"""DADAO's constants, its flow between events, and its two jumps.

A peer keeps six vectors, the rows of its state [..., 6, dim]: x, x~, y, y~, z, z~. Between events
they follow a linear differential equation whose 6x6 matrix is the same for all coordinates, so that
its exponential integrates it exactly. The matrix is nearly defective: its exponential comes from a
Taylor series with scaling and squaring, never from eigenvectors.

Nabli and Oyallon 2023 (arXiv 2208.00779).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shoal.base.errors import UsageError

Array = NDArray[np.float64]

X, X_FAST, Y, Y_FAST, Z, Z_FAST = range(6)
"""Rows of a state; the `fast` one of a pair is the one with a tilde."""

_TERMS = 14
_SCALE = 0.5
"""Where the series is summed: 0.5^15 / 15! is far below rounding."""


@dataclass(frozen=True)
class Constants:
    """What follows from mu, L and chi_1 (of the gossip rates).

    mu, smoothness: every peer's function is mu-strongly convex and L-smooth (the worst of all).
    """

    mu: float
    smoothness: float
    chi_1: float

    def __post_init__(self) -> None:
        if not 0.0 < self.mu <= self.smoothness < math.inf:
            raise UsageError(
                f"dadao: mu={self.mu}, smoothness={self.smoothness}; need 0 < mu <= smoothness "
                "(of the worst peer)"
            )
        if not 0.0 <= self.chi_1 < math.inf:
            raise UsageError(f"dadao: chi_1={self.chi_1}; need a finite number >= 0")

    @property
    def nu(self) -> float:
        """The part of the curvature that the dual variables see."""
        return self.mu / 2.0

    @property
    def pace(self) -> float:
        """sqrt(nu / L), what all rates are multiples of."""
        return math.sqrt(self.nu / self.smoothness)

    @property
    def rate(self) -> float:
        """The flow's slow rate: log squared distances fall by this per unit of time, or faster."""
        return self.pace / 8.0

    def generator(self) -> Array:
        """The matrix A of d/dt state = A state, float64 [6, 6]."""
        eta, alpha, theta = self.pace / 8.0, self.pace / 4.0, 0.5 / self.pace
        matrix = np.zeros((6, 6))
        matrix[X, X], matrix[X, X_FAST] = -eta, eta
        matrix[X_FAST, X], matrix[X_FAST, X_FAST] = eta, -eta
        matrix[Y, Y], matrix[Y, Y_FAST] = -alpha, alpha
        matrix[Y_FAST, [X_FAST, Y, Z]] = -theta * self.nu, -theta, -theta
        matrix[Z, Z], matrix[Z, Z_FAST] = -alpha, alpha
        matrix[Z_FAST, Z], matrix[Z_FAST, Z_FAST] = eta, -eta
        return matrix

    def gradient_jump(self) -> Array:
        """What a row gains per u = gradient(x) - nu x - y~ at a gradient event, float64 [6]."""
        jump = np.zeros(6)
        jump[X] = -0.25 / self.smoothness
        jump[X_FAST] = -0.25 / math.sqrt(self.smoothness * self.nu)
        jump[Y_FAST] = self.pace / 4.0 + 1.0
        return jump

    def gossip_jump(self) -> Array:
        """What a row gains per d = own (y + z) - the other's at a gossip event, float64 [6]."""
        jump = np.zeros(6)
        jump[Z] = -0.5
        jump[Z_FAST] = -2.0 * self.chi_1 / self.pace
        return jump


@njit(cache=True)
def flow(generator: Array, elapsed: float) -> Array:
    """exp(generator * elapsed), float64 [6, 6]; elapsed >= 0.

    >>> import numpy as np
    >>> turn = flow(np.array([[0.0, -1.0], [1.0, 0.0]]), np.pi / 2)
    >>> bool(np.allclose(turn, [[0.0, -1.0], [1.0, 0.0]]))
    True
    """
    size = generator.shape[0]
    most = 0.0
    for column in range(size):
        total = 0.0
        for row in range(size):
            total += abs(generator[row, column])
        most = max(most, total * elapsed)
    doublings = 0
    while most > _SCALE:
        most *= 0.5
        doublings += 1
    step = generator * (elapsed / 2.0**doublings)
    found = np.eye(size)
    for term in range(_TERMS, 0, -1):
        found = _product(step, found) / term
        for row in range(size):
            found[row, row] += 1.0
    for _ in range(doublings):
        found = _product(found, found)
    return found


@njit(cache=True)
def _product(first: Array, second: Array) -> Array:
    size = first.shape[0]
    found = np.zeros((size, size))
    for i in range(size):
        for k in range(size):
            for j in range(size):
                found[i, j] += first[i, k] * second[k, j]
    return found
