"""What is claimed of one byte per gradient, and what every run of it must keep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.world.faults import Round
from shoal.world.record import Run

LAST = 6
"""Evaluations whose median counts: losses of single ones go up and down."""


# Worlds.


def two_go_and_two_come(scenario: Scenario) -> Scenario:
    """Ten peers, of which eight begin: the sequencer dies at 3/10 of the run, one more at 5/10, and
    the two others come at 4/10."""
    rounds = scenario.rounds or 0
    return replace(
        scenario,
        peers=10,
        faults=(
            FaultSetting("crash", who=(0,), at=Round(rounds * 3 // 10)),
            FaultSetting("join", who=(8, 9), at=Round(rounds * 4 // 10)),
            FaultSetting("crash", who=(5,), at=Round(rounds * 5 // 10)),
        ),
    )


def one_comes_and_the_sequencer_dies(scenario: Scenario) -> Scenario:
    """Four of five begin; the fifth comes at 1/4 of the run, and peer 0 dies at 6/10."""
    rounds = scenario.rounds or 0
    return replace(
        scenario,
        peers=5,
        faults=(
            FaultSetting("join", who=(4,), at=Round(rounds // 4)),
            FaultSetting("crash", who=(0,), at=Round(rounds * 6 // 10)),
        ),
    )


# Claims.


def _of_seeds(rows: Rows, measure: Callable[[int], float]) -> dict[int, float]:
    return {seed: measure(seed) for seed in rows.seeds}


def _losses(rows: Rows, arm: str, seed: int) -> list[tuple[int, float]]:
    """(iteration, median of the last evaluations), from the first that has as many behind it."""
    found = [(row.round, row.value) for row in rows.series(arm, seed, "mean_model_loss")]
    values = [value for _, value in found]
    return [
        (found[end - 1][0], median(values[end - LAST : end])) for end in range(LAST, len(found) + 1)
    ]


def final_loss(rows: Rows, arm: str, seed: int) -> float:
    """Median of the last evaluations."""
    found = _losses(rows, arm, seed)
    return found[-1][1] if found else math.nan


def byte_over_float(rows: Rows) -> dict[int, float]:
    """Final loss with numbers of one byte over that with float32."""
    return _of_seeds(rows, lambda s: final_loss(rows, "byte", s) / final_loss(rows, "float", s))


def share_of_iterations(rows: Rows) -> dict[int, float]:
    """After which share of the run eight machines are where one is at the end."""

    def share(seed: int) -> float:
        goal, found = final_loss(rows, "single", seed), _losses(rows, "byte", seed)
        if math.isnan(goal) or not found:
            return math.nan
        reached = (iteration for iteration, loss in found if loss <= goal)
        return (next(reached, math.inf) + 1) / (found[-1][0] + 1)

    return _of_seeds(rows, share)


def accuracy_gained(rows: Rows) -> dict[int, float]:
    """Accuracy at the end minus that of the model that knows upright digits only."""
    return _of_seeds(
        rows,
        lambda s: (
            rows.value("byte", s, "mean_model_accuracy")
            - rows.value("byte", s, "mean_model_accuracy", "first")
        ),
    )


def changed_by_churn(rows: Rows) -> dict[int, float]:
    """How far the final loss is from that of an undisturbed run, relative to it."""
    return _of_seeds(
        rows,
        lambda s: abs(final_loss(rows, "churn", s) / final_loss(rows, "byte", s) - 1.0),
    )


def payload_saved(rows: Rows) -> dict[int, float]:
    """What a machine tells one other in a round of data-parallel SGD, over a machine's numbers."""

    def saved(seed: int) -> float:
        dense, byte = rows.run("dense", seed), rows.run("byte", seed)
        if dense is None or byte is None:
            return math.nan
        told = sum(row.value for row in byte.series("payload_bytes"))
        iterations = sum(row.value for row in byte.series("offered"))
        return dense.bytes_by_kind["Update"] / dense.messages_sent / (told / iterations)

    return _of_seeds(rows, saved)


def wire_bytes(rows: Rows) -> dict[int, float]:
    """Bytes on the wire, headers included, per gradient and machine that it reaches."""

    def each(seed: int) -> float:
        run = rows.run("lists", seed)
        if run is None:
            return math.nan
        sent = run.bytes_by_kind["Offer"] + run.bytes_by_kind["Ordered"]
        gradients = sum(row.value for row in run.series("offered"))
        return sent / (gradients * (run.peers - 1))

    return _of_seeds(rows, each)


def exact(rows: Rows) -> dict[int, float]:
    """1 if all replicas held the same bits in every iteration and every log gives its model."""

    def of(seed: int) -> float:
        run = rows.run("exact", seed)
        if run is None or not run.series("state"):
            return math.nan
        ended = {row.peer for row in run.series("replayed") if row.value == 1.0}
        return float(one_history(run) is None and ended == {1, 2, 3, 4})

    return _of_seeds(rows, of)


# Invariants.


def one_history(run: Run) -> str | None:
    """All peers hold the same bits before an iteration whose entry is there."""
    found: dict[str, set[float]] = defaultdict(set)
    for row in run.series("state"):
        found[dict(row.labels)["iteration"]].add(row.value)
    for iteration, states in found.items():
        if len(states) > 1:
            return f"iteration {iteration}: {len(states)} different weights"
    return None


def log_is_the_model(run: Run) -> str | None:
    """At every peer the log of bytes, replayed, gives the weights that it ended with."""
    for row in run.series("replayed"):
        if row.value != 1.0:
            return f"peer {row.peer}: its log gives other weights than it holds"
    return None


def applies_what_was_made_once(run: Run) -> str | None:
    """Every number in an entry is one that its machine made for that iteration, once."""
    made: dict[tuple[int, int], set[str]] = defaultdict(set)
    for row in run.series("made"):
        made[row.peer, int(row.value)].add(dict(row.labels)["codes"])
    for row in run.series("applied"):
        labels = dict(row.labels)
        machines = [int(word) for word in labels["machines"].split()]
        if len(set(machines)) < len(machines):
            return f"iteration {row.value:.0f} counts a machine twice"
        each = len(labels["codes"]) // max(1, len(machines))
        for place, machine in enumerate(machines):
            codes = labels["codes"][place * each : (place + 1) * each]
            if codes not in made[machine, int(row.value)]:
                return f"iteration {row.value:.0f}: peer {machine} never made {codes}"
    return None
