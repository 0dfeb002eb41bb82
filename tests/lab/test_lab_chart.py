"""Pictures that cards make of their runs: drawn from data that a report keeps."""

from __future__ import annotations

import pytest

from shoal.base.errors import UsageError
from shoal.lab.chart import Chart, Drawn, Points
from shoal.lab.chart_picture import svg
from shoal.lab.experiment import Experiment
from shoal.lab.report import Report
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario


def accuracies(rows: Rows) -> Points:
    """The accuracy of every round."""
    return {arm: [(r.round, r.value) for r in rows.series(arm, 0, "accuracy")] for arm in rows.arms}


@pytest.mark.parametrize(
    ("kind", "lines", "shown"),
    [
        ("curves", {"fast": [(0.0, 0.0), (1.5, 3.0)], "slow": [(0.0, 0.0), (9.0, 3.0)]}, "slow"),
        ("points", {"fast": [(7, 0.1), (9, 0.3)], "slow": [(7, 0.2)]}, "slow"),
        ("spans", {"client 1": [(0.0, 2.0), (2.5, 3.0)], "client 2": [(0.0, 3.0)]}, "client 2"),
        ("bars", {"before": [(1, 20.0), (2, 5.0)], "after": [(1, 4.0), (3, 7.0)]}, "after"),
        ("grid", {"open": [("open", 1.0), ("shut", 0.125)], "shut": [("open", 0.0)]}, "12.5%"),
    ],
)
def test_each_kind_is_drawn(kind: str, lines: Points, shown: str) -> None:
    picture = svg(Drawn("What came of it", kind, "over", "up", lines))
    assert picture.startswith("<svg")
    assert all(text in picture for text in ("over", "up", shown))
    assert svg(Drawn("Nothing", kind, "", "", {"line": []})) == ""


def test_a_kind_that_does_not_exist_is_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'bars'"):
        Chart("Mine", "bar", accuracies)


def test_a_report_keeps_what_is_drawn() -> None:
    world = Scenario(peers=4, rounds=2, task="digits", topology="ring")
    chart = Chart("Rounds", "curves", accuracies, "round", "accuracy")
    report = Experiment({"ring": "dpsgd"}, world, charts=(chart,)).run()
    again = Report.from_json(report.to_json())
    assert svg(again.charts[0]) == svg(report.charts[0]) != ""
    assert "Rounds" in again.to_html()
    assert len(again.brief().charts) == 1
