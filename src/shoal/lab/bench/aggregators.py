"""How the time of every aggregator grows with the number of rows and with their length.

The exponent is the slope of log CPU time over log size, by least squares; bounds are the exponents
of the table in docs/aggregators.md with room for what does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shoal.base.stopwatch import Stopwatch
from shoal.lab.bench._row import Note, Row
from shoal.parts import find, names
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Stack

FAULTY = 2
DIMS, ROWS = (50_000, 100_000, 200_000, 400_000), (8, 16, 32, 64)
FEW_ROWS, SHORT = 16, 50_000
_TURNS, _TURN_S = 5, 0.03

IN_ROWS = {"smea": "<= 5.3", "mda": "<= 4.3", "caf": "<= 3.3", "bulyan": "<= 3.3", "flag": "<= 3.3"}
"""Bounds of the rules whose work on small matrices grows faster than the square of the rows."""
SQUARE, LINE = "<= 2.3", "<= 1.5"
LINEAR = ("mean", "variance_corrected", "centered_clipping", "nna", "clipping", "arc", "bucketing")


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    dims, rows = ((200, 400), (5, 8)) if tiny else (DIMS, ROWS)
    few, short = (6, 100) if tiny else (FEW_ROWS, SHORT)
    for name in names("aggregate"):
        note(name)
        by_dim = [(dim, seconds(name, few, dim, tiny)) for dim in dims]
        by_rows = [(count, seconds(name, count, short, tiny)) for count in rows]
        last = by_dim[-1][1]
        yield Row.of(f"{name}: n = {few}, d = {dims[-1]:,}", last * 1e3, "ms CPU")
        yield Row.of(f"{name}: exponent in d", slope(by_dim), "", bound="<= 1.3")
        line = LINE if name in LINEAR else SQUARE
        bound = IN_ROWS.get(name, line)
        yield Row.of(f"{name}: exponent in n", slope(by_rows), "", bound=bound)


def told(name: str, dim: int) -> Any:
    """The rule, told of `FAULTY` rows where it can be told, for vectors of one tensor."""
    kind = find("aggregate", name)
    known = kind.__dataclass_fields__
    rule = kind(**{word: FAULTY for word in ("byzantine", "trim") if word in known})
    return rule.bind(FlatSpec(("w",), ((dim,),))) if hasattr(rule, "bind") else rule


def seconds(name: str, rows: int, dim: int, tiny: bool) -> float:
    """Least CPU seconds of a call on so many rows."""
    key = keyed.key_of(1, "growth", rows)
    x = keyed.normal(keyed.grid(keyed.grid(key, rows), dim))
    call = _call(told(name, dim), x)
    first = _timed(call, 1)
    calls = 1 if tiny else max(1, min(50, int(_TURN_S / max(first, 1e-6))))
    return min(_timed(call, calls) for _ in range(1 if tiny else _TURNS))


def _call(rule: Any, x: Stack) -> Callable[[], Any]:
    here = torch.ones(len(x), dtype=torch.bool)
    return lambda: rule(x, mask=here, center=x[0])


def _timed(call: Callable[[], Any], calls: int) -> float:
    watch = Stopwatch()
    for _ in range(calls):
        call()
    return watch.cpu_s / calls


def slope(points: list[tuple[int, float]]) -> float:
    """Of log value over log size, by least squares.

    >>> round(slope([(1, 2.0), (2, 8.0), (4, 32.0)]), 6)
    2.0
    """
    x = [math.log(size) for size, _ in points]
    y = [math.log(value) for _, value in points]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return across / sum((a - middle_x) ** 2 for a in x)
