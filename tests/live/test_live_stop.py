"""However a run is stopped, its processes end, and what cannot work says so clearly."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from kill_peer import Block, Count
from test_live_join import Beats, Here, heard
from test_live_kernel import By, values

from shoal.base.errors import SimulationError, UsageError
from shoal.engine.live import LiveSettings, circle, driver, join, launch, run_live
from shoal.engine.live.join import join_live
from shoal.engine.live.joining import Joining
from shoal.wire.identity import Identity
from shoal.world.faults import Join
from shoal.world.network import Network

pytestmark = pytest.mark.live
SCRIPT = str(Path(__file__).with_name("stop_main.py"))
ENDS_S = 20.0
"""Longer than any process may take to end here, on a busy machine."""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def await_end(pids: list[int]) -> None:
    end = time.monotonic() + ENDS_S
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"{[pid for pid in pids if alive(pid)]} live on"
        time.sleep(0.02)


class Launched:
    """The script in a session of its own, as in a terminal, with all of its peers running."""

    def __init__(self, processes: int = 2, stop_s: float = 5.0, *more: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, SCRIPT, str(processes), str(stop_s), *more], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.child.stdout is not None
        lines = [self.child.stdout.readline() for _ in range(processes)]
        self.peers = [int(line.split()[1]) for line in lines]
        assert len(set(self.peers)) == processes

    def signal(self, number: int) -> None:
        """As a terminal does it: to the whole group."""
        os.killpg(self.child.pid, number)

    def end(self) -> str:
        """What it said; the launcher and all peers are gone."""
        try:
            output, errors = self.child.communicate(timeout=ENDS_S)
            await_end(self.peers)
        finally:
            for pid in (self.child.pid, *self.peers):
                if alive(pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        return output + errors


def test_ctrl_c_stops_the_peers_and_is_raised() -> None:
    run = Launched()
    run.signal(signal.SIGINT)
    said = run.end()
    assert run.child.returncode == 130
    assert said.startswith("stopped")
    assert "Traceback" not in said


def test_an_impatient_second_ctrl_c_leaves_nothing_behind() -> None:
    run = Launched(2, 4.0, "busy")
    begin = time.monotonic()
    run.signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.child.poll() is None, "it waits for programs that hold their loops"
    run.signal(signal.SIGINT)
    run.end()
    assert run.child.returncode == 130
    # The launcher waits no longer; the children see that it is gone.
    assert time.monotonic() - begin < ENDS_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("busy", [False, True])
def test_peers_end_with_the_process_that_launched_them(number: int, busy: bool) -> None:
    run = Launched(2, 1.0, *(["busy"] if busy else []))
    os.kill(run.child.pid, number)
    run.child.wait(ENDS_S)
    assert run.child.returncode == -number
    await_end(run.peers)
    run.end()


def test_terminating_one_peer_is_a_death_and_the_others_go_on() -> None:
    run = Launched(3)
    os.kill(run.peers[1], signal.SIGTERM)
    await_end(run.peers[1:2])
    assert alive(run.peers[0])
    assert alive(run.peers[2])
    run.signal(signal.SIGINT)
    run.end()


PEER = (
    "-m", "shoal", "peer", "gossip", "--peers", "2", "--set", "rounds=1000", "--set",
    "round_s=0.5", "--start-s", "60", "--set", "topology=full", "--set", "task.hidden=[8]",
)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shoal_peer_says_goodbye(tmp_path: Path, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, *PEER, "--store", str(tmp_path / "a")], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        said = ""
        while "waiting" not in said:
            line = child.stdout.readline()
            assert line, said
            said += line
        child.send_signal(number)
        rest, _ = child.communicate(timeout=ENDS_S)
    assert "Traceback" not in said + rest
    assert child.returncode == (0 if number == signal.SIGTERM else 130), said + rest


# What cannot work.


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_at_the_commit_and_what_was_committed_stays(
    tmp_path: Path,
) -> None:
    async def fills(peer: Any) -> None:
        await peer.store.commit({"a": bytes(100)})
        with files_of_at_most(4000), pytest.raises(SimulationError, match="File too large"):
            await peer.store.commit({"a": bytes(8000)})
        peer.record("kept", len(peer.store.get("a")))
        await peer.store.commit({"a": bytes(9000)})
        peer.record("kept", len(peer.store.get("a")))

    async def unaware(peer: Any) -> None:
        with files_of_at_most(4000):
            await peer.store.commit({"a": bytes(8000)})

    settings = LiveSettings(store_dir=str(tmp_path))
    run = run_live(By((fills,)), Network(1), settings=settings)
    assert values(run, "kept") == [100.0, 9000.0]
    with pytest.raises(SimulationError, match="free space or raise the limit"):
        run_live(By((unaware,)), Network(1), settings=settings)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_store_in_an_impossible_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    async def commits(peer: Any) -> None:
        await peer.store.commit({"a": b"1"})

    with pytest.raises((SimulationError, UsageError), match="Not a directory"):
        run_live(
            By((commits,)), Network(1), settings=LiveSettings(store_dir=str(tmp_path / "file"))
        )


def test_a_port_in_use_and_an_address_of_others_are_errors() -> None:
    async def nothing(peer: Any) -> None:
        pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = taken.getsockname()[:2]
        with pytest.raises(UsageError, match=r"cannot listen on .*in use.*port 0"):
            join_live(By((nothing,)), Network(1), Joining(listen=place))
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1"):
        run_live(By((nothing,)), Network(1), settings=LiveSettings(host="192.0.2.1"))


def test_a_key_file_that_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"key file .*: Is a directory"):
        Identity.load_or_new(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"key file .*: (File exists|Not a dir)"):
        Identity.load_or_new(tmp_path / "file" / "key")
    with files_of_at_most(10), pytest.raises(UsageError, match=r"key file .*: File too large"):
        Identity.load_or_new(tmp_path / "key")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


# Clocks.


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_jump_of_the_clock_changes_no_deadline(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """The wall clock is read once, at the announced start; afterwards only the monotonic counts."""
    jumped = threading.Event()

    def time_ns() -> int:
        return time.time_ns() + int(jump_s * 1e9) * jumped.is_set()

    for module in (launch, driver):
        monkeypatch.setattr(module, "time_ns", time_ns)

    async def waits(peer: Any) -> None:
        await peer.send(1 - peer.id, Count(1))
        assert await peer.recv(Count, deadline=5.0) is not None
        jumped.set()
        before_s = time.monotonic()
        assert await peer.recv(Block, deadline=peer.now() + 0.2) is None
        peer.record("waited", time.monotonic() - before_s)

    waited = values(run_live(By((waits, waits)), Network(2)), "waited")
    assert len(waited) == 2
    assert min(waited) >= 0.2
    assert max(waited) < 5.0


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_joined_peers_agree_on_the_run_though_a_clock_jumps(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Records carry numbers from the clock, but they only grow; times of the run come from others'
    answers. So a peer that comes after the jump is in the same round as the others."""
    jumped = threading.Event()

    def time_ns() -> int:
        return time.time_ns() + int(jump_s * 1e9) * jumped.is_set()

    for module in (circle, join, driver):
        monkeypatch.setattr(module, "time_ns", time_ns)
    here = Here(Network(3, faults=(Join(who=(2,), at=0.1),)), Beats(rounds=20))
    where = here.founder()
    here.start(Joining(bootstrap=(where,)))
    here.await_round(0, 2)
    jumped.set()
    here.start(Joining(bootstrap=(here.address(1),), peer=2))
    here.end()
    assert not here.errors
    assert all(run.finished for run in here.runs.values())
    (first,) = [row.value for row in here.runs[2].series("first")]
    assert 2 <= first < 20
    assert heard(here.runs[2])[-1] == 2.0
    assert heard(here.runs[0])[-1] == 2.0
