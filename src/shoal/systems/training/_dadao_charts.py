"""Pictures of DADAO's runs, as medians over the seeds."""

from __future__ import annotations

import math

from shoal.lab.chart import Points
from shoal.lab.rows import Rows
from shoal.lab.statistics import median
from shoal.systems.training import _dadao_claims as claims

GRAPHS = {
    "DADAO": {"full": "dadao", "star": "star", "cycle": "cycle", "barbell": "barbell"},
    "DADAO, best rates": {"barbell": "barbell optimal"},
    "ADOM+": {"full": "adom+", "star": "adom+ star", "cycle": "adom+ cycle"},
    "ADOM+, consensus": {"star": "consensus star", "cycle": "consensus cycle"},
    "MSDA (dual)": {
        "full": "msda", "star": "msda star", "cycle": "msda cycle", "barbell": "msda barbell",
    },
}  # fmt: skip
"""Method -> graph -> arm."""

SHOWN = 450.0


def _median(rows: Rows, arm: str, metric: str) -> float:
    return median([rows.value(arm, seed, metric) for seed in rows.seeds])


def gradients_by_condition(rows: Rows) -> Points:
    """Gradients until all peers are near, by condition number."""
    return {
        name: [
            (condition, _median(rows, arm, "gradients"))
            for condition, arm in zip(
                claims.CONDITIONS, claims.arms_over_condition(name), strict=True
            )
        ]
        for name in ("dadao", "tracking")
    }


def exchanges_by_peers(rows: Rows) -> Points:
    """Exchanges until all peers are near, by peers of a full graph."""
    return {
        name: [
            (float(size), _median(rows, arm, "exchanges"))
            for size, arm in zip(claims.SIZES, claims.arms_over_peers(name), strict=True)
        ]
        for name in ("dadao", "ssda")
    }


def magnitudes(rows: Rows) -> Points:
    """By how many orders of magnitude the distance has fallen, over time, the first seed's."""
    found = {}
    for arm in (*claims.GRAPHS, "barbell optimal", "gossip SGD"):
        series = rows.series(arm, rows.seeds[0], "distance")
        shown = [row for row in series if row.value > 0 and row.time_s <= SHOWN]
        found[arm] = [(row.time_s, max(0.0, -math.log10(row.value))) for row in shown]
    return found


def _by_graph(rows: Rows, metric: str) -> Points:
    return {
        method: [(graph, _median(rows, arm, metric)) for graph, arm in arms.items()]
        for method, arms in GRAPHS.items()
    }


def exchanges_by_graph(rows: Rows) -> Points:
    """Exchanges until all peers are near, by method and graph."""
    return _by_graph(rows, "exchanges")


def gradients_by_graph(rows: Rows) -> Points:
    """Gradients until all peers are near, by method and graph."""
    return _by_graph(rows, "gradients")
