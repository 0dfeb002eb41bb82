"""How the claims of secured Berrut computing are measured, and its charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from shoal.lab.rows import Rows
from shoal.systems.coding.sbacc_trials import CURVE, DIMENSIONS, STANDARD, Point
from shoal.world.record import Run

MOST = 3
"""Liars up to whom the bounds hold."""
LARGE = (1.0, 10.0, 100.0)


def value(run: Run, name: str, point: Point) -> float:
    """A row of the trials."""
    wanted = point.labels()
    found = [row.value for row in run.rows if row.name == name and row.labels == wanted]
    return found[0] if found else math.nan


def single(run: Run, name: str, missing: int | None = None) -> float:
    """A number of a run, or its row for so many missing answers."""
    labels = () if missing is None else (("missing", str(missing)),)
    found = [row.value for row in run.rows if row.name == name and row.labels == labels]
    return found[0] if found else math.nan


def _each(
    rows: Rows, arms: Iterable[str], number: Callable[[Run], float],
    over: Callable[[list[float]], float] = max,
) -> dict[int, float]:  # fmt: skip
    """`over` the arms, for each seed."""
    arms = tuple(arms)
    out = {}
    for seed in rows.seeds:
        runs = [rows.run(arm, seed) for arm in arms]
        out[seed] = math.nan if None in runs else over([number(run) for run in runs if run])
    return out


def best_rate(run: Run, magnitudes: Iterable[float], most: int = MOST) -> float:
    """The location rate with the best dimension, for the worst number and size of lies."""
    return min(
        max(value(run, "located", Point(size, liars, magnitude, 0)) for size in DIMENSIONS)
        for liars in range(1, most + 1)
        for magnitude in magnitudes
    )


def best_error(run: Run, liars: int, magnitude: float) -> float:
    """The error with the best dimension."""
    return min(value(run, "error", Point(size, liars, magnitude, 0)) for size in DIMENSIONS)


def located_sigmoid(rows: Rows) -> dict[int, float]:
    """Of lies of magnitude 1, 10 and 100 by 1 to 3 of 31 workers."""
    return _each(rows, ("sigmoid",), lambda run: best_rate(run, LARGE))


def located_sine_large(rows: Rows) -> dict[int, float]:
    """Of lies of magnitude 10 and 100."""
    return _each(rows, ("sin",), lambda run: best_rate(run, LARGE[1:]))


def located_sine(rows: Rows) -> dict[int, float]:
    """Of lies of magnitude 1."""
    return _each(rows, ("sin",), lambda run: best_rate(run, LARGE[:1]))


def over_clean(rows: Rows) -> dict[int, float]:
    """Error over that without lies, at worst over functions, liars and magnitudes."""

    def worst(run: Run) -> float:
        clean = single(run, "clean", 0)
        return max(best_error(run, a, size) / clean for a in range(1, MOST + 1) for size in LARGE)

    return _each(rows, ("sigmoid", "sin"), worst)


def _over_plain(run: Run, liars: int, magnitude: float) -> float:
    plain = value(run, "plain", Point(DIMENSIONS[0], liars, magnitude, 0))
    return best_error(run, liars, magnitude) / plain


def over_plain(rows: Rows) -> dict[int, float]:
    """Error over BACC's with three liars, at worst over functions and magnitudes."""
    return _each(
        rows, ("sigmoid", "sin"), lambda run: max(_over_plain(run, MOST, size) for size in LARGE)
    )


def over_plain_fewer(rows: Rows) -> dict[int, float]:
    """The same with one and two liars."""
    return _each(
        rows, ("sigmoid", "sin"),
        lambda run: max(_over_plain(run, a, size) for a in range(1, MOST) for size in LARGE),
    )  # fmt: skip


def curve(run: Run, name: str = "error") -> list[float]:
    """Error by dimension, with 3 liars of magnitude 1."""
    return [
        value(run, name, Point(size, STANDARD.liars, STANDARD.magnitude, STANDARD.missing))
        for size in CURVE
    ]


def valley(rows: Rows) -> dict[int, float]:
    """How much worse the better end of the curve is than its best inner point, the locator's zeros
    taken as they are; the less deep of two functions."""

    def depth(run: Run) -> float:
        errors = curve(run, "error_bare")
        return min(errors[0], errors[-1]) / min(errors[1:-1])

    return _each(rows, ("relu", "exp"), depth, min)


def small_end(rows: Rows) -> dict[int, float]:
    """The error at the smallest dimension over the least of all, with the exchange."""
    return _each(rows, ("relu",), lambda run: curve(run)[0] / min(curve(run)))


def first_over_second(rows: Rows) -> dict[int, float]:
    """Error without lies, nodes of the first kind over the second, at worst over functions."""
    return _each(
        rows, ("sigmoid", "sin", "relu", "exp"),
        lambda run: single(run, "clean", 0) / single(run, "clean_second", 0),
    )  # fmt: skip


def unseen(rows: Rows) -> dict[int, float]:
    """Location rate of lies of magnitude 0.1 about ReLU, with the best dimension."""
    return _each(rows, ("relu",), lambda run: best_rate(run, (0.1,), MOST))


def quiet(rows: Rows) -> dict[int, float]:
    """Share of trials without lies in which nobody is left out, the least of all dimensions."""
    return _each(
        rows, ("sigmoid", "sin"),
        lambda run: min(
            value(run, "located", Point(size, 0, 1.0, missing))
            for size in DIMENSIONS
            for missing in (0, 2, 4)
        ),
        min,
    )  # fmt: skip


def accuracy_gap(rows: Rows) -> dict[int, float]:
    """Accuracy of coded inference with 3 liars minus that of the model itself."""
    return _each(rows, ("inference",), _gap)


def accuracy_gap_missing(rows: Rows) -> dict[int, float]:
    """The same with two workers that are gone."""
    return _each(rows, ("inference, 2 gone",), _gap)


def accuracy_gap_plain(rows: Rows) -> dict[int, float]:
    """The same without looking for liars."""
    return _each(rows, ("inference, plain",), _gap)


def _gap(run: Run) -> float:
    return single(run, "coded_accuracy") - single(run, "central_accuracy")


# Charts.


def curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """Error against dimension, mean over the seeds."""
    found = {}
    for arm in rows.arms:
        runs = [run for seed in rows.seeds if (run := rows.run(arm, seed))]
        for name, line in (("error", arm), ("error_bare", f"{arm}, no exchange")):
            lines = [curve(run, name) for run in runs if run.series("best")]
            if lines and (name == "error" or arm in ("relu", "exp")):
                means = [sum(values) / len(values) for values in zip(*lines, strict=True)]
                found[line] = [(float(x), y) for x, y in zip(CURVE, means, strict=True)]
    return found


def located_grid(rows: Rows) -> dict[str, list[tuple[str, float]]]:
    """Share of trials in which exactly the three liars are found, by function and magnitude."""
    found = {}
    for arm in rows.arms:
        runs = [run for seed in rows.seeds if (run := rows.run(arm, seed))]
        runs = [run for run in runs if run.series("best")]
        if runs:
            found[arm] = [
                (f"{size:g}", sum(_rate(run, size) for run in runs) / len(runs))
                for size in (0.1, *LARGE)
            ]  # fmt: skip
    return found


def _rate(run: Run, magnitude: float) -> float:
    return max(value(run, "located", Point(size, MOST, magnitude, 0)) for size in DIMENSIONS)


def accuracy_by_liars(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    """Accuracy of coded inference against the number of liars, mean over the seeds."""
    arms = {
        "located and left out": ("inference, honest", "inference", "inference, 6 liars"),
        "plain BACC": ("inference, honest", "inference, plain", "inference, 6 liars, plain"),
    }
    found = {}
    for line, names in arms.items():
        points = []
        for liars, arm in zip((0, 3, 6), names, strict=True):
            runs = [rows.run(arm, seed) for seed in rows.seeds] if arm in rows.arms else []
            values = [single(run, "coded_accuracy") for run in runs if run]
            if values:
                points.append((liars, sum(values) / len(values)))
        if points:
            found[line] = points
    return found
