"""What is claimed of sequential gradient coding, measured from its runs, and its pictures."""

from __future__ import annotations

import math

from shoal.lab.chart import Points
from shoal.lab.rows import Rows

PUBLISHED = {"uncoded": 0.003906, "gc": 0.0625, "sr_sgc": 0.05078, "m_sgc": 0.007543}
"""Normalised loads of the paper's parameters for 256 workers, to the digits given."""
DELAYS = {"uncoded": 0, "gc": 0, "sr_sgc": 2, "m_sgc": 1}
EXACT = ("uncoded", "replicated", "gc", "sr-sgc", "m-sgc")
"""Arms that train with exact gradients."""
AT_ONCE = ("uncoded", "replicated", "gc")
"""Families that finish every job in its own round."""


def published_loads(rows: Rows) -> dict[int, float]:
    """The largest relative difference of a counted load to the published one; infinite where a
    delay is another one."""
    out = {}
    for seed in rows.per_seed("loads", "gc_load"):
        gaps = [
            abs(rows.value("loads", seed, f"{name}_load") / load - 1.0)
            for name, load in PUBLISHED.items()
        ]
        delays = {name: rows.value("loads", seed, f"{name}_delay") for name in DELAYS}
        out[seed] = max(gaps) if delays == DELAYS else math.inf
    return out


def counted_loads(rows: Rows) -> dict[int, float]:
    """The largest relative difference of a load to its formula, in all runs of delays."""
    return _worst(rows, _traced(rows), "load_gap")


def undecoded(rows: Rows) -> dict[int, float]:
    """Jobs that were not decodable in time, in all runs of delays."""
    return _worst(rows, _traced(rows), "undecoded")


def _traced(rows: Rows) -> list[str]:
    found = {arm for (arm, _), run in rows.runs.items() if run.series("undecoded")}
    return [arm for arm in rows.arms if arm in found]


def _worst(rows: Rows, arms: list[str], metric: str) -> dict[int, float]:
    found = [rows.per_seed(arm, metric) for arm in arms]
    return {seed: max(each[seed] for each in found) for seed in rows.seeds}


def _ratio(rows: Rows, arm: str, over: str, under: str) -> dict[int, float]:
    first, second = rows.per_seed(arm, f"{over}_s"), rows.per_seed(arm, f"{under}_s")
    return {seed: first[seed] / second[seed] for seed in first}


def m_over_gc(rows: Rows) -> dict[int, float]:
    """Total time of the best M-SGC over that of the best GC, bursts of 1.5 rounds."""
    return _ratio(rows, "bursts", "m_sgc", "gc")


def m_over_sr(rows: Rows) -> dict[int, float]:
    """Total time of the best M-SGC over that of the best SR-SGC, bursts of 1.5 rounds."""
    return _ratio(rows, "bursts", "m_sgc", "sr_sgc")


def m_over_uncoded(rows: Rows) -> dict[int, float]:
    """Total time of the best M-SGC over that of waiting for all."""
    return _ratio(rows, "bursts", "m_sgc", "uncoded")


def sr_over_uncoded(rows: Rows) -> dict[int, float]:
    """Total time of the best SR-SGC over that of waiting for all."""
    return _ratio(rows, "bursts", "sr_sgc", "uncoded")


def sr_over_gc_single(rows: Rows) -> dict[int, float]:
    """Total time of the best SR-SGC over that of the best GC, where slow states last a round."""
    return _ratio(rows, "single rounds", "sr_sgc", "gc")


def sr_over_gc_flushed(rows: Rows) -> dict[int, float]:
    """Total time of the best SR-SGC over that of the best GC and SR-SGC's T more rounds."""
    ratios = _ratio(rows, "bursts", "sr_sgc", "gc")
    delays = rows.per_seed("bursts", "sr_sgc_delay")
    out = {}
    for seed, ratio in ratios.items():
        scenario = rows.scenarios["bursts", seed]
        out[seed] = ratio / (1.0 + delays[seed] / (scenario.rounds or 1))
    return out


def m_over_replicated(rows: Rows) -> dict[int, float]:
    """Total time of the best M-SGC over that of the best replication, bursts of 1.5 rounds."""
    return _ratio(rows, "bursts", "m_sgc", "replicated")


def m_over_best_of_worst_case(rows: Rows) -> dict[int, float]:
    """Total time of M-SGC over that of the fastest family without delay, worst-case stragglers."""
    found = [_ratio(rows, "worst case", "m_sgc", family) for family in AT_ONCE]
    return {seed: max(each[seed] for each in found) for seed in found[0]}


def sr_over_gc_worst_case(rows: Rows) -> dict[int, float]:
    """Total time of SR-SGC over that of gradient coding, worst-case stragglers."""
    return _ratio(rows, "worst case", "sr_sgc", "gc")


def waited(rows: Rows) -> dict[int, float]:
    """Of the runs of delays the largest share of rounds in which M-SGC waited for everybody."""
    return _worst(rows, _traced(rows), "m_sgc_waits")


def m_over_gc_large(rows: Rows) -> dict[int, float]:
    """Total time of the best M-SGC over that of the best GC, 256 workers and 480 jobs."""
    return _ratio(rows, "paper size", "m_sgc", "gc")


def gradient_error(rows: Rows) -> dict[int, float]:
    """The largest relative error of a gradient, all exact arms."""
    found = [_largest_error(rows, arm) for arm in EXACT if arm in rows.arms]
    return {seed: max(each[seed] for each in found) for seed in rows.seeds}


def biased_error(rows: Rows) -> dict[int, float]:
    """The largest relative error of a gradient where stragglers are ignored."""
    return _largest_error(rows, "ignoring")


def _largest_error(rows: Rows, arm: str) -> dict[int, float]:
    out = {}
    for seed in rows.seeds:
        run = rows.run(arm, seed)
        errors = [] if run is None else [row.value for row in run.series("gradient_error")]
        out[seed] = max(errors, default=math.nan)
    return out


def losses_apart(rows: Rows) -> dict[int, float]:
    """The largest relative difference of a job's loss to that of uncoded training."""
    out = {}
    for seed in rows.seeds:
        curves = [_losses(rows, arm, seed) for arm in EXACT if arm in rows.arms]
        plain = curves[0]
        if any(len(curve) != len(plain) or not curve for curve in curves):
            out[seed] = math.nan
            continue
        out[seed] = max(
            abs(mine - other) / other
            for curve in curves[1:]
            for mine, other in zip(curve, plain, strict=True)
        )
    return out


def _losses(rows: Rows, arm: str, seed: int) -> list[float]:
    run = rows.run(arm, seed)
    return [] if run is None else [row.value for row in run.series("job_loss")]


def trained_over_uncoded(rows: Rows) -> dict[int, float]:
    """Virtual time of training with M-SGC over that of uncoded training."""
    return _trained(rows, "m-sgc", "uncoded")


def trained_over_gc(rows: Rows) -> dict[int, float]:
    """Virtual time of training with M-SGC over that with GC."""
    return _trained(rows, "m-sgc", "gc")


def trained_over_replicated(rows: Rows) -> dict[int, float]:
    """Virtual time of training with M-SGC over that with replication."""
    return _trained(rows, "m-sgc", "replicated")


def _trained(rows: Rows, over: str, under: str) -> dict[int, float]:
    first, second = rows.per_seed(over, "finished_s"), rows.per_seed(under, "finished_s")
    return {seed: first[seed] / second[seed] for seed in first}


# Pictures.

FAMILIES = ("uncoded", "replicated", "gc", "sr_sgc", "m_sgc", "ignoring", "oracle")


def totals(rows: Rows) -> Points:
    """Median total time of each family, by kind of delays."""
    out: dict[str, list[tuple[str, float]]] = {}
    for family in FAMILIES:
        out[family] = [
            (arm, _median(list(rows.per_seed(arm, f"{family}_s").values())))
            for arm in _traced(rows)
        ]
    return out


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def progress(rows: Rows) -> Points:
    """How many gradients there are over virtual time, with the first seed."""
    out: dict[str, list[tuple[float, float]]] = {}
    for arm in (*EXACT, "ignoring"):
        run = rows.run(arm, rows.seeds[0])
        if run is not None:
            times = [row.time_s for row in run.series("job_loss")]
            out[arm] = [(0.0, 0.0), *((time_s, done) for done, time_s in enumerate(times, 1))]
    return out


def waits(rows: Rows) -> Points:
    """Median share of rounds in which all were waited for, by family and kind of delays."""
    out: dict[str, list[tuple[str, float]]] = {}
    for family in FAMILIES[:-2]:
        out[family] = [
            (arm, _median(list(rows.per_seed(arm, f"{family}_waits").values())))
            for arm in _traced(rows)
        ]
    return out
