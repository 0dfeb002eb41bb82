"""Random kill schedules over real processes with stores on disk (`kill_peer.py`).

Whatever is killed, whenever, and restarted or not: nothing hangs, every survivor ends, what was
committed is there after a restart, counters never go back, and no request counts twice.
"""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from kill_peer import PEERS, RUN_S, START_WITH, Books

from shoal.engine.live.store import DiskStore

pytestmark = pytest.mark.live
HERE = str(Path(__file__).parent)
SCRIPT = f"import sys; sys.path.insert(0, {HERE!r}); import kill_peer; kill_peer.main()"
LIMIT_S = 60.0
"""Only a hang takes so long: a run takes `RUN_S`, and nobody waits longer than some seconds."""
MODES = ("process", "time", "commit", "commit", "block", "block")


@dataclass(frozen=True)
class Life:
    """When one life of a peer ends by `kill -9`; "never" when it does not.

    mode: "process" seconds after the process was made (imports, joining, handshakes included),
    "time" seconds after the program was read, "commit" at the n-th `fsync` (the fraction says on
    which side of it), "block" at the n-th large block (the fraction is the delay).
    """

    mode: str
    amount: float
    pause_s: float = 0.0
    """how long until the next life"""


def schedule(seed: int) -> dict[int, list[Life]]:
    """The lives of each peer: 1 to 3 of them die, some come back once or twice."""
    draws = random.Random(f"kills {seed}")
    never = Life("never", 0.0)
    lives = {peer: [never] for peer in range(PEERS)}
    for victim in draws.sample(range(PEERS), draws.choice((1, 1, 2, 2, 3))):
        found = []
        for _ in range(draws.choice((1, 1, 2))):
            mode = draws.choice(MODES)
            amount = {
                "process": draws.uniform(0.0, 1.5),
                "time": draws.uniform(0.0, RUN_S),
                "commit": draws.randint(1, 90) + draws.random(),
                "block": draws.randint(1, 4) + draws.random(),
            }[mode]
            found.append(Life(mode, amount, draws.uniform(0.0, 0.5)))
        if draws.random() < 0.7:
            found.append(never)
        lives[victim] = found
    return lives


class Trial:
    """One schedule, carried out."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder / f"seed-{seed}"
        self.folder.mkdir()
        self.seed = seed
        self.lives = schedule(seed)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.hung: list[int] = []

    def run(self) -> float:
        begin = time.monotonic()
        with ThreadPoolExecutor(PEERS) as pool:
            list(pool.map(self._live, range(PEERS), timeout=LIMIT_S + 20))
        return time.monotonic() - begin

    def _live(self, peer: int) -> None:
        end = time.monotonic() + LIMIT_S
        for life in self.lives[peer]:
            words = ["-c", SCRIPT, str(peer), str(self.port), str(self.folder)]
            with (self.folder / f"output-{peer}").open("ab") as output:
                child = subprocess.Popen(
                    [sys.executable, *words, life.mode, str(life.amount)],
                    stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
            try:
                if life.mode == "process":
                    try:
                        child.wait(life.amount)
                    except subprocess.TimeoutExpired:
                        child.send_signal(signal.SIGKILL)
                self.codes[peer] = child.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.hung.append(peer)
            finally:
                child.kill()
                child.wait()
            if self.codes.get(peer) != -signal.SIGKILL:
                return
            time.sleep(life.pause_s)

    def said(self, peer: int) -> list[list[str]]:
        path = self.folder / f"journal-{peer}"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def check(self) -> None:
        assert not self.hung, f"peers {self.hung} hang"
        books = {peer: self._check_books(peer) for peer in range(PEERS)}
        for peer in range(PEERS):
            self._check_end(peer)
        for source in range(PEERS):
            for peer in set(range(PEERS)) - {source}:
                promised = books[source].acknowledged.get(peer, 0)
                assert promised <= books[peer].applied.get(source, 0) <= promised + 1

    def _check_end(self, peer: int) -> None:
        text = (self.folder / f"output-{peer}").read_text()
        code = self.codes[peer]
        assert not text, text
        if code == -signal.SIGKILL:
            return
        last = self.said(peer)[-1]
        if code == 3:
            # Without a founder, or with too few, there is no start; and who was never in the run
            # cannot find it when it is over. Whoever waits for either says so.
            error = " ".join(last)
            assert "did not start" in error or "none of" in error, error
            assert ["state", "running"] not in self.said(peer), error
            mortal = [p for p in range(PEERS) if self.lives[p][0].mode != "never"]
            assert {0, peer} & set(mortal) or PEERS - len(mortal) < START_WITH, error
            return
        assert code == 0, code
        assert last == ["end", "True"], last

    def _check_books(self, peer: int) -> Books:
        """Replay a peer's journal beside what its store holds in the end."""
        path = self.folder / f"store-{peer}"
        stored = DiskStore(str(path), peer).load()
        assert stored.get("books") == stored.get("copy")
        books = stored.get("books") or Books({}, {}, 0, 0)
        assert books.total == sum(books.applied.values()), "a request counted twice"
        seen: dict[str, dict[int, int]] = {
            "acknowledged": defaultdict(int),
            "applied": defaultdict(int),
        }
        life = 0
        for words in self.said(peer):
            if words[0] in seen:
                kind, other, number = words[0], int(words[1]), int(words[2])
                assert number > seen[kind][other], f"{kind} {other} {number} again"
                seen[kind][other] = number
            elif words[0] == "restored":
                other, acknowledged, applied = map(int, words[1:])
                for kind, found in (("acknowledged", acknowledged), ("applied", applied)):
                    # One more than the journal knows may have been under way.
                    assert seen[kind][other] <= found <= seen[kind][other] + 1, (kind, other, found)
                    seen[kind][other] = found
            elif words[0] == "life":
                assert int(words[1]) >= life, "the store went back"
                life = int(words[1])
            elif words[0] == "block":
                assert words[1] == "whole"
        for kind, counts in seen.items():
            for other, number in counts.items():
                assert number <= getattr(books, kind).get(other, 0) <= number + 1, (kind, other)
        return books


def _all(folder: Path, seeds: range) -> list[Trial]:
    """Carry out some schedules, four at a time, and check each."""
    trials = [Trial(folder, seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        seconds = list(pool.map(Trial.run, trials))
    for trial, took_s in zip(trials, seconds, strict=True):
        print(f"seed {trial.seed}: {took_s:.1f} s, {trial.codes}")  # noqa: T201
        try:
            trial.check()
        except AssertionError as error:
            logs = "\n".join(
                f"peer {peer}: {[' '.join(words) for words in trial.said(peer)[-8:]]}"
                for peer in range(PEERS)
            )
            raise AssertionError(f"seed {trial.seed}: {error}\n{trial.lives}\n{logs}") from error
    return trials


@pytest.mark.timeout(120)
def test_five_kill_schedules(tmp_path: Path) -> None:
    trials = _all(tmp_path, range(5))
    died = [
        peer for t in trials for peer in range(PEERS) if len(t.lives[peer]) > 1 or t.codes[peer] < 0
    ]
    counted = sum(
        words[0] == "applied" for t in trials for p in range(PEERS) for words in t.said(p)
    )
    assert len(died) >= 5
    assert counted > 10


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("first", range(5, 40, 5))
def test_kill_schedules(tmp_path: Path, first: int) -> None:
    _all(tmp_path, range(first, first + 5))
