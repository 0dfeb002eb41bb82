"""A secret from shares of which some are wrong: Reed-Solomon decoding by Euclid's algorithm.

Shares of degree d are values of a polynomial at the holders' points. Of m shares (m - d - 1) / 2
may be anything at all; which ones they were is told. Numbers are Python's own: there are a few
dozen shares.

Gao 2003 (A New Algorithm for Decoding Reed-Solomon Codes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.parts.privacy.prime_field import PRIME, inverse

Polynomial = list[int]
"""Coefficients, lowest first; the last one is not 0; [] is 0."""


@dataclass(frozen=True)
class Corrected:
    """secret: the polynomial at 0; wrong: places of the shares that do not lie on it."""

    secret: int
    wrong: tuple[int, ...]


def corrected(points: Sequence[int], values: Sequence[int], degree: int) -> Corrected | None:
    """The polynomial of at most `degree` on which most values lie; None when too few do.

    points: distinct, none of them 0; values: elements of the field at these points.

    >>> corrected([1, 2, 3, 4, 5], [7, 9, 0, 13, 15], degree=1)
    Corrected(secret=5, wrong=(2,))
    """
    if len(points) <= degree:
        return None
    whole: Polynomial = [1]
    for x in points:
        whole = _times(whole, [-x % PRIME, 1])
    # Remainders of (product of (x - points), interpolation) fall in degree; the first one below
    # (m + d + 1) / 2 is what was shared, times the locator of the errors.
    before, now = whole, _through(points, values, whole)
    locator_before, locator = [], [1]
    while 2 * len(now) > len(points) + degree + 1 + 1:
        quotient, rest = _divided(before, now)
        before, now = now, rest
        locator_before, locator = locator, _less(locator_before, _times(quotient, locator))
    shared, rest = _divided(now, locator)
    if rest or len(shared) > degree + 1:
        return None
    wrong = tuple(
        place
        for place, (x, value) in enumerate(zip(points, values, strict=True))
        if _at(shared, x) != value
    )
    if 2 * len(wrong) > len(points) - degree - 1:
        return None
    return Corrected(shared[0] if shared else 0, wrong)


def _trimmed(a: Polynomial) -> Polynomial:
    while a and not a[-1]:
        a.pop()
    return a


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    out = [0] * max(len(a) + len(b) - 1, 0)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] += x * y
    return _trimmed([x % PRIME for x in out])


def _less(a: Polynomial, b: Polynomial) -> Polynomial:
    size = max(len(a), len(b))
    long = [[*each, *[0] * (size - len(each))] for each in (a, b)]
    return _trimmed([(x - y) % PRIME for x, y in zip(*long, strict=True)])


def _divided(a: Polynomial, b: Polynomial) -> tuple[Polynomial, Polynomial]:
    """(quotient, remainder) by a polynomial that is not 0."""
    rest, lead = list(a), inverse(b[-1])
    quotient = [0] * max(len(a) - len(b) + 1, 0)
    for place in range(len(quotient) - 1, -1, -1):
        factor = quotient[place] = rest[place + len(b) - 1] * lead % PRIME
        for i, y in enumerate(b):
            rest[place + i] = (rest[place + i] - factor * y) % PRIME
    return _trimmed(quotient), _trimmed(rest)


def _through(points: Sequence[int], values: Sequence[int], whole: Polynomial) -> Polynomial:
    """The polynomial of least degree with these values."""
    out = [0] * len(points)
    for x, value in zip(points, values, strict=True):
        others, _ = _divided(whole, [-x % PRIME, 1])
        factor = value * inverse(_at(others, x)) % PRIME
        for place, y in enumerate(others):
            out[place] = (out[place] + factor * y) % PRIME
    return _trimmed(out)


def _at(a: Polynomial, x: int) -> int:
    total = 0
    for coefficient in reversed(a):
        total = (total * x + coefficient) % PRIME
    return total
