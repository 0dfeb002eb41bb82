"""The commands of the page on real machines and of the README run, with loopback for the network.

Machines are folders, and their address is 127.0.0.1; a port that several of them share is one that
is free here. Everything else is typed as it stands there.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import commands

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = "docs/deploy.md"
# Rounds are few, and nobody waits long; a run is described by all words alike, so all get these.
BRIEF = ("--set", "rounds=12", "--set", "task=digits", "--set", "links=none")


def typed(page: str, *parts: str) -> list[str]:
    """The one command of a page in which all these words stand."""
    found = [
        words for _, words, _ in commands(page)
        if words[0] == "shoal" and all(part in " ".join(words) for part in parts)
    ]  # fmt: skip
    assert found, f"{page}: no command with {parts}"
    return found[0]


class Machines:
    """Folders in which commands of a page are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.started: list[subprocess.Popen[str]] = []

    def words(self, words: list[str], *, founds: bool) -> list[str]:
        """As typed, but for addresses; the second machine listens on a port of its own."""
        out = []
        for before, word in zip(["", *words], words, strict=False):
            port = self.port if founds or before == "--bootstrap" else 0
            out.append(re.sub(r"^(192\.168\.1\.5|0\.0\.0\.0):7000$", f"127.0.0.1:{port}", word))
        described = any(word.endswith("run.json") for word in out) or "--show-name" in out
        return out[1:] + ([] if described else list(BRIEF))

    def start(
        self, words: list[str], machine: str, *, founds: bool = False
    ) -> subprocess.Popen[str]:
        place = self.folder / machine
        place.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", *self.words(words, founds=founds)], cwd=place,
            env={**os.environ, "SHOAL_HOME": ".shoal", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str], code: int = 0) -> str:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == code, output
        return output


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    found = Machines(tmp_path)
    try:
        yield found
    finally:
        for process in found.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.mark.parametrize("page", [PAGE, "README.md"])
def test_two_machines(machines: Machines, page: str) -> None:
    first = machines.start(
        typed(page, "shoal peer dpsgd --peers 2", "--listen"), "one", founds=True
    )
    second = machines.start(typed(page, "shoal peer dpsgd --peers 2", "--bootstrap"), "two")
    for process in (first, second):
        output = machines.end(process)
        assert "finished: True" in output
        assert "accuracy: " in output


@pytest.mark.parametrize("by_file", [True, False])
def test_a_peer_from_elsewhere_joins_what_up_started(machines: Machines, by_file: bool) -> None:
    up = machines.start(typed(PAGE, "shoal up 2 dpsgd --peers 3"), "one", founds=True)
    folder = machines.folder / "one" / ".shoal" / "up" / "dpsgd-1"
    log = folder / "peer-1.log"
    limit = time.monotonic() + 60
    # Both have their ids; a stranger who asks for none gets the first that is free.
    while not (log.exists() and "peer 1: " in log.read_text()):
        assert up.poll() is None, up.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)
    if by_file:
        late = machines.start(typed(PAGE, "shoal peer .shoal/up/dpsgd-1/run.json"), "one")
    else:
        late = machines.start(typed(PAGE, "shoal peer dpsgd --peers 3", "--bootstrap"), "two")
    assert "finished: True" in machines.end(late)
    assert "report: " in machines.end(up)


def test_keys_and_lists_of_those_allowed(machines: Machines) -> None:
    key = typed(PAGE, "--show-name")
    names = [machines.end(machines.start(key, place)) for place in ("one", "two", "three")]
    for place in ("one", "two", "three"):
        (machines.folder / place / "friends.txt").write_text(names[0] + names[1])
    words = typed(PAGE, "--key me.key --allow friends.txt")
    one = machines.start([*words, "--listen", "0.0.0.0:7000"], "one", founds=True)
    joins = ["--bootstrap", "192.168.1.5:7000"]
    three = machines.start([*words, *joins], "three")
    assert "own key" in machines.end(three, 2)
    two = machines.start([*words, *joins], "two")
    for process in (one, two):
        assert "finished: True" in machines.end(process)
