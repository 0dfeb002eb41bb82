"""Reports: round trips, the page, replay and export."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from fake_lab import Mine, fake_launch
from safetensors.torch import load_file

from shoal.base.errors import UsageError
from shoal.lab import plot
from shoal.lab.card import Arm, Plot, System
from shoal.lab.experiment import Experiment
from shoal.lab.export import export
from shoal.lab.replay import replay
from shoal.lab.report import Report
from shoal.lab.scenario import Scenario
from shoal.lab.store import Store
from shoal.lab.text import number, seconds

STORM = [{"kind": "crash", "fraction": 0.25, "at": {"round": 3}}]


@pytest.fixture
def report(catalogue: Path, tmp_path: Path) -> Report:
    experiment = Experiment.of_system("alpha", "small", overrides={"faults": STORM})
    with Store(tmp_path / "s") as store:
        return experiment.run(store, launcher=fake_launch)


def test_json_round_trip(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again.cells == report.cells
    # By text, since a verdict that is out of scale measures nan, which equals nothing.
    assert repr(again) == repr(report)
    assert again.to_json() == report.to_json()
    json.loads(report.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_wrong_files_are_refused(report: Report, tmp_path: Path) -> None:
    newer = json.loads(report.to_json()) | {"schema": 99}
    with pytest.raises(UsageError, match="schema 99"):
        Report.from_json(json.dumps(newer))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match="schema None"):
        Report.load(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("no json")
    with pytest.raises(UsageError, match="no report of Shoal"):
        Report.load(tmp_path / "y.json")
    with pytest.raises(UsageError, match="cannot be read"):
        Report.load(tmp_path / "z.json")


def test_summary_is_the_median_over_the_seeds(report: Report) -> None:
    lasts = [report.cell("alpha", seed).curves["accuracy"][-1][2] for seed in report.seeds]
    row = next(r for r in report.summary() if (r.arm, r.metric) == ("alpha", "accuracy"))
    assert row.value == pytest.approx(sum(lasts) / 2)
    assert row.interval is not None
    assert (row.interval.low, row.interval.high) == (min(lasts), max(lasts))
    assert row.seeds == 2


def test_csv_and_markdown_hold_the_numbers(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    found = [r for r in rows if (r["arm"], r["seed"], r["metric"]) == ("slow", "1", "loss")]
    assert float(found[0]["value"]) == report.cell("slow", 1).curves["loss"][-1][2]
    text = report.to_markdown()
    for verdict in report.verdicts:
        assert f"| {verdict.name}: {verdict.statement} |" in text
        assert verdict.verdict in text


class Page(HTMLParser):
    """What a browser would fetch, the ids, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("src", "srcset", "data", "action", "poster"):
                self.fetched.append(value or "")
            if key == "href":
                (self.links if (value or "").startswith("#") else self.fetched).append(value or "")
            if key == "id":
                self.ids.append(value or "")
        if tag in ("link", "script", "iframe", "img", "object", "embed"):
            self.fetched.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "r")
    text = path.read_text()
    assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]+\.", text)
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    used = {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(page.ids)
    for verdict in report.verdicts:
        assert f">{verdict.verdict}</span>" in text
        assert verdict.statement.replace("'", "&#x27;") in text
    assert re.search(r"crash of peers \d+, \d+, \d+ at round 3", text)
    assert f"shoal replay {tmp_path / 'r' / 'alpha-small.json'}" in text
    for heading in ("Claims", "Progress", "Spread over the peers", "Network", "Faults"):
        assert f"<h2>{heading}</h2>" in text
    for axis in ("virtual time", "bytes sent by all peers", "round"):
        assert axis in text
    assert len(text) < 1_000_000
    assert plot.progress(report, "loss") in text  # drawn anew, equal to the last id
    for suffix in (".json", ".md", ".csv"):
        assert path.with_suffix(suffix).stat().st_size > 0
    assert repr(Report.load(path)) == repr(report)


def test_a_plot_draws_the_last_value_of_arms_over_their_number(report: Report) -> None:
    wanted = Plot("Rates", "accuracy", "rate", {"both": ((0.3, "alpha"), (0.05, "slow"))})
    drawn = replace(report, plots=(wanted,))
    again = Report.from_json(drawn.to_json())
    assert again.plots == (wanted,)
    text = again.to_html()
    assert "<figcaption>Rates</figcaption>" in text
    assert plot.against(report, wanted) in text
    assert ">both</text>" in text
    assert "<figcaption>Rates</figcaption>" not in report.to_html()
    # An arm whose runs all ended in an error has no point, and one point is no line.
    lame = replace(report, cells=[cell for cell in report.cells if cell.arm != "slow"])
    assert plot.against(lame, wanted) == ""
    with pytest.raises(UsageError, match="two points"):
        Plot("Rates", "accuracy", "rate", {"both": ((0.3, "alpha"),)})
    wrong = Plot("Rates", "accuracy", "rate", {"both": ((0.3, "alpha"), (0.05, "slwo"))})
    with pytest.raises(UsageError, match="draws arm 'slwo'; did you mean 'slow'"):
        System("x", "strategy", "X", arms={"alpha": Arm(), "slow": Arm()}, plots=(wrong,))


def test_hostile_names_do_not_become_markup(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>'
    world = Scenario(nasty, peers=3, rounds=2)
    report = Experiment({nasty: Mine()}, world, title=nasty).run(launcher=fake_launch)
    html = report._repr_html_()
    assert html.startswith("<iframe srcdoc=")
    assert "<script" not in html
    assert "&lt;script" not in html  # escaped once for the page and once more for the frame
    assert "run the script again" in html
    assert report.slug() == "script-alert-x-script"


def test_a_page_of_failures_only_still_renders(report: Report) -> None:
    for cell in report.cells:
        cell.error, cell.curves, cell.totals = "Stalled: nothing moves", {}, {}
        cell.spreads, cell.finals, cell.peer_bytes = {}, {}, []
    assert "Stalled: nothing moves" in report.to_html()
    assert "Stalled: nothing moves" in report.to_markdown()


def test_replay_finds_what_differs(report: Report) -> None:
    loaded = Report.from_json(report.to_json())
    found = list(replay(loaded, launcher=fake_launch))
    assert [c.same for c in found] == [True] * 4
    loaded.cells[0].curves["loss"][2] = (*loaded.cells[0].curves["loss"][2][:2], 7.0)
    loaded.cells[0].state_digest = "0" * 32
    worse = list(replay(loaded, launcher=fake_launch, arm="alpha", seed=0))
    assert len(worse) == 1
    assert any(d.startswith("loss at") for d in worse[0].differences)
    assert any(d.startswith("state_digest") for d in worse[0].differences)
    with pytest.raises(UsageError, match="no finished run of arm x"):
        list(replay(loaded, launcher=fake_launch, arm="x"))


def test_replay_says_when_objects_were_live() -> None:
    world = Scenario(peers=3, rounds=2)
    report = Experiment({"mine": Mine()}, world).run(launcher=fake_launch)
    with pytest.raises(UsageError, match=r"live Python objects \(arm mine\)"):
        list(replay(report, launcher=fake_launch))


def test_export_of_one_peer_and_of_the_mean(report: Report, tmp_path: Path) -> None:
    cell = report.cell("alpha", 1)
    assert cell.cell is not None
    scenario = Scenario.from_json(cell.cell["scenario"])
    run = fake_launch(Mine(rate=0.3), scenario, seed=1, engine="auto")
    one = report.params("alpha", 1, peer=2)
    assert torch.equal(torch.cat([one["weight"].flatten(), one["bias"]]), run.final[2])
    away = scenario.explicit_faults()[0].who or ()
    assert len(away) == 3
    staying = torch.stack([run.final[p] for p in range(12) if p not in away]).mean(0)
    path = export(cell, tmp_path / "deep" / "m.safetensors")
    tensors = load_file(path)
    assert tensors["weight"].shape == (2, 3)
    torch.testing.assert_close(torch.cat([tensors["weight"].flatten(), tensors["bias"]]), staying)
    with pytest.raises(UsageError, match=r"peer 40 left no parameters; these did: 0-11"):
        report.params("alpha", 1, peer=40)
    Path(cell.params_file).unlink()
    with pytest.raises(UsageError, match="no parameters are stored"):
        report.params("alpha", 1)


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (999.4, "bytes_sent", "999 B"), (999.6, "bytes_sent", "1 kB"), (2.5e9, "bytes", "2.5 GB"),
        (0.5, "virtual_s", "500 ms"), (90.0, "virtual_s", "90 s"), (600.0, "virtual_s", "10 min"),
        (7260.0, "cpu_s", "2 h 1 min"), (0.0, "cpu_s", "0 s"), (float("nan"), "loss", "n/a"),
        (float("inf"), "loss", "never"), (1234567.0, "messages_sent", "1,234,567"),
        (0.98765, "accuracy", "0.9877"), (1.2e-7, "loss", "1.2e-07"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float, metric: str, text: str) -> None:
    assert number(value, metric) == text


def test_durations_never_skip_a_minute() -> None:
    assert seconds(3599.0) == "1 h 0 min"
    assert seconds(3540.0) == "59 min"
