"""Choosing settings: the criterion decides, on the seeds that are named."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal.base.errors import UsageError
from shoal.lab import discover, tuning
from shoal.lab.card import Arm
from shoal.lab.store import Store
from shoal.lab.tuning import Tried, Tuning, table

SMALL = {
    "peers": 3, "rounds": 4, "eval_every": 4, "links": None, "device": None,
    "task": {"name": "digits", "hidden": [], "train_samples": 60},
    "topology": {"name": "full"}, "exchange": {"name": "gossip"},
}  # fmt: skip


def candidates(*rates: float) -> dict[str, dict[str, Arm]]:
    return {str(rate): {"calm": Arm(system="dpsgd", set={"lr": rate})} for rate in rates}


def test_the_best_comes_first_and_stored_runs_are_not_made_again(tmp_path: Path) -> None:
    search = Tuning({"gossip": candidates(0.0, 0.5)}, seeds=(100, 101), scenario=SMALL)
    notes: list[str] = []
    with Store(tmp_path) as store:
        found = search.run("dpsgd", store)
        again = search.run("dpsgd", store, progress=lambda tick: notes.append(tick.note))
    assert [tried.name for tried in found["gossip"]] == ["0.5", "0.0"]
    assert found == again
    assert notes == ["stored"] * 4
    worst = Tuning(
        search.candidates, (100, 101), criterion=lambda values: -values["calm"], scenario=SMALL
    )
    assert [tried.name for tried in worst.run("dpsgd")["gossip"]] == ["0.0", "0.5"]


def test_of_equals_the_one_named_first_and_what_has_no_score_last() -> None:
    tries = [Tried("none", {}, math.nan), Tried("b", {}, 0.5), Tried("a", {}, 0.5 + 1e-8)]
    assert [tried.name for tried in sorted(tries, key=Tried.rank)] == ["b", "a", "none"]


def test_the_table_has_a_column_for_each_kind_of_run() -> None:
    tries = {"mean": [Tried("0.1", {"calm": 0.9, "noisy": 0.5}, 0.7)], "one": [Tried("1", {}, 0.1)]}
    assert table(tries).splitlines() == [
        "| rule | candidate | score | calm | noisy |",
        "| --- | --- | --- | --- | --- |",
        "| mean | 0.1 | 0.7000 | 0.9000 | 0.5000 |",
        "| one | 1 | 0.1000 |  |  |",
    ]


def test_a_system_without_a_search_is_refused() -> None:
    with pytest.raises(UsageError, match="dpsgd: its module has no TUNING"):
        tuning.main(["dpsgd"])


def test_the_command_prints_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = Tuning({"gossip": candidates(0.0, 0.5)}, seeds=(100,), scenario=SMALL)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.setattr(discover, "module_of", lambda card: SimpleNamespace(TUNING=search))
    assert tuning.main(["dpsgd"]) == 0
    printed = capsys.readouterr()
    assert [line.split(" | ")[1] for line in printed.out.splitlines()[2:]] == ["0.5", "0.0"]
    assert printed.err.endswith("2 of 2 runs\n")


def searches() -> dict[str, Tuning]:
    """Every search in the catalogue, by system."""
    texts = {card.name: Path(card.file).read_text(encoding="utf-8") for card in discover.cards()}
    names = [name for name, text in texts.items() if "\nTUNING" in text]
    return {name: discover.module_of(discover.find(name)).TUNING for name in names}


@pytest.mark.parametrize(("name", "search"), searches().items())
def test_no_claim_uses_the_seeds_of_a_search(name: str, search: Tuning) -> None:
    card = discover.load(name)
    for budget in (card.small, card.full):
        assert not set(search.seeds) & set(range(budget.seeds))


@pytest.mark.parametrize(("name", "search"), searches().items())
def test_all_that_a_card_compares_is_among_the_candidates(name: str, search: Tuning) -> None:
    arms = list(discover.load(name).all_arms().values())
    for rule, tried in search.candidates.items():
        chosen = {
            candidate for candidate, kinds in tried.items()
            if any(arm in arms for arm in kinds.values())
        }  # fmt: skip
        assert len(chosen) == 1, f"{rule}: the card runs {sorted(chosen)} of {sorted(tried)}"
