"""W2, rounds of a small CNN: star of 16 peers, 600 images of 28x28 each, one local epoch.

Two 3x3 convolutions of 8 and 16 channels with pooling, then 400-64-10: 27,562 parameters.
Convolutions are all arithmetic: what is compared is how it is laid out. The loops by hand are vmap
and a channels-last module for each peer. On two cores lockstep shares the peers out to two
threads; the plain loop has one thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.engine.executor import Threads
from shoal.engine.lockstep import run_lockstep
from shoal.lab.bench._by_hand import ChannelsLastLoop, VmapLoop
from shoal.lab.bench._rounds import Contest
from shoal.lab.bench._row import Note, Row
from shoal.lab.bench._workload import small_cnn


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    workload, rounds = small_cnn(tiny), 1 if tiny else 2
    by_hand = {"vmap": VmapLoop, "channels-last per peer": ChannelsLastLoop}
    contest = Contest(workload, rounds, by_hand, None)
    star = workload.star(contest.task, rounds)
    with Threads(2) as pool:
        contest.engines["lockstep on two threads"] = lambda: run_lockstep(
            [star[0]], [star[1]], executor=pool
        )
        times = contest.run(1 if tiny else 5, note)
    # Forward and backward, but for the gradient of the first convolution's input.
    first, second, dense = 26 * 26 * 8 * 9, 11 * 11 * 16 * 72, 400 * 64 + 64 * 10
    flops = workload.peers * workload.samples * (4.0 * first + 6.0 * (second + dense))
    # Every step reads and writes the parameters.
    touched = workload.peers * workload.steps * contest.task.spec.dim * 8.0
    two = times["lockstep on two threads"]
    yield from contest.rows("W2", times, flops, touched)
    plain = times["plain loop"]
    yield Row.of(
        "W2: lockstep against the plain loop, CPU", times["lockstep"].cpu, "s/round",
        against=("plain loop", plain.cpu), bound="<= 0.7",
    )  # fmt: skip
    yield Row.of(
        "W2: lockstep on two threads against the plain loop, wall", two.wall, "s/round",
        against=("plain loop", plain.wall), bound="<= 0.4",
    )  # fmt: skip
