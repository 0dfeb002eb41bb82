"""`shoal explore` on real systems: what it prints, stores and runs again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
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


def test_processes_find_the_same_in_the_same_order(folder: Path) -> None:
    found = []
    for jobs in ("1", "2"):
        code, text = call("broken", "--seeds", "9", "--jobs", jobs, "--json", "--quiet")
        assert code == 1, text
        found.append((text, (folder / ".shoal" / "explore" / "broken.json").read_bytes()))
    assert found[0] == found[1]
    *failures, last = map(json.loads, found[0][0].splitlines())
    seeds = [each["failure"]["seed"] for each in failures]
    assert 3 <= len(seeds) < 9
    assert seeds == sorted(seeds)
    assert (last["seeds"], last["traces"]) == (9, 9)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are read from /proc")
def test_ctrl_c_leaves_no_process(folder: Path) -> None:
    command = [sys.executable, "-m", "shoal", "explore", "dpsgd", "--set", "rounds=2",
               "--seeds", "1000", "--jobs", "2"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 40
    while len(started := children.read_text().split()) < 3:  # two workers, a resource tracker
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended too early: {process.wait(0.05)}")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped" in said
    assert "Traceback" not in said
    while any(map(_alive, started)):
        assert time.monotonic() < deadline, "a worker outlives the command"
        os.sched_yield()


def _alive(pid: str) -> bool:
    """A zombie, which waits for a parent that asks for it, is dead."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


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
