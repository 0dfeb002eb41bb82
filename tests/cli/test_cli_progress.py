"""Progress where stderr is no terminal: plain lines, none of them on stdout, none when quiet."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.base.errors import UsageError
from shoal.cli import progress as module
from shoal.cli.progress import Lines, of_ticks, progress
from shoal.lab.experiment import Tick


class Watch:
    """A stopwatch that shows what it is told to."""

    wall_s = 0.0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(module, "Stopwatch", lambda: made)
    return made


def test_a_line_says_what_is_done_in_hand_and_left(watch: Watch) -> None:
    lines = Lines("runs")
    assert lines.line() == "starting"
    tick = of_ticks(lines.tell)
    assert tick is not None
    for done in (1, 2, 3, 4):
        tick(Tick(done, 40, "dpsgd, seed 0", note="stored", reused=True))
    watch.wall_s = 20.0
    tick(Tick(12, 40, "dpsgd, seed 3", 0.5, "round 20 of 40"))
    # 8.5 runs took 20 s; the four that were stored took none.
    assert lines.line() == "12 of 40 runs, dpsgd, seed 3, round 20 of 40, about 60 s left"
    tick(Tick(13, 40, "dpsgd, seed 3", 0.25, "and 9 more seeds, round 1 of 4"))
    assert lines.line().startswith("13 of 40 runs, dpsgd, seed 3 and 9 more seeds, round 1 of 4, ")
    # How much of a run without a horizon in seconds is over cannot be told.
    tick(Tick(20, 40, "gossip, seed 1", note="3.0 s virtual, 80 events"))
    assert "gossip, seed 1, 3.0 s virtual, 80 events" in lines.line()
    tick(Tick(40, 40, "dpsgd, seed 9", note="done"))
    assert lines.line() == "40 of 40 runs"


def test_the_interval_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("never", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("SHOAL_PROGRESS_S", text)
        with (
            pytest.raises(UsageError, match="SHOAL_PROGRESS_S"),
            progress("runs", quiet=False, json=True),
        ):
            pass
        with progress("runs", quiet=True, json=True) as tell:
            assert tell is None


def shoal(folder: Path, *words: str) -> tuple[str, list[str]]:
    """stdout, and the lines on stderr of a command that runs with its output in pipes."""
    environment = {**os.environ, "SHOAL_HOME": str(folder / ".shoal"), "SHOAL_PROGRESS_S": "0.05"}
    found = subprocess.run(
        [sys.executable, "-m", "shoal", *words], env=environment, capture_output=True, text=True,
        check=False, timeout=50,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout, found.stderr.splitlines()


RUN = ("run", "dpsgd", "--peers", "8", "--seeds", "2", "--set", "rounds=3", "--engine", "event")


def test_a_run_in_pipes_says_how_far_it_is(tmp_path: Path) -> None:
    out, lines = shoal(tmp_path, *RUN, "--json")
    assert all(isinstance(json.loads(line), dict) for line in out.splitlines())
    assert lines
    form = re.compile(
        r"starting|[012] of 2 runs(, dpsgd, seed [01], .*)?(, about \d+ (s|min) left)?"
    )
    assert [line for line in lines if not form.fullmatch(line)] == []
    again, quiet = shoal(tmp_path, *RUN, "--json", "--quiet")
    assert quiet == []
    assert again == out


def test_exploring_in_pipes_says_how_far_it_is(tmp_path: Path) -> None:
    words = ("explore", "dpsgd", "--seeds", "8", "--set", "rounds=2")
    out, lines = shoal(tmp_path, *words, "--json")
    assert len(out.splitlines()) == 1
    assert any(re.fullmatch(r"[1-8] of 8 fault lists(, about \d+ s left)?", line) for line in lines)
