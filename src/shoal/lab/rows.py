"""An experiment's runs by arm and seed, and the numbers that claims and reports take from them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.lab.scenario import Scenario
from shoal.lab.statistics import quantile
from shoal.lab.values import near
from shoal.world.record import Row, Run

# Numbers of a whole run that are no recorded series.
TOTALS = (
    "bytes_sent", "bytes_received", "messages_sent", "messages_delivered", "messages_dropped",
    "virtual_s", "wall_s", "cpu_s", "flops", "events",
)  # fmt: skip
MOMENTS_MAX = 240


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


@dataclass(frozen=True)
class Moment:
    """The values of single peers at a moment; peers that are gone have none."""

    time_s: float
    round: int
    values: tuple[float, ...]


def moments(run: Run, metric: str) -> list[Moment]:
    """A series of single peers as it stood at each moment.

    With rounds: the rows of each round. Without: at each time (at most 240 of them) the last value
    of every peer that has reported and has not crashed or left since.
    """
    rows = sorted((r for r in run.series(metric) if r.peer >= 0), key=lambda r: r.time_s)
    if not rows:
        return []
    if all(row.round >= 0 for row in rows):
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.round, []).append(row)
        found = [(group[-1].time_s, n, _by_peer(group)) for n, group in groups.items()]
        return [Moment(t, n, values) for t, n, values in sorted(found, key=lambda each: each[:2])]
    times = sorted({row.time_s for row in rows})
    if len(times) > MOMENTS_MAX:
        step = (len(times) - 1) / (MOMENTS_MAX - 1)
        times = [times[round(i * step)] for i in range(MOMENTS_MAX)]
    ends = sorted(
        (h.time_s, peer) for h in run.happenings if h.what in ("crash", "leave") for peer in h.peers
    )
    out, now, row_at, end_at = [], {}, 0, 0
    for time_s in times:
        while row_at < len(rows) and rows[row_at].time_s <= time_s:
            while end_at < len(ends) and ends[end_at][0] < rows[row_at].time_s:
                now.pop(ends[end_at][1], None)
                end_at += 1
            now[rows[row_at].peer] = rows[row_at].value
            row_at += 1
        while end_at < len(ends) and ends[end_at][0] < time_s:
            now.pop(ends[end_at][1], None)
            end_at += 1
        if now:
            out.append(Moment(time_s, -1, tuple(now[peer] for peer in sorted(now))))
    return out


def _by_peer(rows: list[Row]) -> tuple[float, ...]:
    values = {row.peer: row.value for row in rows}
    return tuple(values[peer] for peer in sorted(values))


def curve(run: Run, metric: str) -> list[Row]:
    """A series over time for all peers together.

    Rows that were recorded for all peers (peer -1) if there are any, else the mean over the peers
    at each moment. A mean over values that are not all finite is nan.
    """
    whole = [row for row in run.series(metric) if row.peer == -1]
    if whole:
        return sorted(whole, key=lambda row: (row.time_s, row.round))
    return [
        Row(metric, _mean(each.values), each.time_s, each.round) for each in moments(run, metric)
    ]


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def spread(run: Run, metric: str) -> list[tuple[float, int, tuple[float, ...]]]:
    """(time_s, round, (5th, 25th, 50th, 75th, 95th percentile over the peers)) of each moment."""
    out = []
    for each in moments(run, metric):
        values = [value for value in each.values if math.isfinite(value)]
        if values:
            marks = tuple(quantile(values, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
            out.append((each.time_s, each.round, marks))
    return out


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

    A metric or arm that no run knows is a mistake of the caller, hence a UsageError. scenarios: of
    each (arm, seed), for claims that depend on the world and not on the run alone.
    """

    def __init__(
        self, runs: Mapping[tuple[str, int], Run], arms: Iterable[str], seeds: Iterable[int],
        scenarios: Mapping[tuple[str, int], Scenario] | None = None,
    ) -> None:  # fmt: skip
        self.runs = dict(runs)
        self.scenarios = dict(scenarios or {})
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
