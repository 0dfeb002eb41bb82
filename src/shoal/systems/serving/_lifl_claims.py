"""What every run of LIFL keeps, and how its claims are measured from the runs."""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal.lab.rows import Rows
from shoal.lab.statistics import median
from shoal.world.record import Run


def everybody_counts_once(run: Run) -> str | None:
    """In no round is an update lost or doubled in the sums themselves."""
    for row in run.series("miscounted"):
        if row.value > 0:
            return f"round {row.round}: a weight is off by {row.value} of itself"
    for row in run.series("updates"):
        ids = dict(row.labels)["ids"].split()
        if len(set(ids)) != len(ids) or len(ids) != row.value:
            return f"round {row.round}: updates of {ids}"
    return None


def nobody_is_kept_for_nothing(run: Run) -> str | None:
    """No aggregator is alive when its node has nothing to do (always-on ones are no part of it)."""
    found = [row for row in run.series("alive") if row.value > 0]
    return f"{found[0].value:.0f} are alive after round {found[0].round}" if found else None


def nothing_is_left_in_memory(run: Run) -> str | None:
    """All slots are free at the end, but those of aggregators that never answered again."""
    found = [row for row in run.series("slots_left") if row.value]
    return f"{found[0].value:.0f} slots are left at gateway {found[0].peer}" if found else None


# Measures: Rows -> one number per seed.


def _each(rows: Rows, arm: str, number: Callable[[Run], float]) -> dict[int, float]:
    runs = {seed: rows.run(arm, seed) for seed in rows.seeds}
    return {seed: math.nan if run is None else number(run) for seed, run in runs.items()}


def _values(run: Run, metric: str) -> list[float]:
    return [row.value for row in run.series(metric)]


def _typical(metric: str) -> Callable[[Run], float]:
    """The median round."""
    return lambda run: median(_values(run, metric)) if run.series(metric) else math.nan


def _whole(metric: str) -> Callable[[Run], float]:
    """The sum over rounds or gateways."""
    return lambda run: math.fsum(_values(run, metric))


def _over(rows: Rows, arm: str, other: str, number: Callable[[Run], float]) -> dict[int, float]:
    mine, theirs = _each(rows, arm, number), _each(rows, other, number)
    return {s: mine[s] / theirs[s] if theirs[s] else math.nan for s in rows.seeds}


def act_over_slh(rows: Rows) -> dict[int, float]:
    """Completion time, from the first update's arrival to the new model, over SL-H's."""
    return _over(rows, "lifl", "SL-H", _typical("act_s"))


def act_over_sf(rows: Rows) -> dict[int, float]:
    """The same over the always-on tree's."""
    return _over(rows, "lifl", "SF", _typical("act_s"))


def reserved_over_sf(rows: Rows) -> dict[int, float]:
    """Seconds for which aggregators are held, over those of the always-on tree."""
    return _over(rows, "lifl", "SF", _whole("reserved_s"))


def work_over_broker(rows: Rows) -> dict[int, float]:
    """Processor seconds of moving and adding, over those by way of a broker."""
    return _over(rows, "lifl", "SL-B", _whole("work_s"))


def nodes_of_twenty(rows: Rows) -> dict[int, float]:
    """Most nodes that 20 updates were placed on."""
    return _each(rows, "twenty", lambda run: max(_values(run, "nodes"), default=math.nan))


def nodes_in_turn(rows: Rows) -> dict[int, float]:
    """Fewest nodes that they were placed on in turn."""
    return _each(rows, "twenty in turn", lambda run: min(_values(run, "nodes"), default=math.nan))


def transfers_of_twenty(rows: Rows) -> dict[int, float]:
    """Sums that went from node to node."""
    return _each(rows, "twenty", _whole("transfers"))


def starts_saved(rows: Rows) -> dict[int, float]:
    """Share of the cold starts that reuse spares."""
    found = _over(rows, "lifl", "no reuse", _whole("cold_starts"))
    return {seed: 1.0 - ratio for seed, ratio in found.items()}


def without_memory(rows: Rows) -> dict[int, float]:
    """Processor seconds without shared memory, over those with it."""
    return _over(rows, "no shared memory", "lifl", _whole("work_s"))


def without_best_fit(rows: Rows) -> dict[int, float]:
    """Sums from node to node with the emptiest node first, over those with best fit."""
    return _over(rows, "no best fit", "lifl", _whole("transfers"))


def without_planning(rows: Rows) -> dict[int, float]:
    """Completion time when aggregators start as work waits for them, over that of planned ones."""
    return _over(rows, "no planning", "lifl", _typical("act_s"))


def without_eager(rows: Rows) -> dict[int, float]:
    """Completion time when sums wait for all their addends, over that of eager ones."""
    return _over(rows, "no eager", "lifl", _typical("act_s"))


def not_in_the_model(rows: Rows) -> dict[int, float]:
    """Rounds of all trees in which an update was lost, doubled or in none."""
    out = dict.fromkeys(rows.seeds, 0.0)
    for arm in (arm for arm in rows.arms if arm != "fedavg"):
        for seed in rows.seeds:
            run = rows.run(arm, seed)
            if run is None:
                return dict.fromkeys(rows.seeds, math.nan)
            wrong = sum(value > 0 for value in _values(run, "miscounted"))
            out[seed] += wrong + len(run.series("skipped"))
    return out


def kept_for_nothing(rows: Rows) -> dict[int, float]:
    """Most aggregators alive on a node whose part of the round was done."""
    return _each(rows, "lifl", lambda run: max(_values(run, "alive"), default=math.nan))


def accuracy_apart(rows: Rows) -> dict[int, float]:
    """The largest difference of peer 0's accuracy from a hub's that averages all, in any round."""
    out = {}
    for seed in rows.seeds:
        tree, plain = (
            {row.round: row.value for row in rows.series(arm, seed, "accuracy", peer=0)}
            for arm in ("tree", "fedavg")
        )
        both = sorted(set(tree) & set(plain))
        apart = [abs(tree[round] - plain[round]) for round in both]
        whole = len(both) >= (rows.scenarios["tree", seed].rounds or 1)
        out[seed] = max(apart) if whole else math.nan
    return out
