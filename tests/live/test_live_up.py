"""`shoal up` with real processes: killed ones, restarted ones, Ctrl-C, peers from elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from up_processes import Upped, alive, environment

pytestmark = [pytest.mark.live, pytest.mark.timeout(150)]


def test_a_killed_peer_comes_back_from_its_store_until_its_restarts_are_used_up(
    tmp_path: Path,
) -> None:
    up = Upped(tmp_path, "3", "beats", "--set", "beats=60", "--restart", "--restarts", "1",
               "--gone-s", "2")  # fmt: skip
    try:
        up.wait_for_round(2)
        up.kill(2)
        up.happened("restarted", 2)
        up.wait_for(lambda event: event.get("rejoined") == 1)
        mark = len(up.events)
        up.kill(2)
        up.happened("died", 2, mark)
        code = up.end()
    finally:
        up.close()
    assert code == 1
    end = up.last("finished")
    assert (end["finished"], end["lost"], end["restarts"]) == (False, [2], {"2": 1})
    log = (up.run_folder() / "peer-2.log").read_text()
    assert log.count("killed by signal 9") == 2
    assert "rejoined from its store" in log
    # The report has what the dead one had told, and when it died.
    cell = up.report()
    assert [what for _, what, peers in cell["happenings"] if peers == [2]] == [
        "killed by SIGKILL", "restarted", "killed by SIGKILL",
    ]  # fmt: skip
    assert cell["peer_bytes"][2] > 0
    stored = [value for _, _, value in cell["curves"]["stored"]]
    assert max(stored) >= 0, "the second life began where the first had committed"
    assert not up.half_written()


@pytest.mark.slow
def test_a_peer_that_came_back_hears_the_others_and_is_heard(tmp_path: Path) -> None:
    up = Upped(tmp_path, "3", "beats", "--set", "beats=60", "--restart")
    try:
        # Late enough for the store to hold all that there is to know of the others.
        up.wait_for_round(12)
        up.kill(1)
        code = up.end()
    finally:
        up.close()
    assert code == 0, up.told()
    log = (up.run_folder() / "peer-1.log").read_text()
    assert "running" in log.partition("rejoined")[0]
    assert "knows 0 other" not in log.partition("killed by signal 9")[2], log
    cell = up.report()
    assert cell["finals"]["heard"] == [2.0, 2.0, 2.0]
    assert max(value for _, _, value in cell["curves"]["stored"]) >= 0


def test_the_others_end_the_run_without_a_peer_that_died(tmp_path: Path) -> None:
    up = Upped(tmp_path, "3", "beats", "--set", "beats=16", "--gone-s", "2")
    try:
        up.wait_for_round(3)
        up.kill(0)  # The one that founded the run.
        code = up.end()
    finally:
        up.close()
    assert code == 1
    assert up.last("lost")["lost"] == [0]
    heard = up.report()["finals"]["heard"]
    assert 1.0 in heard


def test_ctrl_c_ends_all_properly_and_reports(tmp_path: Path) -> None:
    up = Upped(tmp_path, "3", "beats", "--set", "beats=400")
    try:
        up.wait_for_round(3)
        up.interrupt()
        code = up.end()
    finally:
        up.close()
    assert code == 130
    assert not up.half_written()
    assert [event["peer"] for event in up.events if event.get("event") == "died"] == []
    assert sorted(e["peer"] for e in up.events if e.get("event") == "ended") == [0, 1, 2]
    for peer in range(3):
        assert "stopping" in (up.run_folder() / f"peer-{peer}.log").read_text()
    assert up.report()["finished"] is False
    # All stores are whole: another process can read them.
    assert (up.run_folder() / "peer-1" / "peer-1.store").exists()


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    up = Upped(tmp_path, "3", "beats", "--set", "beats=400")
    try:
        up.wait_for_round(1)
        pids = list(up.every_pid)
        assert len(pids) == 3
        up.process.kill()
        limit = time.monotonic() + 60
        while any(map(alive, pids)):
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        up.close()


def test_a_death_before_the_start_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    up = Upped(tmp_path, "3", "beats")
    try:
        up.happened("started", 2)
        up.kill(1)
        code = up.end()
    finally:
        up.close()
    assert code == 1
    assert "peer 1 died before the run began: killed by SIGKILL (see " in up.stderr()


def test_a_founder_that_dies_before_the_start_finds_its_run_again(tmp_path: Path) -> None:
    # A fourth peer is awaited, so that the run cannot begin too early.
    up = Upped(tmp_path, "3", "beats", "--peers", "4", "--wait", "4", "--restart")
    try:
        up.wait_for(lambda event: event.get("states", {}).get("waiting") == 3)
        up.kill(0)
        up.happened("restarted", 0)
        last = _joiner(up, "beats", "--peers", "4")
        code = up.end()
        output, _ = last.communicate(timeout=60)
    finally:
        up.close()
    assert (code, last.returncode) == (0, 0), (output, up.told())
    # Nobody is missing from the last round.
    assert up.report()["finals"]["heard"] == [3.0, 3.0, 3.0]


def _joiner(up: Upped, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shoal", "peer", *words, "--bootstrap", up.events[0]["bootstrap"]],
        cwd=up.folder, env=environment(up.folder), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("by_file", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_peer_from_elsewhere_joins_a_run_under_way(tmp_path: Path, by_file: bool) -> None:
    settings = ("--set", "beats=80")
    up = Upped(tmp_path, "2", "beats", "--peers", "3", *settings, "--gone-s", "3")
    try:
        up.wait_for_round(2)
        file = str(up.run_folder() / "run.json")
        words = (file,) if by_file else ("beats", "--peers", "3", *settings)
        late = _joiner(up, *words)
        output, _ = late.communicate(timeout=60)
        code = up.end()
    finally:
        up.close()
    assert (late.returncode, code) == (0, 0), (output, up.told())
    assert "peer 2: running" in output
    assert "heard: 2" in output
    # The two heard the third at the end, and not at the beginning.
    assert up.report()["finals"]["heard"] == [2.0, 2.0]
    assert up.report()["curves"]["heard"][0][2] == 1.0


def test_strangers_are_kept_out_where_there_is_no_room(tmp_path: Path) -> None:
    up = Upped(tmp_path, "2", "beats", "--peers", "2", "--set", "beats=400")
    try:
        up.wait_for_round(1)
        stranger = _joiner(up, "beats", "--peers", "2", "--set", "beats=400")
        output, _ = stranger.communicate(timeout=60)
        up.interrupt()
        up.end()
    finally:
        up.close()
    assert stranger.returncode == 2
    assert "this key is not allowed here" in output


def test_a_fault_of_the_program_is_named(tmp_path: Path) -> None:
    up = Upped(tmp_path, "2", "beats", "--peers", "2", "--set", "fails_at=2", "--gone-s", "1")
    try:
        code = up.end()
    finally:
        up.close()
    assert code == 1
    failed = next(event for event in up.events if event.get("event") == "failed")
    assert failed["peer"] == 1
    assert "ValueError: a fault of the program" in failed["text"]
    assert up.last("lost")["lost"] == [1]


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    up = Upped(tmp_path, "2", "beats", "--peers", "2", "--set", "beats=400")
    try:
        up.wait_for_round(1)
        os.kill(up.pids[1], signal.SIGSTOP)  # One that cannot end by itself.
        up.interrupt()
        up.wait_for(lambda event: event.get("event") == "stopping")
        up.interrupt()
        code = up.end()
    finally:
        up.close()
    assert code == 130
