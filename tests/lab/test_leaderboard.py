"""The leaderboard: budgets, places, what does not run, files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.base.errors import UsageError
from shoal.lab.discover import load
from shoal.lab.leaderboard import BASE, METHODS, WORLDS, Board, Place, _at, make_board
from shoal.lab.report_data import CellResult
from shoal.lab.store import Store

SMALL = {"peers": 5, "rounds": 4, "topology.degree": 2, "task.train_samples": 100}


def cell(values: list[float], sent: list[float], times: list[float]) -> CellResult:
    return CellResult(
        "a", 0, None, totals={"bytes_sent": sent[-1], "virtual_s": times[-1]},
        curves={
            "accuracy": [(t, i, v) for i, (t, v) in enumerate(zip(times, values, strict=True))],
            "bytes_sent": [(t, i, b) for i, (t, b) in enumerate(zip(times, sent, strict=True))],
        },
    )  # fmt: skip


def test_what_counts_is_the_last_value_within_the_budget() -> None:
    run = cell([0.1, 0.5, 0.9], [100.0, 200.0, 300.0], [1.0, 2.0, 3.0])
    assert _at(run, 200.0, "bytes") == (0.5, False)
    assert _at(run, 299.0, "bytes") == (0.5, False)
    assert _at(run, 2.5, "time") == (0.5, False)
    assert _at(run, 1000.0, "bytes") == (0.9, True)
    value, early = _at(run, 50.0, "bytes")
    assert math.isnan(value)
    assert not early


def test_methods_are_ranked_by_their_mean_over_the_worlds() -> None:
    board = Board(("a", "b"), ("x", "y"), (0,), {})
    for method, values in (("a", (0.5, 0.6)), ("b", (0.7, 0.8))):
        for world, value in zip("xy", values, strict=True):
            board.at_bytes[method, world] = Place(value, None)
    rows = board.tables()[0][3]
    assert [row[0] for row in rows] == ["b", "a"]
    assert rows[0][-1] == "75.0"


def test_a_board_is_made_of_stored_runs_and_says_what_does_not_run(tmp_path: Path) -> None:
    # FedAMD asks ten of the clients, and here are five.
    chosen, worlds = ("fedavg", "dpsgd", "fedamd"), ("equal shares", "ring")
    with Store(tmp_path) as store:
        board = make_board(chosen, worlds, seeds=2, changes=SMALL, tuned=False, store=store)
        stored = store.count()
        again = make_board(chosen, worlds, seeds=2, changes=SMALL, tuned=False, store=store)
        assert store.count() == stored
    assert "sample=10" in board.errors["fedamd", "ring"]
    with pytest.raises(UsageError, match=r"fedamd, which sets .*name another method first"):
        make_board(("fedamd",), worlds, changes=SMALL, tuned=False)
    assert again.at_bytes == board.at_bytes
    assert 0.0 < board.at_bytes["fedavg", "ring"].value <= 1.0
    page = board.save(tmp_path / "out")
    text = page.read_text()
    assert "At equal bytes" in text
    assert "Dirichlet" not in text
    data = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert data["bytes_budget"].keys() == {"equal shares", "ring"}
    assert "| fedavg |" in board.markdown()


def test_rates_are_chosen_on_another_seed(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        board = make_board(("dpsgd",), ("ring",), seeds=1, changes=SMALL, store=store)
    assert board.rates["dpsgd"] in (0.0333, 0.1, 0.3, 1.0)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no world 'rings'.*ring"):
        make_board(("fedavg",), ("rings",))
    with pytest.raises(UsageError, match="no system 'fedvag'"):
        make_board(("fedvag",), ("ring",))
    with pytest.raises(UsageError, match="each once"):
        make_board(("fedavg", "fedavg"), ("ring",))


def test_every_usual_method_and_world_exists() -> None:
    for method in METHODS:
        assert load(method).kind in ("strategy", "program")
    for changes in WORLDS.values():
        BASE.with_settings(changes)


def test_the_command_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.cli.app import app

    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    done = CliRunner().invoke(
        app,
        ["leaderboard", "dpsgd", "--world", "ring", "--seeds", "1", "--no-tune", "-j", "1", "-q",
         *(f"--set={key}={value}" for key, value in SMALL.items())],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "reports" / "leaderboard.html").exists()
    assert "At equal virtual time" in done.output
