"""Renyi differential privacy of momentum that is released with Gaussian noise in every round.

A client samples each record with probability p, its momentum takes up the clipped gradients of
those it drew, m <- beta m + (1 - beta) b, and what is released moves by at most S m when one record
is added or removed, S = clip / (p |D|). The same record moves many releases, so the accountants of
noisy gradients do not hold for it.

Given the record's bits b_t the releases are adaptive Gaussian mechanisms, of divergence
alpha sum_t m_t^2 / (2 s^2) with s the noise's standard deviation over S. By joint convexity

    exp((alpha - 1) D_alpha) <= E_b exp(lam sum_t m_t^2),    lam = alpha (alpha - 1) / (2 s^2),

in both directions. V_t(m) = log E_b exp(lam m'^2 + V_(t+1)(m')) is computed backwards on a grid of
m. Each V_t is convex, as log-sum-exp of convex functions of an affine map is, so that a chord lies
above it: interpolation between grid points only ever overstates what is spent.

The bound is on top of what it bounds for beta > 0 too: it grants nothing for not knowing which
bits fell. At beta = 0 the exact subsampled Gaussian mechanism (Mironov, Talwar and Zhang 2019,
section 3.3) is below it, and the less of both is taken.

Setting: Gu, Zhao, Yu and Xiong 2025 (DP-BREM, arXiv 2306.12608); the bound replaces their theorem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import to_epsilon
from shoal.parts.privacy.calibrate import inverted
from shoal.parts.privacy.sampled_gaussian import check_noise, sampled_gaussian_renyi

ORDERS = (
    *(1.0 + step / 10 for step in range(1, 10)), *(float(order) for order in range(2, 65)),
    *(80.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0),
)  # fmt: skip
"""Over which `momentum_epsilon` takes the least."""


def momentum_renyi(
    s: float, p: float, rounds: int, beta: float, orders: Sequence[float] = ORDERS,
    points: int = 129,
) -> tuple[float, ...]:  # fmt: skip
    """The bound on D_alpha at each order, after `rounds` releases; see `momentum_epsilon`.

    points: of the grid of m in [0, 1]; more are closer to the expectation, from above.

    >>> round(momentum_renyi(2.0, 1.0, 1, 0.0, orders=[4.0])[0], 3)  # one Gaussian: alpha / (2 s^2)
    0.5
    """
    _check(s, p, rounds, beta)
    if points < 2 or min(orders) <= 1:
        raise UsageError(
            f"momentum_renyi: points={points}, orders from {min(orders)}; need at least 2 points "
            "and orders above 1"
        )
    alpha = np.asarray(orders, dtype=np.float64)[:, None]
    lam = alpha * (alpha - 1) / (2 * s * s)
    memory = np.linspace(0.0, 1.0, points)
    left, drawn = beta * memory, beta * memory + (1 - beta)
    to_left, to_drawn = _chords(left, points), _chords(drawn, points)
    with np.errstate(divide="ignore"):
        spent_left = lam * left**2 + np.log1p(-p)
    spent_drawn = lam * drawn**2 + math.log(p)
    after = np.zeros((len(orders), points))
    for _ in range(rounds):
        after = np.logaddexp(spent_left + after @ to_left, spent_drawn + after @ to_drawn)
    return tuple((after[:, 0] / (alpha[:, 0] - 1)).tolist())


def _chords(at: NDArray[np.float64], points: int) -> NDArray[np.float64]:
    """Linear interpolation as a matrix [points, points]: values on the grid of [0, 1] times it are
    those at `at`."""
    place = np.clip(at, 0.0, 1.0) * (points - 1)
    low = np.minimum(place.astype(np.int64), points - 2)
    out, column = np.zeros((points, points)), np.arange(points)
    out[low, column] = 1 - (place - low)
    out[low + 1, column] = place - low
    return out


def momentum_epsilon(
    s: float, p: float, T: int, beta: float, delta: float, *, orders: Sequence[float] = ORDERS,
    points: int = 129, tight: bool = False,
) -> float:  # fmt: skip
    """epsilon of (epsilon, delta)-privacy of a record in T releases of a client's momentum.

    s: standard deviation of the noise in each release over the sensitivity S; for DP-BREM
    s = sigma p |D|, so clients with fewer records spend more. p: probability with which each record
    is drawn in a round, independently (Poisson sampling; batches of a fixed size are not covered).
    tight: convert as in `shoal.parts.privacy.accountant.to_epsilon`. Neighbours differ by one
    record that is there or not; one that is replaced moves releases by 2 S (halve s).
    Breaks where the noise of a round is scaled down with the clip: older gradients in the momentum
    were clipped at the larger one.

    >>> round(momentum_epsilon(2.0, 0.05, 200, 0.9, 1e-5), 1)
    3.8
    """
    spent = momentum_renyi(s, p, T, beta, orders, points)
    found = to_epsilon(orders, spent, delta, tight=tight)
    if beta == 0:
        whole = [order for order in orders if order >= 2 and order == int(order)]
        if whole:
            exact = [sampled_gaussian_renyi(s, p, T, int(order)) for order in whole]
            found = min(found, to_epsilon(whole, exact, delta, tight=tight))
    return found


@lru_cache(maxsize=64)
def momentum_noise(epsilon: float, p: float, T: int, beta: float, delta: float) -> float:
    """The s at which `momentum_epsilon` is epsilon, or less by a hair: never more.

    UsageError where none from 0.05 to 1e4 is.

    >>> s = momentum_noise(8.0, 0.1, 150, 0.9, 1e-4)
    >>> round(momentum_epsilon(s, 0.1, 150, 0.9, 1e-4), 6)
    8.0
    """
    low, high = 0.05, 1e4
    ends = [momentum_epsilon(s, p, T, beta, delta) for s in (high, low)]
    if not ends[0] <= epsilon <= ends[1]:
        raise UsageError(
            f"momentum_noise: epsilon={epsilon}; from {ends[0]:.4g} to {ends[1]:.4g} are in reach "
            f"with s from {low:g} to {high:g} (fewer rounds or a smaller p lower the cost)"
        )

    def cost(log_s: float) -> float:
        # In logarithms the cost is nearly a line, which takes a few evaluations.
        return math.log(momentum_epsilon(math.exp(log_s), p, T, beta, delta))

    s, more = math.exp(inverted(cost, math.log(epsilon), math.log(low), math.log(high))), 1e-10
    while momentum_epsilon(s, p, T, beta, delta) > epsilon:
        # A root is met from either side.
        s, more = s * (1 + more), 4 * more
    return s


def _check(s: float, p: float, rounds: int, beta: float) -> None:
    if not 0 <= beta < 1:
        raise UsageError(f"beta={beta}; need 0 <= beta < 1 (0 = no momentum)")
    check_noise(s, p, rounds)
