"""What LIFL's data plane takes on this machine, with real processes and real shared memory.

"shared", "socket", "broker" and "bytes": updates go one by one from one aggregator to another that
adds them: by a key to shared memory; serialised over local TCP; so, but by way of a broker's
process; or over local TCP as bare bytes into a buffer that is there already, which is the least
that a socket can do. "tree": a pool of aggregators sums a wave of updates; with "killed" some of
them get SIGKILL meanwhile. Seconds are those of the run, its own metrics tell of the sums.

Qi et al. 2024 (MLSys, arXiv 2405.10968), sections on shared-memory processing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shoal.base.errors import UsageError
from shoal.base.stopwatch import Stopwatch
from shoal.lab.card import System
from shoal.lab.scenario import Scenario
from shoal.parts.serving.hierarchical_aggregator import HierarchicalAggregator
from shoal.systems.serving._lifl_hop import TRANSPORTS, measured
from shoal.world.record import Row, Run

_DIFFERENT = 4
"""Updates with numbers of their own; more would fill the machine and change nothing."""
EXACT = 1e-6


def lifl_machine(
    scenario: Scenario, transport: str = "shared", megabytes: float = 1.0, updates: int = 4,
    waves: int = 1, workers: int = 5, kills: int = 3,
) -> Run:  # fmt: skip
    """Send `waves` of `updates` of `megabytes` MiB, or sum one by `workers`, of whom `kills` die.

    Rows: updates; wrong: 1 if the sum is further than 1e-6 of itself from the flat weighted sum;
    left: pieces of shared memory that this process still has; lost: updates that are not in it.
    wall_s and cpu_s of the run are those of the median wave (cpu_s of a tree: this process alone).
    """
    if transport not in (*TRANSPORTS, "tree", "killed"):
        raise UsageError(
            f"lifl-machine: transport={transport!r}; need one of {', '.join(TRANSPORTS)}, tree or "
            "killed"
        )
    size = int(megabytes * (1 << 20)) // 4
    if size < 1 or min(updates, waves, workers) < 1 or kills < 0:
        raise UsageError(
            f"lifl-machine: megabytes={megabytes}, updates={updates}, waves={waves}, "
            f"workers={workers}, kills={kills}; need a number, an update, a wave and a worker"
        )
    draws = np.random.default_rng(scenario.seed)
    numbers = draws.standard_normal((min(_DIFFERENT, updates), size), dtype=np.float32)
    rows = {"updates": float(updates), "lost": 0.0}
    before = mapped()
    if transport in TRANSPORTS:
        hop = measured(transport, numbers, updates, waves)
        wall_s, cpu_s, error = hop.wall_s, hop.cpu_s, hop.error
    else:
        wall_s, cpu_s, error, lost = _tree(
            numbers, updates, workers, kills if transport == "killed" else 0
        )
        rows["lost"] = float(lost)
        rows["kills"] = float(kills if transport == "killed" else 0)
    rows["wrong"] = float(error > EXACT)
    rows["left"] = float(mapped() - before)
    run = Run("study", scenario.seed, scenario.peers)
    run.rows = [Row(name, value, 0.0) for name, value in rows.items()]
    run.wall_s, run.cpu_s = wall_s, cpu_s
    return run


def mapped() -> int:
    """Pieces of shared objects' memory that this process has mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return maps.count("memfd:shoal-objects")


def _tree(
    numbers: np.ndarray, updates: int, workers: int, kills: int
) -> tuple[float, float, float, int]:
    """Seconds, processor seconds, error and lost updates of one wave over a tree."""
    size = numbers.shape[1]
    with HierarchicalAggregator(size, workers=workers) as aggregator:

        def wave() -> Iterator[tuple[int, float, np.ndarray]]:
            for place in range(updates):
                # Spread over the wave, so that some are killed in the middle of an addition.
                if place * kills // updates != (place + 1) * kills // updates:
                    os.kill(aggregator.pids[place % workers], signal.SIGKILL)
                yield place, 1.0 + place, numbers[place % len(numbers)]

        aggregator.aggregate([(0, 1.0, numbers[0])])
        watch = Stopwatch()
        result = aggregator.aggregate(wave(), updates)
        wall_s, cpu_s = watch.wall_s, watch.cpu_s
    exact = np.zeros(size)
    for place in range(updates):
        exact += (1.0 + place) * numbers[place % len(numbers)]
    exact /= sum(1.0 + place for place in range(updates))
    error = float(np.abs(result.mean - exact).max() / np.abs(exact).max())
    return wall_s, cpu_s, error, updates - len(result.ids)


SYSTEM = System(
    name="lifl-machine",
    kind="study",
    title="Updates between aggregators on one machine: shared memory, sockets, a broker",
    make=lifl_machine,
    scenario=Scenario("serving.machine", peers=2, rounds=1),
)
