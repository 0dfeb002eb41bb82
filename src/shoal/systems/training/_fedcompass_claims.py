"""How FedCompass's claims are measured: worlds of unequal clients, numbers from their rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from shoal.base import keyed
from shoal.lab.chart import Points
from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows, curve
from shoal.lab.scenario import Scenario
from shoal.lab.statistics import median
from shoal.world.record import Run

TARGET = 0.9
ROUND_S = 10.0
"""100 steps of a client of usual speed."""
LAST_ROUNDS = 3.0
SLOWEST, FASTEST = 6.0, 0.2
JITTER = 0.05


def equal(scenario: Scenario) -> Scenario:
    """Times per step from N(1, 0.05^2)."""
    return _world(scenario, lambda u, n: 1.0 + 0.05 * n)


def spread(scenario: Scenario) -> Scenario:
    """Times per step from N(1, 0.3^2)."""
    return _world(scenario, lambda u, n: 1.0 + 0.3 * n)


def exponential(scenario: Scenario) -> Scenario:
    """Times per step from an exponential distribution of mean 1, kept within 0.2 to 6."""
    return _world(scenario, lambda u, n: -math.log1p(-u))


def factors(scenario: Scenario, draw: Callable[[float, float], float]) -> dict[int, float]:
    """Client -> time per step over the usual one; `draw` makes it from uniform and normal."""
    seed = scenario.seed
    return {
        client: min(max(draw(keyed.uniform(seed, "speed", client),
                             keyed.normal(seed, "speed", client)), FASTEST), SLOWEST)
        for client in range(1, scenario.peers)
    }  # fmt: skip


def _world(scenario: Scenario, draw: Callable[[float, float], float]) -> Scenario:
    """Clients of these speeds, which vary by 5% from one usual round to the next.

    The horizon is as many rounds of the slowest client as the scenario has usual ones.
    """
    found = factors(scenario, draw)
    assert scenario.seconds is not None
    seconds = scenario.seconds * max(found.values())
    # Windows of a usual round, or some rounds where there would be too many.
    windows = min(20, math.ceil(seconds / ROUND_S))
    width_s = seconds / windows
    faults = []
    for client, factor in found.items():
        for n in range(windows):
            noise = max(0.5, 1.0 + JITTER * keyed.normal(scenario.seed, "jitter", client, n))
            until_s = None if n == windows - 1 else (n + 1) * width_s
            faults.append(
                FaultSetting(
                    "slow", who=(client,), at=n * width_s, until=until_s,
                    settings={"factor": factor * noise},
                )
            )  # fmt: skip
    world = scenario.with_settings(
        {"task.holders": tuple(range(1, scenario.peers)), "seconds": seconds}
    )
    return replace(world, faults=(*scenario.faults, *faults))


# Measures: Rows -> one number per seed.


def unit_s(rows: Rows, arm: str, seed: int) -> float:
    """A round of the slowest client: what the horizon was made of."""
    scenario = rows.scenarios.get((arm, seed))
    if scenario is None:
        return math.nan
    slowest = max(
        dict(fault.settings)["factor"] for fault in scenario.faults if fault.kind == "slow"
    )
    return ROUND_S * slowest


def reached_s(rows: Rows, arm: str, seed: int) -> float:
    """Seconds to 90% accuracy; who never gets there counts with the whole run."""
    run = rows.run(arm, seed)
    if run is None:
        return math.nan
    found = rows.reach(arm, seed, "mean_model_accuracy", TARGET, axis="time_s")
    return found if math.isfinite(found) else run.virtual_s


def last_accuracy(rows: Rows, arm: str, seed: int) -> float:
    """Mean accuracy over the last three rounds of the slowest client, each moment alike."""
    run = rows.run(arm, seed)
    if run is None:
        return math.nan
    points = curve(run, "mean_model_accuracy")
    end_s = points[-1].time_s
    begin_s = end_s - LAST_ROUNDS * unit_s(rows, arm, seed)
    held = [(max(a.time_s, begin_s), b.time_s, a.value)
            for a, b in pairwise(points) if b.time_s > begin_s]  # fmt: skip
    whole_s = math.fsum(end - begin for begin, end, _ in held)
    if not whole_s > 0:
        return points[-1].value
    return math.fsum((end - begin) * value for begin, end, value in held) / whole_s


def staleness(run: Run) -> float:
    """Mean over the works of how many versions old they were."""
    counts = [len(dict(row.labels)["works"].split()) for row in run.series("applied")]
    late = [row.value for row in run.series("staleness")]
    return math.fsum(n * s for n, s in zip(counts, late, strict=True)) / sum(counts)


def _each(rows: Rows, number: Callable[[int], float]) -> dict[int, float]:
    return {seed: number(seed) for seed in rows.seeds}


def _faster(rows: Rows, other: str) -> dict[int, float]:
    return _each(rows, lambda s: reached_s(rows, "fedcompass", s) / reached_s(rows, other, s))


def over_fedavg(rows: Rows) -> dict[int, float]:
    """Time to 90% accuracy over that of FedAvg, exponential speeds."""
    return _faster(rows, "fedavg")


def over_tiered(rows: Rows) -> dict[int, float]:
    """The same over averaging in tiers."""
    return _faster(rows, "tiered")


def over_fedasync(rows: Rows) -> dict[int, float]:
    """The same over FedAsync."""
    return _faster(rows, "fedasync")


def over_fedbuff(rows: Rows) -> dict[int, float]:
    """The same over FedBuff, seed by seed."""
    return _faster(rows, "fedbuff")


def over_fedbuff_medians(rows: Rows) -> dict[int, float]:
    """Median time to 90% accuracy over FedBuff's median: one number for all seeds."""
    ours = [reached_s(rows, "fedcompass", seed) for seed in rows.seeds]
    theirs = [reached_s(rows, "fedbuff", seed) for seed in rows.seeds]
    if any(math.isnan(each) for each in (*ours, *theirs)):
        return dict.fromkeys(rows.seeds, math.nan)
    return dict.fromkeys(rows.seeds, median(ours) / median(theirs))


def staleness_over_fedasync(rows: Rows) -> dict[int, float]:
    """Mean staleness of works over that with FedAsync."""

    def ratio(seed: int) -> float:
        ours, theirs = rows.run("fedcompass", seed), rows.run("fedasync", seed)
        return math.nan if ours is None or theirs is None else staleness(ours) / staleness(theirs)

    return _each(rows, ratio)


def _gain(rows: Rows, other: str) -> dict[int, float]:
    return _each(
        rows, lambda s: last_accuracy(rows, "fedcompass", s) - last_accuracy(rows, other, s)
    )


def gain_over_fedasync(rows: Rows) -> dict[int, float]:
    """Accuracy at the end less that of FedAsync."""
    return _gain(rows, "fedasync")


def gain_over_fedavg(rows: Rows) -> dict[int, float]:
    """Accuracy at the end less that of FedAvg."""
    return _gain(rows, "fedavg")


def like_fedavg(rows: Rows) -> dict[int, float]:
    """Time to 90% accuracy over FedAvg's, equal speeds."""
    return _each(
        rows, lambda s: reached_s(rows, "fedcompass_equal", s) / reached_s(rows, "fedavg_equal", s)
    )


def idle_over_fedavg(rows: Rows) -> dict[int, float]:
    """The part of their time that clients do nothing, over that with FedAvg."""

    def idle(arm: str, seed: int) -> float:
        run = rows.run(arm, seed)
        if run is None:
            return math.nan
        busy = [row.value for row in run.series("busy_s") if row.peer > 0]
        return 1.0 - math.fsum(busy) / (run.virtual_s * (run.peers - 1))

    return _each(rows, lambda s: idle("fedcompass", s) / idle("fedavg", s))


# Pictures, of the first seed.


def works_of_clients(rows: Rows) -> Points:
    """When each client worked: (begin, end) of its works in the first rounds of the slowest."""
    run = rows.run("fedcompass", rows.seeds[0])
    if run is None:
        return {}
    until_s = 6.0 * unit_s(rows, "fedcompass", rows.seeds[0])
    used = {
        name: row.time_s
        for row in run.series("applied") for name in dict(row.labels)["works"].split()
    }  # fmt: skip
    lines: dict[str, list[tuple[float, float]]] = {}
    for client in range(1, run.peers):
        begin_s, spans = 0.0, []
        for row in run.series("made", client):
            if begin_s >= until_s:
                break
            spans.append((begin_s, row.time_s))
            # Its next work begins with the version that used this one, or at once if that is late.
            applied_s = used.get(dict(row.labels)["work"], row.time_s)
            begin_s = applied_s if applied_s >= row.time_s else row.time_s
        lines[f"client {client}"] = spans
    return lines


def accuracy_over_time(rows: Rows) -> Points:
    """Accuracy of the model by virtual time, exponential speeds."""
    lines = {}
    for arm in ("fedcompass", "fedavg", "fedasync", "fedbuff", "tiered"):
        if arm not in rows.arms:
            continue
        found = rows.series(arm, rows.seeds[0], "mean_model_accuracy")
        lines[arm] = [(row.time_s, row.value) for row in found]
    return {name: points for name, points in lines.items() if points}
