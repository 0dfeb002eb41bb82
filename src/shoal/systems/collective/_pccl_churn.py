"""Processes that are killed while they train: the fault list, and what is claimed of such a run."""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.base import keyed
from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.world.record import Run

PACE_S = 0.3
"""A common step at most so often, so that the rounds of a scenario fill a known time."""

CHURN = "churn"
CALM = "calm"


def kill_list(scenario: Scenario) -> Scenario:
    """One worker drawn by key is killed every 1 to 3 s, and a new process takes its place.

    The first 3 s and the last 4 s of the paced run are left alone.
    """
    whole_s = (scenario.rounds or 0) * PACE_S
    faults, at, number = [], 3.0, 0
    while at < whole_s - 4.0:
        who = 1 + int(keyed.uniform(scenario.seed, "victim", number) * (scenario.peers - 1))
        faults.append(FaultSetting("crash", who=(who,), at=round(at, 3), until=round(at + 0.2, 3)))
        at += 1.0 + 2.0 * keyed.uniform(scenario.seed, "pause", number)
        number += 1
    return replace(scenario, faults=tuple(faults))


def states(run: Run) -> dict[tuple[str, str], set[float]]:
    """Digests of the state by step and operation, one for each peer that has made it.

    Where all who knew of a step are killed, others make it again, by another operation.
    """
    found: dict[tuple[str, str], set[float]] = {}
    for row in run.series("state"):
        labels = dict(row.labels)
        found.setdefault((labels["step"], labels["operation"]), set()).add(row.value)
    return found


def _each(rows: Rows, arm: str, of: object) -> dict[int, float]:
    out = {}
    for seed in rows.seeds:
        run = rows.run(arm, seed)
        out[seed] = math.nan if run is None else float(of(run))  # type: ignore[operator]
    return out


def steps_with_one_state(rows: Rows) -> dict[int, float]:
    """Share of the steps after which all peers that made them had one state."""

    def share(run: Run) -> float:
        found = states(run)
        return sum(len(each) == 1 for each in found.values()) / len(found) if found else math.nan

    return _each(rows, CHURN, share)


def unfinished_or_failed(rows: Rows) -> dict[int, float]:
    """Processes that ended with an error of their own, and 1 if the run did not end properly."""

    def count(run: Run) -> float:
        failed = sum(mark.what.startswith("failed") for mark in run.happenings)
        return failed + (not run.finished)

    return _each(rows, CHURN, count)


def killed(rows: Rows) -> dict[int, float]:
    """Processes that were killed."""
    return _each(rows, CHURN, lambda run: sum("SIGKILL" in mark.what for mark in run.happenings))


def joined(rows: Rows) -> dict[int, float]:
    """Peers that were let into the group after the first ones."""
    return _each(rows, CHURN, lambda run: len(run.series("accepted")) - (run.peers - 1))


def miscounted(rows: Rows) -> dict[int, float]:
    """The farthest that any peer's gradient was from being in an average exactly once."""
    return _each(
        rows, CHURN, lambda run: max((row.value for row in run.series("miscounted")), default=1.0)
    )


def accuracy_lost(rows: Rows) -> dict[int, float]:
    """Accuracy of the undisturbed run minus that with kills, both after the last step."""
    return {seed: _last(rows, CALM, seed) - _last(rows, CHURN, seed) for seed in rows.seeds}


def _last(rows: Rows, arm: str, seed: int) -> float:
    """Mean accuracy of the peers that made the last step; others came back too late for it."""
    run = rows.run(arm, seed)
    found = [] if run is None else [row for row in run.series("accuracy") if row.peer >= 0]
    last = max((row.round for row in found), default=0)
    values = [row.value for row in found if row.round == last]
    return sum(values) / len(values) if values else math.nan
