"""Pictures of LIFL's runs: what each way of serving takes, and what it holds."""

from __future__ import annotations

import math

from shoal.lab.chart import Points
from shoal.lab.rows import Rows
from shoal.lab.statistics import median

ARMS = (
    "lifl", "SF", "SL-B", "SL-H", "flat", "no shared memory", "no best fit", "no planning",
    "no reuse", "no eager",
)  # fmt: skip
WAYS = ("shared", "bytes", "socket", "broker")


def completion(rows: Rows) -> Points:
    """Median seconds of a round's aggregation, from the first and from the last update on."""
    return {
        "from the first update": [(arm, _round(rows, arm, "act_s")) for arm in ARMS],
        "from the last update": [(arm, _round(rows, arm, "tail_s")) for arm in ARMS],
    }


def held(rows: Rows) -> Points:
    """Aggregator seconds and processor seconds of a round, on the mean."""
    return {
        "aggregators held": [(arm, _mean(rows, arm, "reserved_s")) for arm in ARMS],
        "processor time": [(arm, _mean(rows, arm, "work_s")) for arm in ARMS],
    }


def machine(rows: Rows) -> Points:
    """Milliseconds of an update on its way from one sum to the next."""
    out = {}
    for name, of in (("time", "wall_s"), ("processor time", "cpu_s")):
        out[name] = [(way, 1000.0 * _per_update(rows, way, of)) for way in WAYS]
    return out


def _round(rows: Rows, arm: str, metric: str) -> float:
    runs = [rows.run(arm, seed) for seed in rows.seeds]
    found = [row.value for run in runs if run is not None for row in run.series(metric)]
    return median(found) if found else math.nan


def _mean(rows: Rows, arm: str, metric: str) -> float:
    """A gateway's whole, summed over gateways and spread over the rounds."""
    runs = [run for seed in rows.seeds if (run := rows.run(arm, seed)) is not None]
    rounds = sum(len(run.series("act_s")) for run in runs)
    whole = math.fsum(row.value for run in runs for row in run.series(metric))
    return whole / rounds if rounds else math.nan


def _per_update(rows: Rows, arm: str, metric: str) -> float:
    runs = [run for seed in rows.seeds if (run := rows.run(arm, seed)) is not None]
    each = [getattr(run, metric) / run.series("updates")[0].value for run in runs]
    return median(each) if each else math.nan
