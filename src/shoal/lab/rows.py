"""An experiment's runs by arm and seed, and the numbers that claims and reports take from them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping

from shoal.base.errors import UsageError
from shoal.lab.statistics import quantile
from shoal.lab.values import near
from shoal.world.record import Row, Run

# Numbers of a whole run that are no recorded series.
TOTALS = (
    "bytes_sent", "bytes_received", "messages_sent", "messages_delivered", "messages_dropped",
    "virtual_s", "wall_s", "cpu_s", "flops", "events",
)  # fmt: skip


def total(run: Run, metric: str) -> float:
    """One of `TOTALS`; bytes and messages are sums over all peers."""
    if metric in ("bytes_sent", "bytes_received"):
        return float(sum(getattr(run, metric)))
    if metric == "messages_dropped":
        return float(sum(run.dropped.values()))
    return float(getattr(run, metric))


def metrics(run: Run) -> list[str]:
    """Names of the recorded series, in the order in which they first appear."""
    return list(dict.fromkeys(row.name for row in run.rows))


def curve(run: Run, metric: str) -> list[Row]:
    """A series over time for all peers together.

    Rows that were recorded for all peers (peer -1) if there are any, else the mean over the peers
    of each moment: the round, or, without rounds, the time. Values that are not finite stay so.
    """
    rows = run.series(metric)
    if any(row.peer == -1 for row in rows):
        return [row for row in rows if row.peer == -1]
    groups: dict[tuple[int, float], list[Row]] = {}
    for row in rows:
        key = (row.round, 0.0) if row.round >= 0 else (-1, row.time_s)
        groups.setdefault(key, []).append(row)
    out = []
    for group in groups.values():
        mean = math.fsum(r.value for r in group) / len(group) if all(
            math.isfinite(r.value) for r in group
        ) else math.nan
        out.append(Row(metric, mean, max(r.time_s for r in group), group[0].round))
    return sorted(out, key=lambda row: (row.time_s, row.round))


def spread(run: Run, metric: str) -> list[tuple[float, int, tuple[float, ...]]]:
    """(time_s, round, (5th, 25th, 50th, 75th, 95th percentile over the peers)) of each moment."""
    groups: dict[tuple[int, float], list[Row]] = {}
    for row in run.series(metric):
        if row.peer >= 0 and math.isfinite(row.value):
            key = (row.round, 0.0) if row.round >= 0 else (-1, row.time_s)
            groups.setdefault(key, []).append(row)
    out = []
    for group in groups.values():
        values = [row.value for row in group]
        marks = tuple(quantile(values, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
        out.append((max(row.time_s for row in group), group[0].round, marks))
    return sorted(out)


def at_time(rows: list[Row], time_s: float) -> float:
    """The value of a cumulative series at a moment, linear between its rows, 0 before the first."""
    times = [row.time_s for row in rows]
    right = bisect.bisect_left(times, time_s)
    if right == len(rows):
        return rows[-1].value if rows else math.nan
    if times[right] == time_s:
        return rows[bisect.bisect_right(times, time_s) - 1].value
    start, base = (rows[right - 1].time_s, rows[right - 1].value) if right else (0.0, 0.0)
    width = times[right] - start
    part = (time_s - start) / width if width > 0 else 1.0
    return base + part * (rows[right].value - base)


class Rows:
    """All runs of an experiment. What is missing (a run that failed) is nan, never an exception.

    A metric or arm that no run knows is a mistake of the caller, hence a UsageError.
    """

    def __init__(
        self, runs: Mapping[tuple[str, int], Run], arms: Iterable[str], seeds: Iterable[int]
    ) -> None:
        self.runs = dict(runs)
        self.arms = tuple(arms)
        self.seeds = tuple(seeds)
        self.metrics = tuple(
            dict.fromkeys(name for run in self.runs.values() for name in metrics(run))
        )

    def run(self, arm: str, seed: int) -> Run | None:
        """The run of a cell, None when it is missing."""
        if arm not in self.arms:
            raise UsageError(f"rows: no arm {arm!r}; {near(arm, self.arms)}")
        return self.runs.get((arm, seed))

    def series(self, arm: str, seed: int, metric: str, peer: int | None = None) -> list[Row]:
        """One peer's rows of a metric, or (peer None) the curve for all peers together."""
        run = self.run(arm, seed)
        if run is None:
            return []
        self._know(metric)
        return curve(run, metric) if peer is None else run.series(metric, peer)

    def value(self, arm: str, seed: int, metric: str, take: str = "last") -> float:
        """One number of a run: a total, or `last first max min mean sum` of a curve."""
        run = self.run(arm, seed)
        if run is None:
            return math.nan
        recorded = any(row.name == metric for row in run.rows)
        if metric in TOTALS and not (recorded and take != "last"):
            return total(run, metric)
        self._know(metric)
        values = [row.value for row in curve(run, metric)]
        if not values or any(math.isnan(v) for v in values):
            # A series that broke down on its way has no maximum that would mean anything.
            return values[-1] if values and take == "last" else math.nan
        if take in ("last", "first"):
            return values[-1 if take == "last" else 0]
        whole = math.fsum(values)
        return {"max": max(values), "min": min(values), "sum": whole, "mean": whole / len(values)}[
            take
        ]

    def per_seed(self, arm: str, metric: str, take: str = "last") -> dict[int, float]:
        """`value` for every seed."""
        return {seed: self.value(arm, seed, metric, take) for seed in self.seeds}

    def reach(
        self, arm: str, seed: int, metric: str, target: float, *, axis: str = "round",
        falling: bool = False, window: int = 1,
    ) -> float:  # fmt: skip
        """When a curve first reaches a target: in `round`, `time_s` or `bytes`; inf = never.

        The mean of the last `window` values counts. falling: the target is reached from above (a
        loss). Bytes are the recorded cumulative series `bytes_sent`.
        """
        run = self.run(arm, seed)
        if run is None:
            return math.nan
        rows = self.series(arm, seed, metric)
        for end in range(window, len(rows) + 1):
            mean = math.fsum(row.value for row in rows[end - window : end]) / window
            if (mean <= target) if falling else (mean >= target):
                row = rows[end - 1]
                if axis == "bytes":
                    return at_time(curve(run, "bytes_sent"), row.time_s)
                return float(row.round if axis == "round" else row.time_s)
        return math.inf

    def _know(self, metric: str) -> None:
        if metric not in self.metrics and self.runs:
            raise UsageError(f"rows: no run recorded {metric!r}; {near(metric, self.metrics)}")
