"""The setting of a mechanism that spends a given amount of privacy."""

from __future__ import annotations

from collections.abc import Callable

from scipy.optimize import brentq

from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import Accountant, Mechanism

Cost = Callable[[Accountant], float]
"""What is to be spent: an accountant's `renyi` at some order, its `epsilon`, ..."""


def calibrated(
    family: Callable[[float], Mechanism], cost: Cost, target: float, low: float, high: float, *,
    clients: int = 1,
) -> float:  # fmt: skip
    """The number between `low` and `high` for which `family(number)` costs `target`.

    The cost must be finite at both ends and grow or fall between them; UsageError when the target
    is not reached there.

    >>> from shoal.parts.transform.pbm import Pbm
    >>> theta = calibrated(lambda t: Pbm(theta=t), lambda a: a.renyi(2.0), 5.0, 0.01, 0.4)
    >>> round(theta, 2)
    0.15
    """

    return inverted(lambda number: cost(Accountant(family(number), clients)), target, low, high)


def inverted(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The number between `low` and `high` that costs `target`.

    The cost must be finite at both ends and grow or fall between them; UsageError when the target
    is not reached there.

    >>> round(inverted(lambda x: x * x, 2.0, 0.0, 2.0), 6)
    1.414214
    """

    def excess(number: float) -> float:
        return cost(number) - target

    ends = excess(low), excess(high)
    if not min(ends) <= 0 <= max(ends):
        raise UsageError(
            f"calibrated: {low} costs {ends[0] + target:.4g} and {high} costs "
            f"{ends[1] + target:.4g}; the target {target:.4g} is not between (widen low and high)"
        )
    root = brentq(excess, low, high, xtol=1e-9)
    assert isinstance(root, float)
    return root
