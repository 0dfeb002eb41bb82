"""Fifty peers in one process hold as many descriptors and as much memory late as early."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live
SCRIPT = str(Path(__file__).with_name("many_peers.py"))
PEERS = 50
GROWTH_BYTES = 3 << 20
SPARE = 40
"""Descriptors of the process itself, and of connections that a crash is just closing."""


@pytest.mark.parametrize(
    "seconds",
    [8.0, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.timeout(180)])],
)
def test_descriptors_and_memory_do_not_grow(seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, str(PEERS), str(seconds)], capture_output=True, text=True,
        timeout=seconds + 60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["finished"]
    assert told["crashes"] >= 10
    assert told["delivered"] > 10 * PEERS
    # Connections and buffers come to be in the first third; crashes go on all the time.
    middle, last = (
        [row for row in told["samples"] if low * seconds <= row[0] < high * seconds]
        for low, high in ((1 / 3, 2 / 3), (2 / 3, 1.0))
    )
    memory = [statistics.median(row[2] for row in rows) for rows in (middle, last)]
    descriptors = max(row[1] for row in told["samples"]) - told["before"]
    print(f"{told['delivered']} messages, descriptors {descriptors}, bytes {memory}")  # noqa: T201
    # A listener each, and both ends of a connection from each peer to four others.
    assert descriptors <= PEERS * (1 + 2 * 4) + SPARE
    assert memory[1] - memory[0] <= GROWTH_BYTES
    assert told["after"] <= told["before"] + 2
