"""W1, rounds of a small MLP: star of 100 peers, 15 digits each, MLP 64-128-10, one local epoch.

Small models are all overhead: what is compared is how little of it an engine adds. The loops by
hand are vmap and stacked products; the plain loop is a module and an optimiser for each peer.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.lab.bench._by_hand import StackedMLP, VmapLoop
from shoal.lab.bench._rounds import Contest
from shoal.lab.bench._row import Note, Row
from shoal.lab.bench._workload import small_mlp


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    workload = small_mlp(tiny)
    by_hand = {"vmap": VmapLoop, "stacked bmm": StackedMLP}
    contest = Contest(workload, 2 if tiny else 40, by_hand, 2 if tiny else 8)
    times = contest.run(1 if tiny else 9, note)
    dim, hidden = contest.task.spec.dim, workload.model.hidden[0]
    # Forward, and backward but for the gradient of the input.
    flops = workload.peers * workload.samples * (4.0 * 64 * hidden + 6.0 * hidden * 10)
    # Parameters are read and written once each, in float32.
    yield from contest.rows("W1", times, flops, workload.peers * dim * 8.0)
    yield Row.of(
        "W1: lockstep against the plain loop, CPU", times["lockstep"].cpu, "s/round",
        against=("plain loop", times["plain loop"].cpu), bound="<= 1/7",
    )  # fmt: skip
