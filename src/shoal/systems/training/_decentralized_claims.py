"""How the claims of decentralized diffusion are measured, its invariants and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from shoal.lab.rows import Rows
from shoal.lab.statistics import median
from shoal.world.record import Run

AT_THE_END = ("Checkpoint", "Taken", "Failure")
"""Kinds of messages that carry finished experts and answers to them."""

# Invariants.


def islands_are_silent(run: Run) -> str | None:
    """Nothing but finished experts is ever sent."""
    others = sorted(set(run.bytes_by_kind) - set(AT_THE_END))
    return f"islands sent {others}" if others else None


def experts_count_once(run: Run) -> str | None:
    """Peer 0 takes each expert once, and counts those that it has taken and its own.

    In the life of a store: who has delivered does not send again to one that has lost everything.
    """
    begun_s = max((row.time_s for row in run.series("fresh")), default=0.0)
    taken = [int(row.value) for row in run.series("taken") if row.time_s >= begun_s]
    if len(set(taken)) < len(taken):
        return f"experts taken twice: {taken}"
    found = run.series("experts")
    if found and found[-1].value != 1 + len(taken):
        return f"{found[-1].value:g} experts count, {len(taken)} were taken"
    return None


# Measures: Rows -> one number per seed.


def _each(rows: Rows, arm: str, number: Callable[[Run], float]) -> dict[int, float]:
    runs = {seed: rows.run(arm, seed) for seed in rows.seeds}
    return {seed: math.nan if run is None else number(run) for seed, run in runs.items()}


def _sum(run: Run, metric: str) -> float:
    return math.fsum(row.value for row in run.series(metric))


def _worst(*found: dict[int, float]) -> dict[int, float]:
    return {seed: max(each[seed] for each in found) for seed in found[0]}


def bytes_while_training(rows: Rows) -> dict[int, float]:
    """Bytes that are no finished expert and no answer to one, in both experiments."""

    def others(run: Run) -> float:
        return float(
            sum(size for kind, size in run.bytes_by_kind.items() if kind not in AT_THE_END)
        )

    return _worst(*(_each(rows, arm, others) for arm in ("ddm", "digits ddm")))


def bytes_over_one_step(rows: Rows) -> dict[int, float]:
    """All bytes of the decentralised run over those of a single synchronous step."""
    out = {}
    for seed in rows.seeds:
        ours, theirs = rows.run("digits ddm", seed), rows.run("synchronous", seed)
        if ours is None or theirs is None:
            out[seed] = math.nan
            continue
        steps = 1 + max(row.round for row in theirs.rows)
        out[seed] = sum(ours.bytes_sent) * steps / sum(theirs.bytes_sent)
    return out


def work_over_monolith(rows: Rows) -> dict[int, float]:
    """Training work of all experts over the monolith's, in the experiment where it is more."""
    found = []
    for ours, theirs in (("ddm", "monolith"), ("digits ddm", "digits monolith")):
        many = _each(rows, ours, lambda run: _sum(run, "expert_flops"))
        one = _each(rows, theirs, lambda run: _sum(run, "expert_flops"))
        found.append({seed: many[seed] / one[seed] for seed in rows.seeds})
    return _worst(*found)


def router_share(rows: Rows) -> dict[int, float]:
    """The router's training work over that of all experts, on digits."""
    return _each(
        rows, "digits ddm", lambda run: _sum(run, "router_flops") / _sum(run, "expert_flops")
    )


def uniform_over_routed(rows: Rows) -> dict[int, float]:
    """digit-FD with equal weights over that with the router's, of the same experts."""
    return {
        seed: rows.value("digits ddm", seed, "digit_fd_uniform")
        / rows.value("digits ddm", seed, "digit_fd_full")
        for seed in rows.seeds
    }


# Pictures.


def _bars(
    rows: Rows, metric: str, arms: Sequence[str], rules: Sequence[str]
) -> Mapping[str, Sequence[tuple[str, float]]]:
    """Median over the seeds: arm -> (rule, value), where it was measured."""
    out = {}
    for arm in arms:
        points = []
        for rule in rules:
            name = f"{metric}_{rule}"
            values = [
                run.series(name)[-1].value
                for seed in rows.seeds
                if (run := rows.run(arm, seed)) is not None and run.series(name)
            ]
            if values:
                points.append((rule, median(values)))
        out[arm] = points
    return {arm: points for arm, points in out.items() if points}


RULES = ("full", "top1")


def velocity_bars(rows: Rows) -> Mapping[str, Sequence[tuple[str, float]]]:
    """Velocity error on Gaussians; equal weights are far off the picture."""
    arms = ("ddm", "monolith", "small monolith")
    return _bars(rows, "velocity_error", arms, (*RULES, "oracle"))


def digit_bars(rows: Rows) -> Mapping[str, Sequence[tuple[str, float]]]:
    """digit-FD by arm and rule."""
    arms = ("digits ddm", "digits monolith", "digits random")
    return _bars(rows, "digit_fd", arms, (*RULES, "uniform"))
