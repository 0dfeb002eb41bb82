"""What several releases have spent together: Renyi divergences add up, order by order.

    ledger = Ledger().after(GaussianRelease(1.1, p=0.05), 200)
    ledger.epsilon(1e-5)

Releases may depend on what earlier ones showed (adaptive composition); their settings may not.
Mironov 2017 (arXiv 1702.07476), proposition 1; conversion: Canonne, Kamath and Steinke 2020
(arXiv 2004.00010), proposition 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import to_epsilon
from shoal.parts.privacy.calibrate import inverted

ORDERS = (*(float(order) for order in range(2, 64)), 128.0, 256.0, 512.0, 1024.0)
"""Over which `epsilon` takes the least: whole ones, at which dp-accounting and this package agree
to the last digits."""

FINE_ORDERS = (*(1.0 + step / 10 for step in range(1, 100)), *ORDERS[9:])
"""Those between as well, which pays above epsilon = 5. Here divergences are exact; dp-accounting
(0.6) sums their series without signs, and is above them: by 17% at order 1.1, noise 0.4 and
p = 0.001."""


class Release(Protocol):
    """Something that was shown: `renyi(alpha)` bounds the divergence between neighbours."""

    def renyi(self, alpha: float) -> float: ...


@dataclass(frozen=True)
class Ledger:
    """entries: (release, how many times). Immutable: `after` gives a longer one.

    All releases must be about the same notion of neighbours; those of this package are: one record
    (or, of whole messages, one client) that is there or not.

    >>> from shoal.parts.privacy.sampled_gaussian import GaussianRelease
    >>> ledger = Ledger().after(GaussianRelease(1.1, p=0.05), 200)
    >>> round(ledger.epsilon(1e-5), 3)
    4.468
    >>> Ledger().epsilon(1e-5)
    0.0
    """

    entries: tuple[tuple[Release, int], ...] = ()

    def after(self, release: Release, times: int = 1) -> Ledger:
        """This ledger and `times` more releases; none if times is 0."""
        if times < 0 or times != int(times):
            raise UsageError(f"Ledger: times={times}; need a whole number of 0 or more")
        return Ledger((*self.entries, (release, int(times)))) if times else self

    def curve(self, orders: Sequence[float] = ORDERS) -> tuple[float, ...]:
        """The sum of all releases' divergences at each order."""
        return tuple(
            math.fsum(times * release.renyi(alpha) for release, times in self.entries)
            for alpha in orders
        )

    def epsilon(self, delta: float, orders: Sequence[float] = ORDERS) -> float:
        """epsilon of (epsilon, delta)-privacy; 0 of nothing, infinite where noise is missing."""
        to_epsilon([2.0], [0.0], delta)  # refuses a delta that is none
        spent = self.curve(orders)
        # To tell P from Q within a total variation of delta costs nothing (Bretagnolle and Huber).
        if not self.entries or any(delta * delta + math.expm1(-each) > 0 for each in spent):
            return 0.0
        return to_epsilon(orders, spent, delta, tight=True)


def noise_for(
    epsilon: float, delta: float, spent: Callable[[float], Ledger], low: float = 0.05,
    high: float = 1e4,
) -> float:  # fmt: skip
    """The noise between `low` and `high` at which the ledger `spent(noise)` has that epsilon.

    UsageError where none has.

    >>> from shoal.parts.privacy.sampled_gaussian import GaussianRelease
    >>> noise = noise_for(2.0, 1e-5, lambda s: Ledger().after(GaussianRelease(s, p=0.05), 200))
    >>> round(noise, 3)
    1.795
    """
    ends = [spent(noise).epsilon(delta) for noise in (high, low)]
    if not 0 < epsilon < math.inf or not ends[0] <= epsilon <= ends[1]:
        raise UsageError(
            f"noise_for: epsilon={epsilon}; from {ends[0]:.4g} to {ends[1]:.4g} are in reach with "
            f"noise from {low:g} to {high:g} (fewer releases or a smaller share cost less)"
        )

    def cost(log_noise: float) -> float:
        # In logarithms the cost is nearly a line, which takes a few evaluations.
        return math.log(max(spent(math.exp(log_noise)).epsilon(delta), 1e-12))

    return math.exp(inverted(cost, math.log(epsilon), math.log(low), math.log(high)))
