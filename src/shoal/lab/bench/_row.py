"""A measurement, what it is held against, and whether its bound holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shoal.base.errors import UsageError

Note = Callable[[str], None]
"""Called with what a bench is busy with."""


@dataclass(frozen=True)
class Row:
    """One line of a bench.

    value: in `unit`; reference: what it is compared with, if anything, with its value in the same
    unit; ratio: value / reference_value; bound: such as "<= 1.15" or "<= 1/7", on the ratio where
    there is a reference, else on the value; holds: None without a bound, or where nothing could be
    measured (value None; `reference` then says why).
    """

    name: str
    value: float | None
    unit: str
    reference: str | None = None
    reference_value: float | None = None
    ratio: float | None = None
    bound: str | None = None
    holds: bool | None = None

    @classmethod
    def of(
        cls, name: str, value: float, unit: str, *,
        against: tuple[str, float] | None = None, bound: str | None = None,
    ) -> Row:  # fmt: skip
        """A row that judges itself.

        >>> Row.of("a", 3.0, "s", against=("b", 30.0), bound="<= 1/7").holds
        True
        """
        reference, reference_value = against if against is not None else (None, None)
        ratio = None
        if reference_value is not None:
            ratio = value / reference_value if reference_value else math.inf
        judged = value if ratio is None else ratio
        holds = None if bound is None else bounded(judged, bound)
        return cls(name, value, unit, reference, reference_value, ratio, bound, holds)

    def to_json(self) -> dict[str, Any]:
        """The contract for scripts: one object a row."""
        return dict(vars(self))


def missing(name: str, why: str, bound: str | None = None) -> Row:
    """A row for what could not be measured here, which neither holds nor fails."""
    return Row(name, None, "", why, None, None, bound, None)


def bounded(value: float, bound: str) -> bool:
    """Whether a value keeps a bound; NaN keeps none.

    >>> bounded(0.1, "<= 1/7"), bounded(2.0, ">= 5"), bounded(math.nan, "<= 1")
    (True, False, False)
    """
    sign, _, text = bound.partition(" ")
    try:
        limit = float(Fraction(text.replace(",", "")))
    except ValueError:
        limit = math.nan
    if sign not in ("<=", ">=") or math.isnan(limit):
        raise UsageError(f"bench: bound {bound!r}; need '<= number' or '>= number'")
    return value <= limit if sign == "<=" else value >= limit
