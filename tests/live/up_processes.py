"""`shoal up` as a process, whose own processes are killed: what the tests of it share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEATS = '''
"""Peers that tell each other the round, as long as it lasts. It needs no tensors."""

from dataclasses import dataclass

from shoal.lab.card import System
from shoal.lab.scenario import Scenario
from shoal.wire.message import message


@message(tag=("round",))
class Beat:
    round: int


@dataclass(frozen=True)
class Beats:
    """Rounds with absolute deadlines; counts what it heard, and commits each round."""

    beats: int = 12
    round_s: float = 0.25
    fails_at: int = -1

    async def run(self, peer):
        stored = peer.store.get("round")
        done = -1 if stored is None else int.from_bytes(stored, "little")
        peer.record("stored", done)
        for round in range(max(done + 1, int(peer.now() / self.round_s)), self.beats):
            peer.enter_round(round)
            if round == self.fails_at and peer.id == 1:
                raise ValueError("a fault of the program")
            for other in peer.neighbors:
                await peer.send(other, Beat(round))
            end_s = (round + 1) * self.round_s
            heard = await peer.gather(Beat, tag=(round,), expect=peer.neighbors, deadline=end_s)
            peer.record("heard", len(heard))
            await peer.store.commit({"round": round.to_bytes(8, "little")})
            await peer.sleep_until(end_s)


SYSTEM = System(
    name="beats", title="Peers that tell each other the round", kind="program", make=Beats,
    scenario=Scenario(name="beats", peers=3, seconds=120.0),
)
'''


def environment(folder: Path) -> dict[str, str]:
    """A workspace of its own, and the catalogue with `beats` in it."""
    family = folder / "systems" / "beating"
    family.mkdir(parents=True, exist_ok=True)
    (family / "beats.py").write_text(BEATS)
    return {
        **os.environ, "SHOAL_HOME": str(folder / "home"), "SHOAL_SYSTEMS": str(folder / "systems"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class Upped:
    """`shoal up ... --json`: its events as they come, and the processes that it started."""

    def __init__(self, folder: Path, *words: str, patience_s: float = 90.0) -> None:
        self.folder = folder
        self.patience_s = patience_s
        self.events: list[dict[str, Any]] = []
        self.pids: dict[int, int] = {}
        self.every_pid: list[int] = []
        self._errors = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "up", *words, "--json"], cwd=folder,
            env=environment(folder), stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event.get("event") in ("started", "restarted"):
                self.pids[event["peer"]] = event["pid"]
                self.every_pid.append(event["pid"])
            self.events.append(event)

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def told(self) -> str:
        """All that is known, for a failing test."""
        logs = "\n".join(
            f"{path.name}: {path.read_text()[-600:]}"
            for path in sorted(self.folder.rglob("peer-*.log"))
        )
        return f"{self.events[-12:]}\n{self.stderr()[-1500:]}\n{logs}"

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> dict[str, Any]:
        """The first event, from number `after` on, that is wanted."""
        limit = time.monotonic() + self.patience_s
        while True:
            for event in self.events[after:]:
                if wanted(event):
                    return event
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < limit, self.told()
            time.sleep(0.03)

    def wait_for_round(self, round: int, after: int = 0) -> None:
        self.wait_for(lambda event: event.get("round", -1) >= round, after)

    def happened(self, what: str, peer: int, after: int = 0) -> dict[str, Any]:
        return self.wait_for(lambda e: e.get("event") == what and e.get("peer") == peer, after)

    def kill(self, peer: int) -> None:
        os.kill(self.pids[peer], signal.SIGKILL)

    def kill_if_alive(self, peer: int) -> None:
        if alive(self.pids[peer]):
            self.kill(peer)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Its exit code, once it and all that it started are gone."""
        try:
            code = self.process.wait(self.patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs: {self.told()}") from None
        finally:
            self.close()
        left = [pid for pid in self.every_pid if alive(pid)]
        assert not left, f"{left} live on"
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            for pid in self.every_pid:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def last(self, name: str) -> dict[str, Any]:
        """The last object with this key."""
        return next(event for event in reversed(self.events) if name in event)

    def report(self) -> dict[str, Any]:
        """The cell of the JSON report."""
        path = self.folder / self.last("report")["report"]
        return json.loads(path.with_suffix(".json").read_text())["cells"][0]

    def run_folder(self) -> Path:
        return self.folder / self.events[0]["folder"]

    def half_written(self) -> list[Path]:
        return [p for p in self.folder.rglob("*") if p.suffix in (".tmp", ".part")]
