"""Claims against runs: a number per seed, a statistic over the seeds, a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.lab.card import Bound, Claim
from shoal.lab.rows import Rows
from shoal.lab.statistics import Interval, summarise


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. `clear`: the whole interval lies on the verdict's side of the bound.

    verdict: holds | fails | inconclusive (a demanded seed is missing or not finite) | out of scale.
    measured is nan unless the verdict is holds or fails. values: the number of each seed.
    """

    name: str
    statement: str
    verdict: str
    measured: float
    interval: Interval | None
    low: float
    high: float
    clear: bool
    expected: str
    statistic: str = "median"
    comparison: str = ""
    at: str = ""
    reason: str = ""
    values: tuple[tuple[int, float], ...] = ()

    @property
    def bound(self) -> str:
        """The bound in words, such as `<= 0.025`."""
        return str(Bound(self.low, self.high))

    @property
    def as_expected(self) -> bool:
        return self.verdict == self.expected


def judge(claim: Claim, rows: Rows, budget: str = "full") -> Verdict:
    """The verdict on one claim. `rows.seeds` are the demanded seeds, present or not."""
    what = (
        f"{claim.metric} ({claim.take}): {claim.compare}"
        if claim.compare
        else (getattr(claim.measure, "__name__", ""))
    )
    verdict, measured, interval, clear = "out of scale", math.nan, None, False
    values: dict[int, float] = {}
    if claim.scale != "paper" and not (claim.scale == "full" and budget == "small"):
        values = measure(claim, rows)
        verdict = "inconclusive"
        numbers = [values.get(seed, math.nan) for seed in rows.seeds]
        if numbers and all(math.isfinite(number) for number in numbers):
            measured, interval = summarise(numbers, claim.statistic)
            good = claim.holds.holds(measured)
            verdict = "holds" if good else "fails"
            clear = interval is not None and _clear(claim, interval, good)
    return Verdict(
        claim.name, claim.statement, verdict, measured, interval, claim.holds.low, claim.holds.high,
        clear, claim.expected, claim.statistic, what, claim.at, claim.reason,
        tuple(sorted(values.items())),
    )  # fmt: skip


def measure(claim: Claim, rows: Rows) -> dict[int, float]:
    """The claim's number for each seed; nan where an arm has no run."""
    if claim.measure is not None:
        values = claim.measure(rows)
        strange = [seed for seed in values if seed not in rows.seeds]
        if strange:
            raise UsageError(
                f"claim {claim.name}: measure returned seed {strange[0]}; the experiment has "
                f"{list(rows.seeds)} (return a mapping from seed to number)"
            )
        return {seed: float(value) for seed, value in values.items()}
    assert claim.compare is not None
    out = {}
    for seed in rows.seeds:
        first = rows.value(claim.compare.arm, seed, claim.metric, claim.take)
        second = math.nan
        if claim.compare.other:
            second = rows.value(claim.compare.other, seed, claim.metric, claim.take)
        out[seed] = claim.compare.of(first, second)
    return out


def _clear(claim: Claim, interval: Interval, good: bool) -> bool:
    low, high = claim.holds.low, claim.holds.high
    if good:
        return low <= interval.low and interval.high <= high
    return interval.high < low or high < interval.low


def judge_all(claims: Sequence[Claim], rows: Rows, budget: str = "full") -> tuple[Verdict, ...]:
    """The verdicts of a card."""
    return tuple(judge(claim, rows, budget) for claim in claims)
