"""The robustness matrix: who lies, what rules are told, fields, worst cases, breakdowns."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import staged_matrix
from hypothesis import given
from hypothesis import strategies as st
from staged_matrix import WORLD, matrix, staged

from shoal.base.errors import Stalled, UsageError
from shoal.lab import plot
from shoal.lab.experiment import Experiment, Tick
from shoal.lab.robustness import make_matrix, parts_named
from shoal.lab.robustness.breakdown import Search
from shoal.lab.robustness.liars import asks, hearing, liars, most_liars, refusal, told_of
from shoal.lab.scenario import Part, Scenario
from shoal.lab.store import Store


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second; one test draws them."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(plot, "svg", lambda *args: "<svg></svg>")


# Who lies, and what is heard of them.


def star(peers: int, **settings: Any) -> Scenario:
    exchange = {"name": "star", **settings}
    return Scenario("star", peers=peers, rounds=12, task="digits", exchange=exchange)


@pytest.mark.parametrize("world", [WORLD, star(12), star(12, hub=3)])
def test_more_liars_are_the_same_ones_and_others_and_never_the_hub(world: Scenario) -> None:
    hub = dict(world.exchange.settings).get("hub", 0) if world.exchange else None
    most = most_liars(world)
    assert most == (11 if hub is None else 10)
    before: set[int] = set()
    for count in range(most + 1):
        who = set(liars(world, count))
        assert len(who) == count
        assert before < who or not count
        assert hub not in who
        before = who
    assert liars(world, 4) != liars(world.with_settings({"seed": 1}), 4)


def test_what_peers_hear_of_liars() -> None:
    def heard(world: Scenario, who: tuple[int, ...]) -> tuple[int, int, int]:
        found = hearing(world.with_settings({"byzantine": who}))
        return found.liars, found.rows, found.width

    assert heard(WORLD, (3, 4, 9)) == (3, 12, 12)
    ring = WORLD.with_settings({"topology": "ring"})
    # On a ring a peer between two liars hears both.
    assert heard(ring, (3, 4, 9)) == (1, 3, 3)
    assert heard(ring, (3, 5, 9)) == (2, 3, 3)
    assert heard(star(12), (3, 4, 9)) == (3, 12, 12)
    assert heard(star(12, hub_works=False), (3, 4, 9)) == (3, 11, 12)
    # Of five that are drawn in each round all may be liars, over some rounds.
    liars_heard, rows, _ = heard(star(12, sample=5), tuple(range(1, 9)))
    assert 4 <= liars_heard <= 5
    assert rows == 5
    # The first to arrive are the liars.
    first = WORLD.with_settings({"exchange": {"name": "first_come", "byzantine": 3}})
    assert heard(first, (0, 1, 2)) == (3, 9, 12)


def test_rules_are_told_in_the_setting_that_they_have() -> None:
    assert told_of(Part("krum"), 3) == Part("krum", {"byzantine": 3})
    assert told_of(Part("trimmed_mean"), 3) == Part("trimmed_mean", {"trim": 3})
    assert told_of(Part("krum", {"byzantine": 1}), 3) == Part("krum", {"byzantine": 1})
    nnm = Part("nnm", {"then": "median"})
    assert told_of(nnm, 2) == Part("nnm", {"then": "median", "byzantine": 2})
    assert [asks(Part(n)) for n in ("median", "mean", "krum", "nnm")] == [False, False, True, True]


@pytest.mark.parametrize(
    ("rule", "count", "rows", "reason"),
    [
        (Part("krum"), 2, 7, ""),
        (Part("krum"), 3, 7, "krum cannot stand 3 liars among 7 vectors; 2 at most"),
        (Part("krum"), 1, 3, "krum cannot stand 1 liars among 3 vectors; 0 at most"),
        (Part("trimmed_mean"), 3, 7, ""),
        (Part("trimmed_mean"), 4, 7, "3 at most"),
        (Part("bulyan"), 2, 10, "1 at most"),
        # Told by its own settings, or not asking: it may show what it can do.
        (Part("krum", {"byzantine": 1}), 5, 7, ""),
        (Part("mean"), 5, 7, ""),
        (Part("median"), 5, 7, ""),
        # Promises nothing for any number, so no number ends its promise.
        (Part("nnm", {"then": "centered_clipping"}), 3, 7, ""),
        (Part("mda"), 12, 40, "sets to try"),
    ],
)
def test_a_rule_is_refused_where_its_promise_ends(
    rule: Part, count: int, rows: int, reason: str
) -> None:
    found = refusal(rule, count, rows, rows)
    assert reason in found
    assert bool(found) == bool(reason)


# Fields and what follows from them.


def test_fields_are_what_the_runs_say() -> None:
    found = matrix()
    assert found.worlds == ("dpsgd",)
    assert found.peers == {"dpsgd": 12}
    # 10% of 12 peers is one of them, 25% are three; krum is told.
    place = ("dpsgd", "krum", "sign_flip", 0.25)
    assert found.entry(*place).liars == 3
    assert found.entry(*place).told == 3
    assert found.entry(*place).value == pytest.approx(0.8 - 0.03 - 0.06)
    assert found.entry("dpsgd", "median", "gaussian", 0.1).told is None
    assert found.entry("dpsgd", "mean", "gaussian", 0.1).value == 0.1
    assert found.clean("dpsgd", "krum") == pytest.approx(0.8)
    worst = found.worst("dpsgd", "krum")
    assert worst is not None
    assert (worst.attack, worst.share) == ("sign_flip", 0.25)
    assert found.average("dpsgd", "median") == pytest.approx(0.86 - (0.02 + 0.01 + 0.06 + 0.03) / 4)
    # Without liars, but prepared for three of them.
    assert found.clean_cost("dpsgd", "krum") == pytest.approx(0.8 - 0.03 - 0.9)
    assert found.clean_cost("dpsgd", "mean") == 0.0
    assert [row.rule for row in found.summary()] == ["median", "krum", "mean"]
    assert found.exit_code == 0


def test_seeds_are_taken_together_by_their_median() -> None:
    found = matrix(seeds=3, attacks="sign_flip")
    entry = found.entry("dpsgd", "median", "sign_flip", 0.25)
    assert sorted(entry.values) == [0, 1, 2]
    assert entry.value == pytest.approx(0.86 + 0.001 - 0.06)


def test_a_matrix_without_the_mean_is_compared_with_it_all_the_same() -> None:
    found = matrix("median", "sign_flip")
    assert found.clean_cost("dpsgd", "median") == pytest.approx(0.86 - 0.9)
    assert [row.rule for row in found.summary()] == ["median"]
    assert not [e for e in found.entries if e.rule == "mean" and e.attack]


def test_told_overrides_the_truth() -> None:
    found = matrix("krum,trimmed_mean", "sign_flip", told=2)
    assert {e.told for e in found.entries if e.rule == "krum"} == {2}
    entry = found.entry("dpsgd", "trimmed_mean", "sign_flip", 0.1)
    assert entry.value == pytest.approx(0.89 - 0.02 - 0.02)


def test_in_a_graph_rules_are_told_of_the_liars_that_one_peer_hears() -> None:
    ring = WORLD.with_settings({"topology": "ring"})
    found = matrix("trimmed_mean,median", "sign_flip", (0.1, 0.5), world=ring)
    entry = found.entry("dpsgd", "trimmed_mean", "sign_flip", 0.1)
    assert (entry.liars, entry.told) == (1, 1)
    # Six of twelve: somebody has two liars beside it and hears three vectors.
    entry = found.entry("dpsgd", "trimmed_mean", "sign_flip", 0.5)
    assert (entry.liars, entry.told) == (6, 2)
    assert entry.text == "refused"
    assert entry.refused == "trimmed_mean cannot stand 2 liars among 3 vectors; 1 at most"
    assert found.entry("dpsgd", "median", "sign_flip", 0.5).values


def test_what_is_refused_is_not_run_and_not_counted() -> None:
    ran: list[str] = []

    def watching(what: Any, scenario: Scenario, **settings: Any) -> Any:
        ran.append(f"{scenario.aggregator.name} {len(scenario.byzantine_peers())}")
        return staged(what, scenario, **settings)

    found = matrix("krum,median", shares=(0.25, 0.5), launcher=watching)
    assert "krum 6" not in ran
    assert {"krum 3", "median 6"} <= set(ran)
    row = next(row for row in found.summary() if row.rule == "krum")
    assert (row.ran, row.fields) == (2, 4)
    # Prepared for three, the most that it stands here.
    assert row.clean_cost == pytest.approx(0.8 - 0.03 - 0.9)
    # What does not stand everything comes last.
    assert [row.rule for row in found.summary()] == ["median", "krum"]
    text = found.to_markdown()
    assert "| krum | refused | refused | - |" in text
    assert "dpsgd: krum at 50%: krum cannot stand 6 liars among 12 vectors; 4 at most" in text
    assert found.exit_code == 0


def test_a_run_that_breaks_down_is_an_error_of_its_field() -> None:
    def stalling(what: Any, scenario: Scenario, **settings: Any) -> Any:
        if scenario.attack and scenario.attack.name == "gaussian":
            raise Stalled("nobody moves")
        return staged(what, scenario, **settings)

    found = matrix("median", launcher=stalling)
    entry = found.entry("dpsgd", "median", "gaussian", 0.1)
    assert entry.text == "error"
    assert "nobody moves" in entry.error
    assert found.exit_code == 1
    worst = found.worst("dpsgd", "median")
    assert worst is not None
    assert worst.attack == "sign_flip"


def test_worlds_are_hosts_and_points_of_the_grid() -> None:
    found = matrix(
        "median", "sign_flip", (0.25,), hosts=("fedavg", "dpsgd"), grid={"task.alpha": ("0.1", "1")}
    )
    assert sorted(found.worlds) == [
        "dpsgd [task.alpha=0.1]", "dpsgd [task.alpha=1]",
        "fedavg [task.alpha=0.1]", "fedavg [task.alpha=1]",
    ]  # fmt: skip
    assert len(found.summary()) == 4


@pytest.mark.parametrize("key", ["lr", "learning_rate"])
def test_learning_rates_are_chosen_for_each_rule_without_liars(key: str) -> None:
    seeds: list[int] = []

    def watching(what: Any, scenario: Scenario, *, seed: int, **settings: Any) -> Any:
        seeds.append(seed)
        return staged(what, scenario, seed=seed, **settings)

    found = matrix("median,krum", grid={key: ("0.1", "0.2", "0.3")}, launcher=watching)
    assert found.worlds == ("dpsgd",)
    assert found.rates == {"dpsgd: median": 0.3, "dpsgd: krum": 0.1, "dpsgd: mean": 0.1}
    assert found.clean("dpsgd", "median") == pytest.approx(0.91)
    assert seeds[:9] == [100] * 9
    assert "dpsgd: median 0.3" in found.to_markdown()


def test_every_field_is_run_once_and_progress_counts_all(tmp_path: Path) -> None:
    ticks: list[Tick] = []
    with Store(tmp_path) as store:
        matrix(store=store, progress=ticks.append, below=0.5)
        # Fields: 3 clean, 2 of krum prepared, 3 rules x 2 attacks x 2 shares; then probes.
        assert [t for t in ticks if t.note == "done"][16].total == 17
        assert ticks[-1].done == ticks[-1].total == store.count()
        before = store.count()
        found = matrix(store=store, progress=ticks.append, below=0.5)
        assert store.count() == before
    assert len(found.probes) > 0
    assert ticks[-1].note == "stored"


# Breakdown.


@given(st.integers(1, 200), st.data())
def test_bisection_finds_the_smallest_number_that_breaks(most: int, data: st.DataObject) -> None:
    breaks = data.draw(st.integers(1, most + 1))
    search, probes = Search(most), 0
    for known in data.draw(st.lists(st.integers(1, most), max_size=3)):
        search.learn(known, known >= breaks)
    while (probe := search.probe) is not None:
        search.learn(probe, probe >= breaks)
        probes += 1
    assert search.broken == breaks
    assert probes <= math.ceil(math.log2(most + 1))


def test_breakdowns_are_found_where_they_are() -> None:
    found = matrix("mean,median,trimmed_mean", below=0.5, shares=(0.1,))
    ends = {end.rule: end for end in found.breakdowns}
    assert (ends["mean"].liars, ends["mean"].share) == (1, 1 / 12)
    assert ends["median"].liars == 6
    assert ends["median"].attack in ("sign_flip", "gaussian")
    assert ends["trimmed_mean"].liars == 4
    # At most log2(12) numbers are tried for a rule, two attacks each.
    for rule in ("mean", "median", "trimmed_mean"):
        assert len([e for e in found.probes if e.rule == rule]) <= 2 * 4
    # Krum is refused at five, before it would fall.
    (end,) = matrix("krum", below=0.5).breakdowns
    assert (end.liars, end.attack) == (5, "")
    assert "cannot stand 5 liars" in end.refused
    assert end.text == "41.7% (5), refused"


def test_what_no_number_of_liars_breaks_has_no_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(staged_matrix.STANDS, "median", 11)
    (end,) = matrix("median", "gaussian", below=0.5).breakdowns
    assert (end.liars, end.share, end.most) == (None, None, 11)
    assert end.text == "none up to 11"


def test_the_threshold_is_a_part_of_the_clean_accuracy() -> None:
    # At 0.02 for each liar of 0.86, more than 0.1 of it is gone from five liars on.
    (end,) = matrix("median", "sign_flip", below=0.9).breakdowns
    assert end.liars == 5


def test_mean_breaks_at_one_real_liar_and_the_median_at_half() -> None:
    world = Scenario(
        peers=7, rounds=2, exchange={"name": "star"},
        task={"name": "digits", "hidden": [], "standardise": True, "train_samples": 700},
    )  # fmt: skip
    experiment = Experiment({"fedavg": "fedavg"}, world, title="Real", overrides={"lr": "0.3"})
    found = make_matrix(
        experiment, [Part("mean"), Part("median")],
        [Part("infinite", {"finite": True}), Part("gaussian")], (0.4,), below=0.5,
    )  # fmt: skip
    ends = {end.rule: end.liars for end in found.breakdowns}
    assert ends == {"mean": 1, "median": 4}
    worst = found.worst("fedavg", "median", 0.4)
    assert worst is not None
    assert worst.value > 0.5 > 2 * found.average("fedavg", "mean")


# What is written.


def test_the_same_numbers_in_every_form(tmp_path: Path) -> None:
    found = matrix("median,krum", shares=(0.25, 0.5), seeds=3, below=0.5)
    page = found.save(tmp_path)
    assert page == tmp_path / "staged.html"
    data = json.loads((tmp_path / "staged.json").read_text())
    assert data["rules"] == ["median", "krum"]
    fields = [r for r in data["records"] if r.get("field") == "sign_flip" and r["rule"] == "krum"]
    value = 0.8 - 0.03 + 0.001 - 0.06
    assert fields[0]["value"] == pytest.approx(value)
    assert fields[0]["values"].keys() == {"0", "1", "2"}
    assert fields[1]["value"] is None
    assert "cannot stand" in fields[1]["refused"]
    assert {r["breakdown"] for r in data["records"] if "breakdown" in r} == {"median", "krum"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "staged.csv").read_text())))
    own = [r for r in rows if (r["rule"], r["attack"], r["liars"]) == ("krum", "sign_flip", "3")]
    assert [float(r["accuracy"]) for r in own] == pytest.approx(
        [value + d for d in (-0.001, 0, 0.001)]
    )
    text = (tmp_path / "staged.md").read_text()
    assert "| rule | 0% (0) | 25% (3) | 50% (6) |" in text
    assert "| krum | 80.1 | 71.1 | refused |" in text
    html = page.read_text()
    assert "cannot stand 6 liars among 12 vectors" in html
    assert "http" not in html


def test_heat_maps_are_drawn_one_for_each_share_and_the_worst_case(pictures: None) -> None:
    html = matrix("median,krum", shares=(0.25, 0.5)).to_html()
    assert html.count("<svg") == 3
    assert "dpsgd: worst case over the attacks, by share of liars" in html
    assert ">refused<" in html
    assert ">sign_flip<" in html
    assert ">80.0<" in html or ">80<" in html


def test_a_heat_map_of_many_attacks_has_a_row_of_its_own(
    pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = matrix("median,krum", shares=(0.25, 0.5))
    assert '<figure class="wide">' not in found.to_html()
    monkeypatch.setattr("shoal.lab.robustness.page.BESIDE", 0)
    assert found.to_html().count('<figure class="wide">') == 2


@pytest.fixture
def pictures() -> None:
    """Pictures are drawn in this test."""


# A killed matrix.


def test_a_killed_matrix_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    home = {"SHOAL_HOME": str(tmp_path / ".shoal"), "STAGED_LOG": str(log)}
    environment = {**os.environ, **home, "STAGED_BLOCK": "12"}
    with subprocess.Popen([sys.executable, staged_matrix.__file__], env=environment) as process:
        while not log.exists() or len(log.read_text().splitlines()) < 12:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        process.kill()
    for key, value in home.items():
        monkeypatch.setenv(key, value)
    first = log.read_text().splitlines()
    with Store() as store:
        assert store.count() == 11
        found = matrix(seeds=2, store=store)
        # Of 34 runs 11 were stored; the one that was killed is run again.
        again = log.read_text().splitlines()[len(first) :]
        assert len(again) == 34 - 11
        assert first[-1] in again
        assert not set(first[:-1]) & set(again)
        log.unlink()
        assert matrix(seeds=2, store=store).entries == found.entries
    assert not log.exists()


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": "krumm"}, r"--aggregators krumm: no such aggregator; did you mean 'krum'"),
        ({"rules": "krum,krum"}, "each once"),
        ({"rules": "nnm:then"}, "need name:key=value"),
        ({"rules": "krum:trim=2"}, "krum has no such setting"),
        ({"rules": "nnm:then=nnm"}, "nnm: then=.nnm. .* twice"),
        ({"attacks": "alei"}, "--attacks alei: no such attack; did you mean 'alie'"),
        ({"shares": (1.0,)}, "--byzantine 1; need shares from 0 to below 1"),
        ({"shares": (-0.1,)}, "--byzantine -0.1; need shares"),
        ({"shares": (0.1, 0.1)}, "need different shares"),
        ({"shares": (0.01,)}, r"--byzantine 0.01: 0 of 12 peers; need 1 to 11"),
        ({"shares": (0.1, 0.12)}, "these are 1, 1 liars; need different numbers"),
        ({"shares": (0.97,)}, "12 of 12 peers; need 1 to 11"),
        ({"told": -1}, "--told -1; need 0 or more"),
        ({"below": 1.5}, "--below 1.5; need a part"),
        ({"hosts": ("gossip",)}, "gossip is a program; .*name one, such as fedavg or dpsgd"),
        ({"overrides": {"aggregator": "median"}}, "aggregator is what the matrix goes through"),
        ({"grid": {"attack.scale": (1, 2)}}, "attack.scale is what the matrix goes through"),
        ({"grid": {"lr": (1,), "learning_rate": (2,)}}, "given twice"),
        ({"overrides": {"ruonds": "3"}}, "did you mean 'rounds'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    def never(*args: Any, **settings: Any) -> Any:
        raise AssertionError("it ran")

    with pytest.raises(UsageError, match=message):
        matrix(**{"shares": (0.25,), "launcher": never, **settings})


def test_a_task_without_accuracy_is_told() -> None:
    def measuring_nothing(what: Any, scenario: Scenario, **settings: Any) -> Any:
        run = staged(what, scenario, **settings)
        run.rows = []
        return run

    with pytest.raises(UsageError, match="measures no accuracy"):
        matrix(launcher=measuring_nothing)


def test_parts_with_settings_are_read_as_their_types() -> None:
    (part,) = parts_named(["alie:z=1.5:factor=search"], "attack", "--attacks")
    assert part == Part("alie", {"z": 1.5, "factor": "search"})
    (part,) = parts_named(["sybils:samples=9:gossip=false"], "attack", "--attacks")
    assert part == Part("sybils", {"samples": 9, "gossip": "false"})
