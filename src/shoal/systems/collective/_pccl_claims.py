"""What is claimed of training in step, and what every run of it must keep."""

from __future__ import annotations

import math
from collections import defaultdict

from shoal.lab.rows import Rows
from shoal.world.record import Run

TRAINED = ("ddp", "diloco", "async", "u8")
INNER_S = 10.0


def _wall(rows: Rows, arm: str) -> dict[int, float]:
    """Time to the last step over the time of the inner steps alone."""
    out = {}
    for seed in rows.seeds:
        run = rows.run(arm, seed)
        rounds = None if run is None else rows.scenarios[arm, seed].rounds
        if run is None or not rounds:
            out[seed] = math.nan
            continue
        ended = max((row.time_s for row in run.series("state")), default=math.nan)
        out[seed] = ended / (rounds * INNER_S)
    return out


def wall_sync(rows: Rows) -> dict[int, float]:
    """`_wall` of DiLoCo."""
    return _wall(rows, "diloco")


def wall_async(rows: Rows) -> dict[int, float]:
    """`_wall` of DiLoCo one step late."""
    return _wall(rows, "async")


def one_state(rows: Rows) -> dict[int, float]:
    """Share of the steps of all arms after which there was one state."""
    out = {}
    for seed in rows.seeds:
        shares = []
        for arm in TRAINED:
            run = rows.run(arm, seed)
            found = {} if run is None else _states(run)
            same = sum(len(set(each.values())) == 1 for each in found.values())
            shares.append(same / len(found) if found else math.nan)
        out[seed] = min(shares) if not any(map(math.isnan, shares)) else math.nan
    return out


def _states(run: Run) -> dict[tuple[int, int], dict[int, float]]:
    """The state's digest at each peer, by step and the master's number of the operation."""
    found: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in run.series("state"):
        labels = dict(row.labels)
        found[int(labels["step"]), int(labels["operation"])][row.peer] = row.value
    return found


# Invariants. A step may be made twice where all who knew of it have died, or where peers that were
# cut off began anew: by another operation, so that both numbers name what must be equal.


def one_state_after_each_step(run: Run) -> str | None:
    """All who have applied the average of an operation hold the same bits."""
    for (step, operation), held in _states(run).items():
        if len(set(held.values())) > 1:
            return f"step {step}, operation {operation}: {len(set(held.values()))} states"
    return None


def everybody_counts_once(run: Run) -> str | None:
    """No gradient is missing from an average that its peer applied, and none is in it twice.

    Where averages are audited all of them are: a step without its ballots would escape.
    """
    for row in run.series("miscounted"):
        if row.value:
            return f"an average of peer {row.peer} is wrong by {row.value:.3g} at {row.time_s} s"
    voters: dict[tuple[str, str], float] = {}
    for row in run.series("voters"):
        labels = dict(row.labels)
        key = labels["step"], labels["operation"]
        if not int(row.value) >> row.peer & 1:
            return f"peer {row.peer} applied step {key[0]} without being in it"
        if voters.setdefault(key, row.value) != row.value:
            return f"step {key[0]}, operation {key[1]}: two different sets of peers"
    if voters:
        audited = {(row.peer, row.labels) for row in run.series("voters")}
        for row in run.series("state"):
            if (row.peer, row.labels) not in audited:
                return f"step {dict(row.labels)['step']} of peer {row.peer} was not audited"
    return None


def who_ends_together_ends_equal(run: Run) -> str | None:
    """Peers that made the last step by the same operation leave equal parameters."""
    last: dict[int, tuple[int, int]] = {}
    for (step, operation), held in _states(run).items():
        for peer in held:
            last[peer] = max(last.get(peer, (0, 0)), (step, operation))
    ends = {row.peer: row.value for row in run.series("end_state")}
    made = {row.peer: row.value for row in run.series("steps")}
    by_step: dict[tuple[int, int], set[float]] = defaultdict(set)
    for peer, place in last.items():
        # Whoever restarted without its store may have ended before it was back at that step.
        if peer in ends and made.get(peer) == place[0]:
            by_step[place].add(ends[peer])
    for (step, _), found in by_step.items():
        if len(found) > 1:
            return f"{len(found)} different ends after step {step}"
    return None
