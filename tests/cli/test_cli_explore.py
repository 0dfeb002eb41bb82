"""`shoal explore` on real systems: what it prints, stores and runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.lab.fuzz import INVARIANTS, rounds_do_not_fall
from shoal.world.record import Row, Run

BROKEN = """
from shoal.lab.card import System
from shoal.systems.baselines.dpsgd import SYSTEM as DPSGD


def nothing_gets_lost(run):
    lost = run.dropped.get("lost", 0) + run.dropped.get("dead", 0)
    return f"{lost} messages lost" if lost else None


INVARIANTS = (nothing_gets_lost,)
SYSTEM = System(
    name="broken", kind="strategy", title="Complains about losses", make=DPSGD.make,
    scenario="baselines.digits_tiny",
)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "systems" / "mine").mkdir(parents=True)
    (tmp_path / "systems" / "mine" / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("SHOAL_SYSTEMS", str(tmp_path / "systems"))
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / ".shoal"))
    return tmp_path


def call(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["explore", *words])
    return found.exit_code, found.output


def test_a_sound_system_passes(folder: Path) -> None:
    code, text = call("dpsgd", "--seeds", "6", "--peers", "6", "--set", "rounds=3", "--json")
    assert code == 0, text
    (last,) = map(json.loads, text.splitlines())
    assert (last["seeds"], last["failures"], last["file"]) == (6, 0, None)
    assert sum(last["kinds"].values()) == 21
    assert last["traces"] >= 4


def test_a_broken_invariant_is_shrunk_stored_and_replayed(folder: Path) -> None:
    code, text = call("broken", "--seeds", "12")
    assert code == 1, text
    file = folder / ".shoal" / "explore" / "broken.json"
    assert f"shoal explore broken --replay {file}" in text
    failures = json.loads(file.read_text())["failures"]
    assert failures
    assert all(len(failure["faults"]) == 1 for failure in failures)
    code, text = call("broken", "--replay", str(file), "--json")
    assert code == 1
    again = [json.loads(line) for line in text.splitlines()]
    assert [line["seed"] for line in again] == [failure["seed"] for failure in failures]
    assert all("messages lost" in line["problem"] for line in again)


def test_misuse(folder: Path) -> None:
    (folder / "torn.json").write_text("{")
    for words in (("dpsdg",), ("dpsgd", "--replay", str(folder / "torn.json"))):
        code, text = call(*words)
        assert code == 2, text
        assert "error:" in text


def test_every_invariant_can_fail() -> None:
    def complaints(run: Run) -> list[bool]:
        return [check(run) is not None for check in (*INVARIANTS, rounds_do_not_fall)]

    assert complaints(Run("event", 0, 2)) == [False] * 4
    assert complaints(Run("event", 0, 2, messages_sent=1)) == [True, False, False, False]
    assert complaints(Run("event", 0, 2, virtual_s=-1.0)) == [False, True, False, False]
    nan = Row("loss", float("nan"), 0.0, 0, 0)
    assert complaints(Run("event", 0, 2, rows=[nan])) == [False, False, True, False]
    back = [Row("loss", 1.0, 0.0, 2, 0), Row("loss", 1.0, 1.0, 1, 0)]
    assert complaints(Run("event", 0, 2, rows=back)) == [False, False, False, True]
