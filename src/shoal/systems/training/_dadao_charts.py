"""Pictures of DADAO's runs, as medians over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shoal.lab.chart import Points
from shoal.lab.rows import Rows
from shoal.lab.statistics import median
from shoal.systems.training import _dadao_claims as claims

METHODS = (
    "dadao", "adom+", "ssda", "msda", "continuized", "tracking", "star", "adom+ star", "msda star",
    "cycle", "adom+ cycle", "msda cycle", "barbell", "barbell optimal", "msda barbell",
)  # fmt: skip


def _median(rows: Rows, arm: str, metric: str) -> float:
    return median([rows.value(arm, seed, metric) for seed in rows.seeds])


def _points(
    rows: Rows, arms: Sequence[str], over: Sequence[float], metric: str
) -> list[tuple[float, float]]:
    found = [(math.log10(x), _median(rows, arm, metric)) for x, arm in zip(over, arms, strict=True)]
    return [(x, math.log10(y)) for x, y in found if y > 0]


def gradients_by_condition(rows: Rows) -> Points:
    """log10 of gradients over log10 of the condition number."""
    return {
        name: _points(rows, claims.arms_over_condition(name), claims.CONDITIONS, "gradients")
        for name in ("dadao", "tracking")
    }


def exchanges_by_peers(rows: Rows) -> Points:
    """log10 of exchanges over log10 of the number of peers of a full graph."""
    return {
        name: _points(rows, claims.arms_over_peers(name), claims.SIZES, "exchanges")
        for name in ("dadao", "ssda")
    }


def distances(rows: Rows) -> Points:
    """log10 of the mean squared distance over units of time, the first seed's."""
    found = {}
    for arm in (*claims.GRAPHS, "barbell optimal", "gossip SGD"):
        series = rows.series(arm, rows.seeds[0], "distance")
        shown = [row for row in series if row.value > 0 and row.time_s <= 600.0]
        found[arm] = [(row.time_s, math.log10(row.value)) for row in shown]
    return found


def _bars(rows: Rows, metric: str) -> Points:
    return {metric: [(arm, _median(rows, arm, metric)) for arm in METHODS]}


def exchanges(rows: Rows) -> Points:
    """Exchanges until all peers are near, by method and graph."""
    return _bars(rows, "exchanges")


def gradients(rows: Rows) -> Points:
    """Gradients until all peers are near, by method and graph."""
    return _bars(rows, "gradients")
