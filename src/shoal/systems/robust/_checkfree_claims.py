"""What is claimed of recovery without checkpoints, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from shoal.lab.chart import Points
from shoal.lab.rows import Rows
from shoal.parts.pipeline.cost_model import CostModel, Moment, Replay, drive
from shoal.systems.robust._checkfree_settings import Where, drawn

TARGET_AT = 0.7
"""The loss to be reached is what failure-free training has after this share of its iterations."""

MIDDLE, EVERYWHERE = "checkfree", "checkfree+"
HIGH, LOW = 0.004, 0.002
"""Probabilities that a part fails in an iteration."""


def _each(rows: Rows, of: Callable[[int], float]) -> dict[int, float]:
    return {seed: of(seed) for seed in rows.seeds}


def _iterations(rows: Rows, seed: int) -> int:
    return rows.scenarios["failure-free", seed].rounds or 0


def _loss(rows: Rows, arm: str, seed: int, iteration: int) -> float:
    """The validation loss after so many iterations."""
    found = [r.value for r in rows.series(arm, seed, "loss") if r.round == iteration]
    return found[-1] if found else math.nan


def target(rows: Rows, seed: int) -> float:
    """Failure-free training's loss at 70% of its iterations, or the last evaluated before."""
    whole = _iterations(rows, seed)
    rounds = [r.round for r in rows.series("failure-free", seed, "loss")]
    near = max((each for each in rounds if each <= TARGET_AT * whole), default=-1)
    return _loss(rows, "failure-free", seed, near)


def time_to_target(rows: Rows, arm: str, seed: int) -> float:
    """Virtual time until the target is reached; inf when it is not."""
    wanted = target(rows, seed)
    if math.isnan(wanted):
        return math.nan
    return rows.reach(arm, seed, "loss", wanted, axis="time_s", falling=True)


def replayed(
    rows: Rows, seed: int, method: str, where: Where, rate: float, costs: CostModel
) -> list[tuple[float, float]]:
    """(time, loss) of a method that never leaves the course of failure-free training."""
    losses = {r.round: r.value for r in rows.series("failure-free", seed, "loss")}
    found: list[tuple[float, float]] = []
    if not losses:
        return found
    iterations, stages = _iterations(rows, seed), rows.scenarios["failure-free", seed].peers - 1
    replay = Replay(losses)

    def moment(now: Moment) -> None:
        if replay.done in losses:
            found.append((now.time_s, replay.loss()))

    trace = drawn(where, rate, stages, iterations, seed)
    drive(replay, method, trace, iterations, costs, moment=moment, failure=lambda _: None)
    return found


def _over(
    rows: Rows, arm: str, methods: tuple[str, ...], where: Where, rate: float,
    costs: CostModel | None = None,
) -> dict[int, float]:  # fmt: skip
    """An arm's time to target over that of the faster one of these methods, on the same trace."""
    used = CostModel() if costs is None else costs

    def of(seed: int) -> float:
        wanted = target(rows, seed)
        times = [
            time_s
            for method in methods
            for time_s, loss in replayed(rows, seed, method, where, rate, used)
            if loss <= wanted
        ]
        # An arm's own times are in plain iterations, which take `unit_s`.
        own_s = time_to_target(rows, arm, seed) * used.unit_s
        return own_s / min(times) if times else math.nan

    return _each(rows, of)


def middle_over_checkpoint(rows: Rows) -> dict[int, float]:
    """CheckFree over checkpointing, failures of the middle stages."""
    return _over(rows, MIDDLE, ("checkpoint",), "middle", HIGH)


def middle_over_redundant(rows: Rows) -> dict[int, float]:
    """CheckFree over redundant computation, failures of the middle stages."""
    return _over(rows, MIDDLE, ("redundant",), "middle", HIGH)


def low_rate(rows: Rows) -> dict[int, float]:
    """CheckFree over both, failures of the middle stages half as often."""
    return _over(rows, "checkfree, low rate", ("checkpoint", "redundant"), "middle", LOW)


def published_times(rows: Rows) -> dict[int, float]:
    """CheckFree over both with the paper's times of an iteration."""
    costs = CostModel.published()
    return _over(rows, MIDDLE, ("checkpoint", "redundant"), "middle", HIGH, costs)


def everywhere_over_checkpoint(rows: Rows) -> dict[int, float]:
    """CheckFree+ over checkpointing, failures of all parts."""
    return _over(rows, EVERYWHERE, ("checkpoint",), "all", HIGH)


def everywhere_over_redundant(rows: Rows) -> dict[int, float]:
    """CheckFree+ over redundant computation, failures of all parts."""
    return _over(rows, EVERYWHERE, ("redundant",), "all", HIGH)


def final_loss(rows: Rows) -> dict[int, float]:
    """CheckFree's last loss over failure-free training's after as many iterations."""

    def of(seed: int) -> float:
        whole = _iterations(rows, seed)
        return _loss(rows, MIDDLE, seed, whole) / _loss(rows, "failure-free", seed, whole)

    return _each(rows, of)


def _spike(rows: Rows, arm: str, seed: int) -> float:
    run = rows.run(arm, seed)
    found = [] if run is None else [row.value for row in run.series("spike")]
    return fmean(found) if found else math.nan


def spike_against_copy(rows: Rows) -> dict[int, float]:
    """Mean rise of the loss at a failure: weighted average minus copy of a neighbour."""
    return _each(rows, lambda seed: _spike(rows, MIDDLE, seed) - _spike(rows, "copy", seed))


def _rise(rows: Rows, seed: int, rule: str) -> float:
    """Mean rise of the loss under a rule, at the failures of the CheckFree arm."""
    run = rows.run(MIDDLE, seed)
    found = [] if run is None else run.series("rise")
    values = [row.value for row in found if dict(row.labels)["rule"] == rule]
    return fmean(values) if values else math.nan


def spike_from_one_state(rows: Rows) -> dict[int, float]:
    """Mean rise of the loss at the same failures of the same model: weighted minus copy."""
    return _each(rows, lambda seed: _rise(rows, seed, "weighted") - _rise(rows, seed, "copy"))


LATE = 2.5
"""The long trainings go on for so many times the iterations of the others."""


def _probe(
    rows: Rows, arm: str, seed: int, rule: str, stages: tuple[int, ...], times: float = LATE
) -> float:
    """Mean rise of the loss if one of these stages were lost after so many times the iterations."""
    run = rows.run(arm, seed)
    found = [] if run is None else run.series("probe")
    when = round(times * _iterations(rows, seed))
    values = [
        row.value for row in found
        if row.round == when and row.peer in stages and dict(row.labels)["rule"] == rule
    ]  # fmt: skip
    return fmean(values) if values else math.nan


def _with_over_without(
    rows: Rows, times: float, which: Callable[[int], tuple[int, ...]]
) -> dict[int, float]:
    """Rise when stages are copied from their swap partners, with swaps in training over without."""

    def of(seed: int) -> float:
        stages = which(rows.scenarios["swapped", seed].peers - 1)
        with_swaps, without = (
            _probe(rows, arm, seed, "partner", stages, times) for arm in ("swapped", "failure-free")
        )
        return with_swaps / without if without > 0 else math.nan

    return _each(rows, of)


def ends_after_swaps(rows: Rows) -> dict[int, float]:
    """Mean rise for the first and the last stage: with swaps in training over without."""
    return _with_over_without(rows, 1.0, lambda last: (1, last))


def last_stage_after_swaps(rows: Rows) -> dict[int, float]:
    """The same of the last stage alone."""
    return _with_over_without(rows, 1.0, lambda last: (last,))


def ends_after_long_swaps(rows: Rows) -> dict[int, float]:
    """The same of both, after 2.5 times as many iterations."""
    return _with_over_without(rows, LATE, lambda last: (1, last))


def price_shrinks(rows: Rows) -> dict[int, float]:
    """How much more swapping costs early (5/6 of the iterations) than late (2.5 times as many)."""

    def of(seed: int) -> float:
        whole = _iterations(rows, seed)
        early, late = price(rows, seed, whole * 5 // 6), price(rows, seed, whole * 5 // 2)
        return early - late

    return _each(rows, of)


def price(rows: Rows, seed: int, iteration: int) -> float:
    """Loss with swaps minus loss without, nothing failing."""
    swapped, plain = (_loss(rows, arm, seed, iteration) for arm in ("swapped", "failure-free"))
    return swapped - plain


def same_bits(rows: Rows) -> dict[int, float]:
    """The farthest that the losses of a pipeline of peers and of one process are apart."""

    def of(seed: int) -> float:
        ours, theirs = (
            {row.round: row.value for row in rows.series(arm, seed, "loss")}
            for arm in ("in one process", "peers")
        )
        last = rows.run("peers", seed)
        if last is None or not ours:
            return math.nan
        told = {int(dict(r.labels)["update"]): r.value for r in last.series("loss", 0)}
        return max(abs(told[t] - ours[t]) for t in ours) if theirs and set(told) >= set(ours) else 1

    return _each(rows, of)


def bytes_of_rebuilding(rows: Rows) -> dict[int, float]:
    """What peers sent to rebuild stages, over the parameters of two stages for each."""

    def of(seed: int) -> float:
        run = rows.run("peers", seed)
        if run is None:
            return math.nan
        sent = sum(n for kind, n in run.bytes_by_kind.items() if kind.endswith("Held"))
        stage = run.series("stage_bytes")[0].value
        middle = len(run.series("rebuilt"))
        return sent / (2 * stage * middle) if middle else math.nan

    return _each(rows, of)


# Pictures.


def losses(rows: Rows) -> Points:
    """The validation loss over virtual time, first seed."""
    return _curves(rows, ("failure-free", MIDDLE), "middle")


def losses_everywhere(rows: Rows) -> Points:
    """The same with failures of all parts."""
    return _curves(rows, ("failure-free", "swapped", EVERYWHERE), "all")


def _curves(rows: Rows, arms: tuple[str, ...], where: Where) -> Points:
    seed = rows.seeds[0]
    out = {arm: [(r.time_s, r.value) for r in rows.series(arm, seed, "loss")] for arm in arms}
    for method in ("checkpoint", "redundant"):
        out[method] = replayed(rows, seed, method, where, HIGH, CostModel())
    return {name: points[1:] for name, points in out.items()}


def prices(rows: Rows) -> Points:
    """The price of swapping over the iterations, of every seed."""
    out: dict[str, list[tuple[float, float]]] = {}
    for seed in rows.seeds:
        rounds = [row.round for row in rows.series("swapped", seed, "loss")]
        found = [(float(each), price(rows, seed, each)) for each in rounds]
        out[f"seed {seed}"] = [point for point in found if math.isfinite(point[1])]
    return out


def rules(rows: Rows) -> Points:
    """Rise of the loss at the loss of a stage, by rule: mean over seeds, end of the training."""
    out: dict[str, list[tuple[str, float]]] = {}
    stages = rows.scenarios["failure-free", rows.seeds[0]].peers - 1
    for rule in ("weighted", "uniform", "copy", "random", "zero"):
        values = [
            (f"S{stage}", [_probe(rows, "failure-free", s, rule, (stage,)) for s in rows.seeds])
            for stage in range(2, stages)
        ]
        out[rule] = [(name, fmean(v)) for name, v in values if all(map(math.isfinite, v))]
    return out


def rises(rows: Rows) -> Points:
    """Mean rise of the loss by rule at the failures of the CheckFree arm, of every seed."""
    return {
        f"seed {seed}": [
            (rule, value)
            for rule in ("weighted", "uniform", "copy", "random", "zero")
            if math.isfinite(value := _rise(rows, seed, rule))
        ]
        for seed in rows.seeds
    }
