"""Robust rules beside ByzFL 0.0.11: CPU seconds of one aggregation of the same rows, one thread.

Every rule that both have, told the same number of faulty rows, at two sizes. ByzFL runs in an
interpreter of its own (`SHOAL_BYZFL_PYTHON`), and both take turns. Where it differs from the source
that both cite, the settings make up for it: its Krum counts one neighbour more, so ours is told of
one faulty row less; its geometric median starts at zero, so both make enough steps to forget where
they began. Results must agree, but for the covariance filter, whose directions ByzFL takes from one
power step from a random start: no two of its results agree either. Its SMEA does that too, and gets
a faulty row so far away that any direction tells. Its ARC and Clipping write into the rows that
they are given, where ours leave them alone: the copy that saves the caller's rows counts, and is
told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from shoal.base.stopwatch import Stopwatch
from shoal.lab.bench._byzfl import REASON, ByzFL, Stages, python
from shoal.lab.bench._row import Note, Row, missing
from shoal.lab.bench._timing import read_rate
from shoal.parts import find
from shoal.tensor import keyed
from shoal.tensor.types import Stack

_STEPS, _DEFAULT_STEPS, _CLIPPINGS = 12, 3, 3
_SMOOTHING = 0.1
_RADIUS = 100.0
_FAR = 1e4
_TURNS, _TURN_S, _LONG_S = 9, 0.05, 1.0
_READ_BYTES = 1 << 28
_SAME = "0.00001"


@dataclass(frozen=True)
class Size:
    """Rows [n, dim] of which the last `faulty` are; in_sets: how many MDA is told of, so few that
    both can try all sets."""

    rows: int
    dim: int
    faulty: int
    in_sets: int

    @property
    def name(self) -> str:
        return f"n = {self.rows}, d = {self.dim:,}"

    def drawn(self, far: bool = False) -> Stack:
        """Honest rows lie around 0.3, faulty ones on the other side; far: the last one far away."""
        key = keyed.key_of(1, "byzfl", self.rows)
        x = keyed.normal(keyed.grid(keyed.grid(key, self.rows), self.dim))
        x[: self.rows - self.faulty] += 0.3
        x[self.rows - self.faulty :] -= 0.6
        x[-1] -= _FAR if far else 0.0
        return x


SIZES = (Size(50, 100_000, 10, 2), Size(20, 1_000_000, 4, 3))
_TINY = (Size(9, 300, 2, 2), Size(8, 200, 1, 2))


@dataclass(frozen=True)
class Contest:
    """One rule: ours, and ByzFL's stages. same: whether results must agree; order: the order in
    which ours deals rows out, for a rule of ByzFL's that draws its own; far: on rows with one far
    away."""

    name: str
    ours: Callable[[Stack], Any]
    theirs: Stages
    same: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    far: bool = False


def contests(size: Size) -> Iterator[Contest]:
    """All of them at this size."""
    f, few = size.faulty, size.in_sets
    here = torch.ones(size.rows, dtype=torch.bool)

    def rule(name: str, **settings: Any) -> Callable[[Stack], Any]:
        made = find("aggregate", name)(**settings)
        return lambda x: made(x, mask=here)

    def around(center: Callable[[Stack], Stack], name: str, **settings: Any) -> Any:
        made = find("aggregate", name)(**settings)
        return lambda x: made(x, mask=here, center=center(x))

    def rows_of(name: str, **settings: Any) -> Callable[[Stack], Any]:
        made = find("aggregate", name)(**settings)
        return lambda x: made.before(x, here)[0]

    yield Contest("mean", rule("mean"), (("Average", {}),))
    yield Contest("median", rule("median"), (("Median", {}),))
    yield Contest("trimmed mean", rule("trimmed_mean", trim=f), (("TrMean", {"f": f}),))
    for steps in (_STEPS, _DEFAULT_STEPS):
        yield Contest(
            f"geometric median, {steps} steps each",
            rule("geometric_median", smoothing=_SMOOTHING, iterations=steps),
            (("GeometricMedian", {"nu": _SMOOTHING, "T": steps}),), same=steps == _STEPS,
        )  # fmt: skip
    yield Contest("krum", rule("krum", byzantine=f - 1), (("Krum", {"f": f}),))
    yield Contest(
        "multi-krum", rule("multi_krum", byzantine=f - 1, keep=size.rows - f),
        (("MultiKrum", {"f": f}),),
    )  # fmt: skip
    yield Contest(
        f"centred clipping, {_CLIPPINGS} steps each",
        around(lambda x: torch.zeros_like(x[0]), "centered_clipping", radius=_RADIUS,
               iterations=_CLIPPINGS),
        (("CenteredClipping", {"L": _CLIPPINGS, "tau": _RADIUS}),),
    )  # fmt: skip
    yield Contest(
        f"minimum diameter, f = {few}", rule("mda", byzantine=few), (("MDA", {"f": few}),)
    )
    yield Contest(
        "nearest neighbours (MoNNA)", around(lambda x: x[0], "nna", byzantine=f),
        (("MoNNA", {"f": f, "idx": 0}),),
    )  # fmt: skip
    yield Contest("mean around the median", rule("meamed", byzantine=f), (("Meamed", {"f": f}),))
    yield Contest("covariance filter", rule("caf", byzantine=f), (("CAF", {"f": f}),), same=False)
    yield Contest("NNM's rows", rows_of("nnm", byzantine=f), (("NNM", {"f": f}),))
    order = find("aggregate", "bucketing")(size=2).order(here).tolist()
    yield Contest(
        "bucketing's rows", rows_of("bucketing", size=2), (("Bucketing", {"s": 2}),),
        more={"order": order},
    )  # fmt: skip
    yield Contest("ARC's rows", rows_of("arc", byzantine=f), (("ARC", {"f": f}),))
    yield Contest("clipping's rows", rows_of("clipping", radius=3 * _RADIUS),
                  (("Clipping", {"c": 3 * _RADIUS}),))  # fmt: skip
    for name, label, before, more in (
        ("nnm", "NNM", ("NNM", {"f": f}), {}),
        ("bucketing", "bucketing", ("Bucketing", {"s": 2}), {"order": order}),
        ("arc", "ARC", ("ARC", {"f": f}), {}),
    ):
        yield Contest(
            f"{label}, then trimmed mean", rule(name, byzantine=f, then="trimmed_mean"),
            (before, ("TrMean", {"f": f})), more=more,
        )  # fmt: skip
    yield Contest(
        "smallest eigenvalue, f = 1", rule("smea", byzantine=1), (("SMEA", {"f": 1}),), far=True
    )


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    note("bandwidth")
    rate = read_rate(1 << 20 if tiny else _READ_BYTES)
    yield Row.of("reading memory: a sum", rate / 1e9, "GB/s")
    sizes, turns = (_TINY, 1) if tiny else (SIZES, _TURNS)
    found = python()
    if found is None:
        for size in sizes:
            yield from _alone(size, rate, note, turns)
            yield missing(f"ByzFL, {size.name}", REASON)
        return
    with TemporaryDirectory() as folder, ByzFL(found, Path(folder)) as byzfl:
        for size in sizes:
            yield from _beside(byzfl, size, rate, note, turns)


def _beside(byzfl: ByzFL, size: Size, rate: float, note: Note, turns: int) -> Iterator[Row]:
    x, far = size.drawn(), False
    byzfl.load(x)
    ratios = []
    for contest in contests(size):
        name = f"{contest.name}, {size.name}"
        note(name)
        if contest.far != far:
            x, far = size.drawn(contest.far), contest.far
            byzfl.load(x)
        ours, theirs, copying = _race(byzfl, contest, x, turns)
        ratios.append(theirs / ours)
        # At most 1/0.95 of its time.
        yield Row.of(name, ours * 1e3, "ms CPU", against=("ByzFL", theirs * 1e3), bound="<= 20/19")
        if copying:
            yield Row.of(
                f"{name}: its copy not counted", ours * 1e3, "ms CPU",
                against=("ByzFL in place", (theirs - copying) * 1e3),
            )  # fmt: skip
        yield from _against_one_pass(contest.name, size, ours, rate)
        if contest.same:
            mine, other = contest.ours(x), byzfl.result(contest.theirs, **contest.more)
            apart = _apart(mine, other)
            yield Row.of(f"{name}: results apart, of the largest number", apart, "",
                         bound=f"<= {_SAME}")  # fmt: skip
            if apart > float(_SAME):
                yield from _who_is_off(contest, name, x, mine, other)
    yield Row.of(f"geometric mean of {len(ratios)} rules, {size.name}: times faster",
                 geometric_mean(ratios), "x", bound=">= 2")  # fmt: skip


def _who_is_off(contest: Contest, name: str, x: Stack, ours: Stack, theirs: Stack) -> Iterator[Row]:
    """How far both are from the rule on the same rows in double precision."""
    exact = contest.ours(x.double())
    yield Row.of(
        f"{name}: off double precision", _apart(ours, exact), "",
        against=("ByzFL", _apart(theirs, exact)),
    )  # fmt: skip


def _alone(size: Size, rate: float, note: Note, turns: int) -> Iterator[Row]:
    """What there is to say without ByzFL."""
    x = size.drawn()
    for contest in contests(size):
        name = f"{contest.name}, {size.name}"
        note(name)
        calls = _calls(_seconds(contest, x, 1))
        ours = median(_seconds(contest, x, calls) for _ in range(turns))
        yield Row.of(name, ours * 1e3, "ms CPU")
        yield from _against_one_pass(contest.name, size, ours, rate)


def _against_one_pass(name: str, size: Size, ours: float, rate: float) -> Iterator[Row]:
    bounds = {"mean": "<= 2", "krum": None, f"geometric median, {_STEPS} steps each": None}
    if name in bounds:
        once = size.rows * size.dim * 4 / rate
        yield Row.of(f"{name}, {size.name}: beside reading the rows once", ours * 1e3, "ms CPU",
                     against=("one pass", once * 1e3), bound=bounds[name])  # fmt: skip


def _race(byzfl: ByzFL, contest: Contest, x: Stack, turns: int) -> tuple[float, float, float]:
    """Median CPU seconds of a call of ours, of theirs, and of the copy in theirs, by turns."""
    ours, theirs = [], []
    mine = _calls(_seconds(contest, x, 1))
    first, _ = byzfl.seconds(contest.theirs, 1, **contest.more)
    other = _calls(first)
    for _ in range(min(turns, 3) if first > _LONG_S else turns):
        ours.append(_seconds(contest, x, mine))
        theirs.append(byzfl.seconds(contest.theirs, other, **contest.more))
    whole, copying = zip(*theirs, strict=True)
    return median(ours), median(whole), median(copying)


def _seconds(contest: Contest, x: Stack, calls: int) -> float:
    watch = Stopwatch()
    for _ in range(calls):
        contest.ours(x)
    return watch.cpu_s / calls


def _calls(first_s: float) -> int:
    """Enough of them for a clock's tick not to matter."""
    return max(1, min(20, int(_TURN_S / max(first_s, 1e-6))))


def _apart(ours: Stack, theirs: Stack) -> float:
    """Largest difference over the largest number."""
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours - theirs).abs().max() / theirs.abs().max())
