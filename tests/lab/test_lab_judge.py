"""Cards, measured numbers and verdicts."""

from __future__ import annotations

import math

import pytest

from shoal.base.errors import UsageError
from shoal.lab.card import (
    Arm,
    Claim,
    Compare,
    Source,
    System,
    at_least,
    at_most,
    between,
    difference,
    ratio,
    value,
)
from shoal.lab.judge import judge
from shoal.lab.rows import Rows, at_time, curve, moments, spread
from shoal.world.record import Happening, Row, Run


def run_of(*values: float, metric: str = "accuracy", sent: int = 100) -> Run:
    run = Run(engine="event", seed=0, peers=2, bytes_sent=[sent, sent])
    run.rows = [Row(metric, v, float(i), i) for i, v in enumerate(values)]
    return run


def rows_of(**arms: list[Run | None]) -> Rows:
    runs = {
        (arm, seed): run
        for arm, each in arms.items()
        for seed, run in enumerate(each)
        if run is not None
    }
    return Rows(runs, arms, range(len(next(iter(arms.values())))))


def claim(compare: Compare, holds, metric: str = "accuracy", **settings) -> Claim:
    return Claim("c", "s", holds, metric, compare, **settings)


def test_paired_median_decides_and_the_interval_says_how_clear() -> None:
    rows = rows_of(
        a=[run_of(0.1, x) for x in (0.9, 0.8, 0.7, 0.95, 0.85)],
        b=[run_of(0.1, x) for x in (0.5, 0.5, 0.72, 0.5, 0.5)],
    )
    found = judge(claim(difference("a", "b"), at_least(0.1)), rows)
    assert found.verdict == "holds"
    assert found.measured == pytest.approx(0.35)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((-0.02, 0.45))
    assert not found.clear
    assert judge(claim(difference("a", "b"), at_least(-0.5)), rows).clear
    lost = judge(claim(difference("a", "b"), at_least(0.5)), rows)
    assert (lost.verdict, lost.clear) == ("fails", True)
    close = judge(claim(difference("a", "b"), at_least(0.4)), rows)
    assert (close.verdict, close.clear) == ("fails", False)


def test_bounds_are_closed() -> None:
    rows = rows_of(a=[run_of(2.0), run_of(2.0)], b=[run_of(1.0), run_of(1.0)])
    assert judge(claim(ratio("a", "b"), at_most(2.0)), rows).verdict == "holds"
    assert judge(claim(ratio("a", "b"), between(2.0, 3.0)), rows).verdict == "holds"
    assert judge(claim(ratio("a", "b"), at_least(2.0001)), rows).verdict == "fails"
    assert judge(claim(value("a"), at_most(2.0)), rows).bound == "<= 2"


@pytest.mark.parametrize("bad", [None, run_of(math.nan), run_of(math.inf)])
def test_a_missing_or_broken_seed_is_inconclusive(bad: Run | None) -> None:
    rows = rows_of(a=[run_of(1.0), bad, run_of(1.0)])
    found = judge(claim(value("a"), at_least(0.0)), rows)
    assert found.verdict == "inconclusive"
    assert math.isnan(found.measured)
    assert not found.clear


def test_division_by_zero_is_inconclusive() -> None:
    rows = rows_of(a=[run_of(1.0)], b=[run_of(0.0)])
    assert judge(claim(ratio("a", "b"), at_least(0.0)), rows).verdict == "inconclusive"


def test_scale_decides_what_can_be_judged() -> None:
    rows = rows_of(a=[run_of(1.0)])
    full = claim(value("a"), at_least(0.0), scale="full")
    assert judge(full, rows, "small").verdict == "out of scale"
    assert judge(full, rows, "full").verdict == "holds"
    paper = Claim("c", "s", at_least(0.0), scale="paper")
    assert judge(paper, rows, "full").verdict == "out of scale"


def test_takes_statistics_and_totals() -> None:
    rows = rows_of(a=[run_of(0.2, 0.9, 0.4, sent=7), run_of(0.1, 0.3, 0.2)])
    assert rows.per_seed("a", "accuracy", "max") == {0: 0.9, 1: 0.3}
    assert rows.value("a", 0, "accuracy") == 0.4
    assert rows.value("a", 0, "accuracy", "sum") == pytest.approx(1.5)
    assert rows.value("a", 0, "bytes_sent") == 14
    worst = judge(claim(value("a"), at_least(0.25), statistic="min"), rows)
    assert (worst.verdict, worst.measured) == ("fails", 0.2)
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        rows.value("a", 0, "acuracy")
    with pytest.raises(UsageError, match="no arm 'z'"):
        rows.value("z", 0, "accuracy")


def test_reach_in_rounds_seconds_and_bytes() -> None:
    run = run_of(0.1, 0.5, 0.7, 0.4, 0.9)
    run.rows += [Row("bytes_sent", 10.0 * i, float(2 * i), -1) for i in range(3)]
    rows = rows_of(a=[run])
    assert rows.reach("a", 0, "accuracy", 0.6) == 2
    assert rows.reach("a", 0, "accuracy", 0.6, window=2) == 2
    assert rows.reach("a", 0, "accuracy", 0.65, window=2) == 4
    assert rows.reach("a", 0, "accuracy", 0.6, axis="time_s") == 2.0
    assert rows.reach("a", 0, "accuracy", 0.45, axis="bytes") == 5.0
    assert rows.reach("a", 0, "accuracy", 0.95) == math.inf
    assert rows.reach("a", 0, "accuracy", 0.3, falling=True) == 0
    assert at_time([], 1.0) != at_time([], 1.0)


def test_a_measure_may_answer_for_known_seeds_only() -> None:
    rows = rows_of(a=[run_of(1.0), run_of(3.0)])
    good = Claim("c", "s", at_most(2.0), measure=lambda rows: {s: s + 1.0 for s in rows.seeds})
    assert judge(good, rows).measured == 1.5
    with pytest.raises(UsageError, match="seed 9"):
        judge(Claim("c", "s", at_most(2.0), measure=lambda rows: {9: 1.0}), rows)


def test_curves_without_rounds_carry_values_forward_until_a_peer_is_gone() -> None:
    run = Run(engine="event", seed=0, peers=3)
    run.rows = [
        Row("x", 1.0, 0.0, -1, 0), Row("x", 3.0, 0.0, -1, 1), Row("x", 5.0, 2.0, -1, 1),
        Row("x", 9.0, 4.0, -1, 0), Row("x", 2.0, 6.0, -1, 1),
    ]  # fmt: skip
    run.happenings = [Happening(3.0, "crash", (1,))]
    assert [(r.time_s, r.value) for r in curve(run, "x")] == [
        (0.0, 2.0), (2.0, 3.0), (4.0, 9.0), (6.0, 5.5),
    ]  # fmt: skip
    assert moments(run, "x")[1].values == (1.0, 5.0)
    assert spread(run, "x")[0][2][2] == 2.0


def test_rows_for_all_peers_win_over_means() -> None:
    run = Run(engine="event", seed=0, peers=2)
    run.rows = [Row("x", 1.0, 0.0, 0, 0), Row("x", 7.0, 0.0, 0, -1), Row("x", 3.0, 1.0, 1, 1)]
    assert [r.value for r in curve(run, "x")] == [7.0]
    run.rows.pop(1)
    assert [(r.round, r.value) for r in curve(run, "x")] == [(0, 1.0), (1, 3.0)]


def test_cards_refuse_what_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match=r"either metric and compare, or measure"):
        Claim("c", "s", at_most(1.0))
    with pytest.raises(UsageError, match="without a reason"):
        claim(value("a"), at_most(1.0), expected="fails")
    with pytest.raises(UsageError, match="did you mean 'strategy'"):
        System("x", "stratgy", "t")
    with pytest.raises(UsageError, match="lower-case words"):
        System("My System", "strategy", "t")
    with pytest.raises(UsageError, match="needs role and host"):
        System("x", "part", "t")
    with pytest.raises(UsageError, match="compares arm 'z'"):
        System("x", "strategy", "t", arms={"a": Arm()}, claims=(claim(value("z"), at_most(1)),))
    with pytest.raises(UsageError, match="low <= high"):
        between(2.0, 1.0)


def test_bibtex_without_year_or_identifiers() -> None:
    text = Source("Smith & Jones", "A title").bibtex("key")
    assert text == "@article{key,\n  author = {Smith and Jones},\n  title = {A title},\n}"
