"""Peers that find each other by addresses alone: late ones, killed ones, strangers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.base.errors import SimulationError, UsageError
from shoal.engine.live.join import join_live
from shoal.engine.live.joining import Joining, Status
from shoal.engine.live.settings import LiveSettings
from shoal.wire import codec
from shoal.wire.identity import Identity
from shoal.wire.message import message
from shoal.world.faults import Join
from shoal.world.network import Network
from shoal.world.record import Run

pytestmark = pytest.mark.live
ROUND_S = 0.25


@message(tag=("round",))
class Beat:
    round: int


@dataclass(frozen=True)
class Beats:
    """Rounds with absolute deadlines; counts what it heard, and commits each round."""

    rounds: int = 6
    round_s: float = ROUND_S

    async def run(self, peer) -> None:
        stored = peer.store.get("round")
        done = -1 if stored is None else int.from_bytes(stored, "little")
        first = max(done + 1, int(peer.now() / self.round_s))
        peer.record("first", first)
        peer.record("stored", done)
        for round in range(first, self.rounds):
            peer.enter_round(round)
            for other in peer.neighbors:
                await peer.send(other, Beat(round))
            end_s = (round + 1) * self.round_s
            heard = await peer.gather(Beat, tag=(round,), expect=peer.neighbors, deadline=end_s)
            peer.record("heard", len(heard))
            await peer.store.commit({"round": round.to_bytes(8, "little")})
            await peer.sleep_until(end_s)


class Here:
    """Peers in threads of this process."""

    def __init__(self, network: Network, program: object, **more: object) -> None:
        self.network, self.program, self.more = network, program, more
        self.runs: dict[int, Run] = {}
        self.errors: dict[int, BaseException] = {}
        self.last: dict[int, Status] = {}
        self.threads: list[threading.Thread] = []
        self.stop = threading.Event()

    def start(self, joining: Joining, settings: LiveSettings | None = None) -> int:
        number = len(self.threads)

        def go() -> None:
            try:
                self.runs[number] = join_live(
                    self.program, self.network, joining, settings=settings,
                    tell=lambda status, _: self.last.__setitem__(number, status),
                    stop=self.stop, **self.more,
                )  # fmt: skip
            except BaseException as error:
                self.errors[number] = error

        self.threads.append(threading.Thread(target=go))
        self.threads[-1].start()
        return number

    def founder(self, **more: object) -> tuple[str, int]:
        self.start(Joining(**more))
        return self.address(0)

    def address(self, number: int) -> tuple[str, int]:
        limit = time.monotonic() + 20
        while number not in self.last or self.last[number].state == "looking":
            assert time.monotonic() < limit
            time.sleep(0.02)
        return self.last[number].address

    def await_round(self, number: int, round: int) -> None:
        limit = time.monotonic() + 20
        while self.last[number].round < round:
            assert time.monotonic() < limit
            time.sleep(0.02)

    def end(self) -> None:
        for thread in self.threads:
            thread.join(30.0)
            assert not thread.is_alive()


def heard(run: Run) -> list[float]:
    return [row.value for row in run.series("heard")]


def test_peers_find_each_other_through_one_address() -> None:
    here = Here(Network(4), Beats())
    where = here.founder()
    for _ in range(3):
        here.start(Joining(bootstrap=(where,)))
    here.end()
    assert not here.errors
    assert sorted(status.peer for status in here.last.values()) == [0, 1, 2, 3]
    for run in here.runs.values():
        assert run.finished
        assert heard(run) == [3.0] * 6


def test_a_late_peer_takes_the_schedule_where_it_is() -> None:
    network = Network(3, faults=(Join(who=(2,), at=0.1),))
    here = Here(network, Beats(rounds=16))
    where = here.founder()
    here.start(Joining(bootstrap=(where,)))
    here.await_round(0, 2)
    here.start(Joining(bootstrap=(here.address(1),), peer=2))
    here.end()
    assert not here.errors
    (first,) = [row.value for row in here.runs[2].series("first")]
    assert 2 <= first < 16
    assert heard(here.runs[2])[-1] == 2.0
    assert heard(here.runs[0])[0] == 1.0
    assert heard(here.runs[0])[-1] == 2.0


def test_strangers_and_other_programs_are_turned_away_with_the_reason() -> None:
    known, stranger = Identity.from_seed(bytes(32)), Identity.from_seed(bytes([1]) * 32)
    allow = frozenset({known.name})
    here = Here(Network(2), Beats())
    where = here.founder(allow=allow, identity=known)
    for joining, why in (
        (Joining(bootstrap=(where,), identity=stranger), "this key is not allowed"),
        (Joining(bootstrap=(where,), identity=known, program=b"x" * 16), "another scenario"),
        (Joining(bootstrap=(where,), identity=known, peer=7), "peer=7; need 0 to 1"),
    ):
        with pytest.raises(UsageError, match=why):
            join_live(Beats(), Network(2), joining)
    with pytest.raises(UsageError, match="own key"):
        Joining(identity=stranger, allow=allow)
    # Neither noise nor a huge claim nor silence disturbs the desk.
    claim = b"ShBk" + codec.PREFIX.pack(b"Sh", codec.VERSION, 0, 1, 0, 0, 1 << 30, 1 << 40)
    for data in (b"ShBk" + bytes(32), b"ShBk" + b"\xff" * 64, b"S", b"GET / HTTP\r\n", claim):
        with socket.create_connection(where) as connection:
            connection.sendall(data)
    with pytest.raises(SimulationError, match="did not start in 1 s: 1 of 2"):
        join_live(Beats(), Network(2), Joining(), settings=LiveSettings(start_s=1.0))
    with pytest.raises(UsageError, match="cannot listen on"):
        join_live(Beats(), Network(2), Joining(listen=where))
    here.stop.set()
    here.end()
    assert not here.errors


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from test_live_join import Beats, Identity, Joining, LiveSettings, Network, join_live
number, store, port, *others = sys.argv[1:]
run = join_live(
    Beats(rounds=48), Network(4),
    Joining(listen=("127.0.0.1", int(port)), peer=int(number), gone_s=1.5,
            bootstrap=tuple(("127.0.0.1", int(other)) for other in others),
            identity=Identity.load_or_new(store + "/key")),
    settings=LiveSettings(store_dir=store, start_s=25.0),
    tell=lambda status, _: print(status.state, status.round, flush=True),
)
print("END", run.finished, [row.value for row in run.series("stored")],
      [row.value for row in run.series("heard")][-1:], flush=True)
"""


class Processes:
    """Four peers in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.children: dict[int, subprocess.Popen[str]] = {}
        self.output: dict[int, Path] = {}

    def start(self, number: int, bootstrap: bool = True) -> None:
        text = PROCESS.format(tests=str(Path(__file__).parent))
        port = self.port if not bootstrap else 0
        store = self.folder / f"store-{number}"
        store.mkdir(exist_ok=True)
        others = [str(self.port)] if bootstrap else []
        self.output[number] = self.folder / f"out-{number}-{len(self.output)}-{time.time_ns()}"
        with self.output[number].open("w") as out:
            self.children[number] = subprocess.Popen(
                [sys.executable, "-c", text, str(number), str(store), str(port), *others],
                stdout=out, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def text(self, number: int) -> str:
        return self.output[number].read_text()

    def await_round(self, number: int, round: int) -> None:
        limit = time.monotonic() + 45
        while not any(f"running {r}\n" in self.text(number) for r in range(round, 48)):
            assert time.monotonic() < limit, self.text(number)
            time.sleep(0.05)

    def kill(self, number: int) -> None:
        self.children[number].send_signal(signal.SIGKILL)
        self.children[number].wait(10)

    def end(self) -> None:
        try:
            for child in self.children.values():
                child.wait(45)
        finally:
            for child in self.children.values():
                child.kill()
                child.wait()


@pytest.mark.slow
def test_two_are_killed_and_one_comes_back_from_its_store(tmp_path: Path) -> None:
    """The founder is one of the killed; the other comes back through what its store knows."""
    peers = Processes(tmp_path)
    for number in range(4):
        peers.start(number, bootstrap=number > 0)
    peers.await_round(1, 2)
    peers.kill(0)
    peers.kill(3)
    peers.start(3)  # The only address that it is given is dead by now.
    peers.end()
    for number in (1, 2, 3):
        text = peers.text(number)
        assert peers.children[number].returncode == 0, text
        assert "END True" in text, text
    stored = float(peers.text(3).split("END True [")[1].split("]")[0])
    assert stored >= 1.0
    assert "[2.0]" in peers.text(1), "the last round heard both, the one that came back included"
