"""Many peers: 10,000 in lockstep and 1,000 in the event engine, gossip of degree 8, 20 rounds.

W1's model and data, drawn with replacement by key. Each size runs in a process of its own, since
the peak of memory is a process's; growth from a tenth of the peers may be linear at most.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from shoal.lab.bench._row import Note, Row

_GIB = 1 << 30


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    sizes = {"lockstep": (40, 400), "event": (8, 40)}
    if not tiny:
        sizes = {"lockstep": (1_000, 10_000), "event": (100, 1_000)}
    for engine, (few, many) in sizes.items():
        found = {}
        for peers in (few, many):
            note(f"{engine}, {peers:,} peers")
            found[peers] = apart(engine, peers, 2 if tiny else 20)
        cpu_s, wall_s, peak, rest = found[many]
        name = f"{engine}, {many:,} peers"
        yield Row.of(f"{name}: CPU", cpu_s, "s")
        yield Row.of(f"{name}: wall", wall_s, "s")
        bound = "<= 12" if engine == "lockstep" else None
        yield Row.of(f"{name}: peak memory", peak / _GIB, "GiB", bound=bound)
        linear = f"{many // few} times {few:,} peers"
        bound = "<= 1" if engine == "lockstep" else None
        yield Row.of(
            f"{name}: growth of CPU seconds", cpu_s, "s",
            against=(linear, found[few][0] * many / few), bound=bound,
        )  # fmt: skip
        # What the interpreter and its libraries take does not grow.
        before = found[few]
        yield Row.of(
            f"{name}: growth of memory", (peak - rest) / _GIB, "GiB",
            against=(linear, (before[2] - before[3]) / _GIB * many / few), bound=bound,
        )  # fmt: skip


def apart(engine: str, peers: int, rounds: int) -> tuple[float, float, int, int]:
    """(CPU seconds, wall seconds, peak bytes, bytes before it began) of a run in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_one, engine, peers, rounds).result()


def _one(engine: str, peers: int, rounds: int) -> tuple[float, float, int, int]:
    import torch

    torch.set_num_threads(1)
    from shoal.lab.bench._rounds import event, lockstep
    from shoal.lab.bench._workload import small_mlp

    workload = replace(small_mlp(False), peers=peers)
    task = replace(workload, peers=1).task()
    rest = peak_bytes()
    task = workload.task()
    world = workload.gossip(task, rounds, 8 if peers > 8 else 2)
    run = {"lockstep": lockstep, "event": event}[engine](world)
    return run.cpu_s, run.wall_s, peak_bytes(), rest


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `getrusage`: a new process's figure begins with that of its parent.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
