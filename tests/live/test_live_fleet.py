"""How a fleet of processes is kept up, with processes that do nothing but report."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from up_processes import alive

from shoal.base.errors import SimulationError
from shoal.engine.live.fleet import Event, Fleet, FleetSettings

pytestmark = pytest.mark.live

CHILD = """
import os, pickle, signal, sys
from multiprocessing.connection import Connection
from shoal.engine.live import control
from shoal.engine.live.joining import Status
from shoal.world.record import Row, Run

kind, folder = sys.argv[1:3]
pipe = Connection(int(sys.argv[sys.argv.index("--reports") + 1]), readable=False)
lives = len(os.listdir(folder))
open(f"{folder}/{lives}", "w").close()

def tell(state, round):
    status = Status(0, state, ("127.0.0.1", 1), 1, round, 1.0, 3, 2, 100, 50, lives > 0)
    rows = [Row("value", float(lives), 1.0, round, 0)]
    pipe.send_bytes(pickle.dumps(control.Told(status, rows, [])))

tell("running", lives)
if kind == "dies" and lives < 3:
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "fails":
    print("error: no way out (go back)", file=sys.stderr)
    sys.exit(1)
if kind == "torn":
    # Killed in the middle of a report.
    os.write(pipe.fileno(), (1000).to_bytes(4, "big") + b"half")
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "stays":
    sys.stdin.read()
if kind == "deaf":
    signal.pause()
whole = kind not in ("stays", "horizon")
pipe.send_bytes(pickle.dumps(control.Done(Run("live", 0, 1, finished=whole))))
sys.exit(0 if whole or kind == "stays" else 1)
"""


def fleet(folder: Path, *kinds: str, **settings: float) -> Fleet:
    commands, logs = [], []
    for number, kind in enumerate(kinds):
        lives = folder / f"lives-{number}"
        lives.mkdir()
        commands.append([sys.executable, "-c", CHILD, kind, str(lives)])
        logs.append(folder / f"{number}.log")
    return Fleet(commands, logs, FleetSettings(**settings))  # type: ignore[arg-type]


def test_a_peer_that_dies_is_started_again_until_it_lives(tmp_path: Path) -> None:
    events: list[Event] = []
    crew = fleet(tmp_path, "dies", "stays", restarts=3, backoff_s=0.05, alone_s=0.3)
    crew.run(lambda _, news: events.extend(news))
    first, second = crew.posts
    assert (first.state, first.restarts, first.rejoined) == ("ended", 3, True)
    assert first.log.read_text().count("killed by signal 9") == 3
    whats = [event.what for event in events if event.post is first]
    assert whats[:-1] == ["started"] + ["died", "restarted"] * 3
    # What each life had told is kept, also of those that were killed.
    runs = crew.runs(0, 1)
    assert [run.rows[0].value for run in runs[:3]] == [0.0, 1.0, 2.0]
    assert [run.bytes_sent for run in runs[:3]] == [[100]] * 3
    # The other one would have stayed for good: the run was over for the first.
    assert second.state == "ended"
    assert not crew.whole


def test_restarts_have_a_limit_and_half_a_report_is_none(tmp_path: Path) -> None:
    crew = fleet(tmp_path, "torn", "ends", restarts=2, backoff_s=0.02, backoff_most_s=0.02)
    crew.posts[1].command = (sys.executable, "-c", "import time; time.sleep(8)")
    crew.run()
    assert (crew.posts[0].state, crew.posts[0].restarts) == ("died", 2)
    assert crew.posts[0].why == "killed by SIGKILL"
    assert not crew.whole


def test_a_peer_at_the_horizon_has_ended_and_does_not_begin_again(tmp_path: Path) -> None:
    crew = fleet(tmp_path, "horizon", "horizon", restarts=5, backoff_s=0.02)
    crew.run()
    assert [(post.state, post.restarts) for post in crew.posts] == [("ended", 0)] * 2
    assert not crew.happenings
    assert not crew.whole


def test_the_reason_of_a_failure_is_the_last_that_its_log_says(tmp_path: Path) -> None:
    crew = fleet(tmp_path, "fails", "ends")
    crew.run()
    assert (crew.posts[0].state, crew.posts[0].why) == ("failed", "no way out (go back)")
    assert "exit code 1" in crew.posts[0].log.read_text()
    assert [h.what for h in crew.happenings if h.peers == (0,)] == ["failed"]


def test_a_command_that_cannot_run_ends_all(tmp_path: Path) -> None:
    crew = fleet(tmp_path, "stays", "stays")
    crew.posts[0].command = (sys.executable, "-c", "raise SystemExit(2)")
    crew.posts[1].command = (sys.executable, "-c", "input()")
    with pytest.raises(SimulationError, match="peer 0 failed before the run began"):
        crew.run()
    assert not any(alive(post.pid) for post in crew.posts)


@pytest.mark.parametrize("hurry", [False, True])
def test_one_that_does_not_end_when_told_to_is_killed(tmp_path: Path, hurry: bool) -> None:
    crew = fleet(tmp_path, "deaf", "stays", stop_s=60.0 if hurry else 1.0)
    stop, kill = threading.Event(), threading.Event()

    def tell(crew: Fleet, events: list[Event]) -> None:
        if all(post.state == "running" for post in crew.posts):
            stop.set()
            if hurry:
                kill.set()

    crew.run(tell, stop, kill)
    assert crew.posts[0].state == "died"
    # Told to stop, this one may have ended before it was killed.
    assert crew.posts[1].state in (("died", "ended") if hurry else ("ended",))
