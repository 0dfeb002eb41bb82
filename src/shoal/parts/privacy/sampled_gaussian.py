"""Renyi differential privacy of Gaussian noise on a sum of clipped records, drawn or not.

One record moves a sum by at most `clip`; the noise has standard deviation s * clip in each entry.
Where every record is drawn with probability p, independently of all others (Poisson sampling), the
divergence of order alpha is log A(alpha) / (alpha - 1), with x from N(0, s^2) and

    A(alpha) = E ((1 - p) + p exp((2 x - 1) / (2 s^2)))^alpha,

the larger of both directions, for a record that is there or not. Whole orders have a finite sum.
For others the expectation is an integral over the real line of a function that is analytic in a
strip, which the trapezoidal rule gets to the last digits.

Mironov, Talwar and Zhang 2019 (arXiv 1908.10530), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import numpy as np
from scipy.special import gammaln, logsumexp

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import Neighbours

Draws = Literal["poisson", "parts", "passes", "batches"]
"""How a round's records are found: each drawn independently; dealt into parts of which one is used
after the other; passes in a shuffled order; a fixed number drawn with replacement."""


def sampled_gaussian_renyi(s: float, p: float, rounds: int, order: float) -> float:
    """D_alpha of the Gaussian mechanism on a Poisson sample, at an order above 1, `rounds` times.

    Exact for adding or removing a record (the larger of both directions).

    >>> round(sampled_gaussian_renyi(2.0, 1.0, 1, 4), 3)  # everything is drawn: alpha / (2 s^2)
    0.5
    >>> round(sampled_gaussian_renyi(2.0, 0.1, 1, 4), 4), round(
    ...     sampled_gaussian_renyi(2.0, 0.1, 1, 4.5), 4)
    (0.006, 0.0069)
    """
    check_noise(s, p, rounds)
    if not 1 < order < math.inf:
        raise UsageError(f"sampled_gaussian_renyi: order={order}; need a finite order above 1")
    if p == 1:
        return rounds * order / (2 * s * s)
    moment = _finite_sum(s, p, int(order)) if order == int(order) else _integral(s, p, order)
    return rounds * max(0.0, moment) / (order - 1)


@lru_cache(maxsize=4096)
def _finite_sum(s: float, p: float, order: int) -> float:
    k = np.arange(order + 1)
    choose = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    weight = choose + (order - k) * math.log1p(-p) + k * math.log(p)
    return float(np.asarray(logsumexp(weight + (k * k - k) / (2 * s * s))))


def _integral(s: float, p: float, order: float) -> float:
    # With u = x / s the function's branch points lie pi s off the line, so its error at this
    # distance of points is exp(-2 pi^2 s / step) or less, and beyond the ends is 1e-32 of it.
    step = min(0.25, s / 8)
    u = np.arange(-12.0, order / s + 12.0 + step, step)
    inner = np.logaddexp(math.log1p(-p), math.log(p) + u / s - 1 / (2 * s * s))
    found = float(np.asarray(logsumexp(order * inner - u * u / 2)))
    return found + math.log(step) - math.log(2 * math.pi) / 2


@dataclass(frozen=True)
class GaussianRelease:
    """A noisy sum of clipped records, as the ledger counts it.

    noise: s, the noise's standard deviation over `clip`. p: the share of the records that a release
    uses. draws: how these are found; that nobody knows who was drawn is worth something
    (amplification by sampling) for "poisson" only, and a UsageError else. Take p = 1 then and count
    how often a record is used: once in a pass over parts, for instance. Neighbours: one record is
    there or not; of parts, passes and the like its place stays empty.

    >>> round(GaussianRelease(2.0).renyi(4.0), 3), round(GaussianRelease(2.0, 0.1).renyi(4.0), 4)
    (0.5, 0.006)
    """

    noise: float
    p: float = 1.0
    draws: Draws = "poisson"

    neighbours: ClassVar[Neighbours] = "removed"

    def __post_init__(self) -> None:
        if self.draws not in get_args(Draws):
            raise UsageError(
                f"GaussianRelease: draws={self.draws!r}; need one of {', '.join(get_args(Draws))}"
            )
        if self.noise != 0:
            check_noise(self.noise, self.p, 1)
        if self.p < 1 and self.draws != "poisson":
            raise UsageError(
                f"GaussianRelease: p={self.p} of the records by draws={self.draws!r}; only records "
                "that are drawn independently of each other (poisson) gain from sampling (draw so, "
                "or account with p = 1 for each time that a record is used)"
            )
        if self.draws == "batches":
            raise UsageError(
                "GaussianRelease: draws='batches'; a record that is drawn with replacement may "
                "come several times, and then moves the sum by several clips (draw poisson)"
            )

    def renyi(self, alpha: float) -> float:
        """D_alpha of one release; infinite without noise."""
        if self.noise == 0:
            return math.inf
        return sampled_gaussian_renyi(self.noise, self.p, 1, alpha)


def check_noise(s: float, p: float, rounds: int) -> None:
    """UsageError unless noise, sampling and rounds are numbers that make sense."""
    if not 0 < s < math.inf:
        raise UsageError(f"s={s}; need noise above 0 (its deviation over the sensitivity)")
    if not 0 < p <= 1:
        raise UsageError(f"p={p}; need a sampling probability above 0 and at most 1")
    if rounds < 1:
        raise UsageError(f"rounds={rounds}; need at least 1")
