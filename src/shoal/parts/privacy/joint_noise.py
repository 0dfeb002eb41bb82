"""Noise that nobody knows and nobody biases, made on shares.

Random signs: contributors share random elements, whose sum r is uniform and unknown as long as one
of them is honest. r^2 is opened, masked so that nothing but r^2 shows; its root c is public, and
r / c is a shared random sign. An entry's noise is the sum of `draws` uniform whole numbers of
`bits` signs each (Irwin and Hall), at the granularity of the data that it hides.

Damgard, Fitzi, Kiltz, Nielsen and Toft 2006, section 5 (signs by opened squares).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import comb

from shoal.base.errors import UsageError
from shoal.parts.privacy.prime_field import (
    PRIME,
    Elements,
    add,
    element,
    inverse,
    multiply,
    roots,
    uniform,
    weighted_sum,
)
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key


def joint_signs(
    scheme: Shamir, count: int, key: Key, contributors: int,
    chosen: Sequence[Elements] | None = None,
) -> Elements:  # fmt: skip
    """Shares [holders, count] of uniform signs, +1 or -1.

    contributors: how many give randomness; more than the threshold, so that one is honest.
    chosen: what the first contributors give in place of random elements (to see that it does not
    matter). Needs 2 * threshold + 1 holders to open a square, and a scheme that is not packed.
    """
    if contributors <= scheme.threshold:
        raise UsageError(
            f"joint_signs: contributors={contributors}; need more than the threshold of "
            f"{scheme.threshold}, or all of them may collude"
        )
    twice = 2 * scheme.threshold
    if scheme.pack != 1 or scheme.holders <= twice:
        raise UsageError(
            f"joint_signs: holders={scheme.holders}, pack={scheme.pack}; need 2 * threshold + 1 "
            f"= {twice + 1} holders and pack = 1"
        )
    total = mask = np.zeros((scheme.holders, count), np.uint64)
    for giver in range(contributors):
        own = fold(key, "giver", giver)
        given = uniform(own, count) if chosen is None or giver >= len(chosen) else chosen[giver]
        total = add(total, scheme.share(given, own))
        nothing = np.zeros(count, np.uint64)
        mask = add(mask, scheme.share(nothing, fold(own, "zero"), degree=twice))
    everybody = range(scheme.holders)
    opened = scheme.reconstruct(add(multiply(total, total), mask), everybody, degree=twice)
    if (opened == 0).any():
        return joint_signs(scheme, count, fold(key, "again"), contributors, chosen)
    _, inverses = roots(opened)
    return multiply(total, inverses[None])


@dataclass(frozen=True)
class JointNoise:
    """Sums of `draws` uniform numbers of `bits` bits, as whole numbers around 0.

    deviation: of an entry, in units. Nearly Gaussian: see `distance`. More draws come closer, more
    bits make the unit finer in proportion to the noise.

    >>> JointNoise().deviation > 4095
    True
    """

    bits: int = 12
    draws: int = 12

    def __post_init__(self) -> None:
        if self.bits < 1 or self.draws < 12 or self.draws % 2 or self.bits > 40:
            raise UsageError(
                f"JointNoise: bits={self.bits}, draws={self.draws}; need 1 to 40 bits and an even "
                "number of at least 12 draws (fewer are far from Gaussian)"
            )

    @property
    def deviation(self) -> float:
        """sqrt(draws (4^bits - 1) / 12), in units."""
        return math.sqrt(self.draws * (4.0**self.bits - 1) / 12)

    def distance(self) -> float:
        """Largest difference between the law's distribution function and the Gaussian one.

        >>> round(JointNoise().distance(), 4)
        0.0023
        """
        n = self.draws
        x = np.linspace(0, n / 2, 2001)
        k = np.arange(n + 1)
        terms = (-1.0) ** k * comb(n, k) * np.clip(x[:, None] - k, 0, None) ** n
        law = terms.sum(1) / math.factorial(n)
        return float(np.abs(law - stats.norm.cdf((x - n / 2) / math.sqrt(n / 12))).max())

    def shares(self, scheme: Shamir, count: int, key: Key, contributors: int) -> Elements:
        """Shares [holders, count] of `count` entries of noise; draws * bits signs each."""
        each = self.draws * self.bits
        # Half a sum of an even number of odd numbers is a whole number.
        half = inverse(2)
        powers = [element((1 << bit) * half) for _ in range(self.draws) for bit in range(self.bits)]
        weights = np.array(powers, np.uint64)
        pieces = []
        # So many entries at once that the signs stay below 64 MB.
        step = max(1, (8 << 20) // (each * scheme.holders))
        for start in range(0, count, step):
            some = min(step, count - start)
            signs = joint_signs(scheme, some * each, fold(key, "part", start), contributors)
            pieces.append(weighted_sum(signs.reshape(scheme.holders, some, each), weights))
        return np.concatenate(pieces, 1)


assert PRIME % 4 == 3
