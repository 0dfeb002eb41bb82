"""LIFL on real processes: who is killed when, and what is claimed of it and of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from shoal.base import keyed
from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.world.record import Run

AGGREGATORS = (2, 3, 4)
PACE_S = 0.3
"""A round at most so often, so that the rounds of a scenario fill a known time."""

KILLED = "killed"
CALM = "calm"


def kill_list(scenario: Scenario) -> Scenario:
    """One aggregator drawn by key is killed every 1 to 3 s, and a new process takes its place.

    The first and the last 3 s of the paced run are left alone.
    """
    whole_s = (scenario.rounds or 0) * PACE_S
    faults, at, number = [], 3.0, 0
    while at < whole_s - 3.0:
        place = int(keyed.uniform(scenario.seed, "victim", number) * len(AGGREGATORS))
        who = (AGGREGATORS[place],)
        faults.append(FaultSetting("crash", who=who, at=round(at, 3), until=round(at + 0.2, 3)))
        at += 1.0 + 2.0 * keyed.uniform(scenario.seed, "pause", number)
        number += 1
    return replace(scenario, faults=tuple(faults))


def _each(rows: Rows, arm: str, number: Callable[[Run], float]) -> dict[int, float]:
    runs = {seed: rows.run(arm, seed) for seed in rows.seeds}
    return {seed: math.nan if run is None else number(run) for seed, run in runs.items()}


def _over(rows: Rows, other: str, number: Callable[[Run], float]) -> dict[int, float]:
    mine, theirs = _each(rows, "shared", number), _each(rows, other, number)
    return {seed: mine[seed] / theirs[seed] for seed in rows.seeds}


def _wall_s(run: Run) -> float:
    return run.wall_s


def _cpu_s(run: Run) -> float:
    return run.cpu_s


def time_over_socket(rows: Rows) -> dict[int, float]:
    """Seconds per update, over those of a socket with serialisation."""
    return _over(rows, "socket", _wall_s)


def time_over_broker(rows: Rows) -> dict[int, float]:
    """The same, over a broker's."""
    return _over(rows, "broker", _wall_s)


def time_over_bytes(rows: Rows) -> dict[int, float]:
    """The same, over a socket that carries bare bytes."""
    return _over(rows, "bytes", _wall_s)


def cpu_over_socket(rows: Rows) -> dict[int, float]:
    """Processor seconds of all processes per update, over those of a socket with serialisation."""
    return _over(rows, "socket", _cpu_s)


def cpu_over_bytes(rows: Rows) -> dict[int, float]:
    """The same, over a socket that carries bare bytes."""
    return _over(rows, "bytes", _cpu_s)


_MACHINE = ("shared", "bytes", "socket", "broker", "tree", "tree killed")


def _sum_of(rows: Rows, metric: str) -> dict[int, float]:
    found = [_each(rows, arm, lambda run: run.series(metric)[0].value) for arm in _MACHINE]
    return {seed: math.fsum(each[seed] for each in found) for seed in rows.seeds}


def wrong_sums(rows: Rows) -> dict[int, float]:
    """Sums that are further than 1e-6 of themselves from the flat weighted sum."""
    return _sum_of(rows, "wrong")


def memory_left(rows: Rows) -> dict[int, float]:
    """Pieces of shared memory that were left, and slots that a gateway had not free at the end."""
    pieces = _sum_of(rows, "left")
    slots = _each(
        rows, KILLED, lambda run: math.fsum(row.value for row in run.series("slots_left"))
    )
    return {seed: pieces[seed] + slots[seed] for seed in rows.seeds}


def updates_lost(rows: Rows) -> dict[int, float]:
    """Updates that a tree whose aggregators were killed left out."""
    return _sum_of(rows, "lost")


def killed(rows: Rows) -> dict[int, float]:
    """Processes of the run among peers that were killed."""
    return _each(rows, KILLED, lambda run: sum("SIGKILL" in mark.what for mark in run.happenings))


def redone(rows: Rows) -> dict[int, float]:
    """Sums that were begun anew since an aggregator did not answer."""
    return _each(rows, KILLED, lambda run: float(len(run.series("redone"))))


def missed(rows: Rows) -> dict[int, float]:
    """Rounds of the run with kills that do not hold every client's update exactly once, and its
    processes that ended with an error of their own."""

    def count(run: Run) -> float:
        clients = run.peers - 2 - len(AGGREGATORS)
        whole = {row.round for row in run.series("updates") if row.value == clients}
        wrong = {row.round for row in run.series("miscounted") if row.value > 0}
        rounds = rows.scenarios[KILLED, run.seed].rounds or 0
        failed = sum(mark.what.startswith("failed") for mark in run.happenings)
        return float(rounds - len(whole - wrong) + failed)

    return _each(rows, KILLED, count)


def accuracy_apart(rows: Rows) -> dict[int, float]:
    """How far the last model's accuracy is from that of the undisturbed run."""
    found = [rows.per_seed(arm, "mean_model_accuracy") for arm in (CALM, KILLED)]
    return {seed: abs(found[0][seed] - found[1][seed]) for seed in rows.seeds}
