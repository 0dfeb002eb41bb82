"""Replicas of a signed CRDT store on the virtual network: loss, partitions, liars, crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log2

import pytest
from crdt_programs import Broadcast, Byzantine, Writer

from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Program
from shoal.lab.explore import generate
from shoal.parts.overlay.anti_entropy import Pace
from shoal.world.faults import Crash, Fault, Partition
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

LOSSY = Links(latency_s=0.05, loss=0.3)


def run(
    programs: Program | Callable[[int], Program], peers: int, faults: tuple[Fault, ...],
    end_s: float, seed: int = 0, links: Links = LOSSY,
) -> Run:  # fmt: skip
    network = Network(peers, links=replace(links, seed=seed), faults=faults)
    settings = EventSettings(horizon_s=end_s + 10.0)
    return simulate(programs, network, seed=seed, settings=settings)


def values(run: Run, name: str) -> set[float]:
    return {row.value for row in run.series(name)}


def converged_s(run: Run) -> float:
    """From when on all replicas have one digest."""
    seen: dict[float, set[float]] = {}
    for row in run.series("digest"):
        seen.setdefault(round(row.time_s, 3), set()).add(row.value)
    late = [time for time, digests in seen.items() if len(digests) > 1]
    return min((time for time in seen if time > max(late, default=-1.0)), default=float("inf"))


def check_liars(
    peers: int, liars: int, ops: int, healed_s: float, faults: tuple[Fault, ...]
) -> Run:
    """One state hash within 3 periods x log2(peers) after healing, and nothing forged in it."""
    end_s = healed_s + 25.0

    def program(peer: int) -> Program:
        if peer >= peers - liars:
            return Byzantine(end_s, equivocates=peer == peers - 1)
        return Writer(ops, healed_s, end_s, watch_s=0.25, open=False)

    made = run(program, peers, faults, end_s)
    assert made.finished
    assert len(values(made, "final")) == len(values(made, "values")) == 1
    assert values(made, "forged") == values(made, "evil") == {0.0}
    assert converged_s(made) - healed_s <= 3 * Pace().period_s * log2(peers)
    return made


def test_replicas_agree_after_loss_a_partition_and_liars() -> None:
    halves = Partition(who=tuple(range(8)), at=5.0, until=12.0)
    made = check_liars(16, 2, 20, 20.0, (halves,))
    refused = {dict(row.labels)["reason"] for row in made.rows if row.name == "refused"}
    assert len(refused) >= 3
    assert values(made, "forked") == {1.0}


@pytest.mark.slow
def test_sixty_four_replicas_agree_within_the_bar() -> None:
    first = Partition(who=tuple(range(32)), at=8.0, until=28.0)
    second = Partition(who=tuple(range(0, 64, 2)), at=40.0, until=60.0)
    made = check_liars(64, 5, 85, 60.0, (first, second))
    assert values(made, "nodes").pop() >= 5_000


def test_a_map_that_is_only_broadcast_stays_apart() -> None:
    halves = Partition(who=tuple(range(8)), at=5.0, until=12.0)
    assert len(values(run(Broadcast(20, 20.0, 25.0), 16, (halves,), 25.0), "final")) > 1


def test_a_restarted_replica_goes_on_from_its_store_and_never_reuses_a_number() -> None:
    crash = Crash(who=(2,), at=6.0, until=9.0)
    made = run(Writer(20, 15.0, 25.0), 6, (crash,), 25.0)
    assert max(row.value for row in made.series("restored")) > 0
    assert len(values(made, "final")) == 1
    assert values(made, "forked") == {0.0}
    assert sum(row.value for row in made.series("acknowledged")) == values(made, "hits").pop()


@pytest.mark.parametrize("seed", range(24))
def test_generated_faults_lose_and_double_nothing(seed: int) -> None:
    kinds = ("crash", "join", "partition", "slow", "loss", "hold", "corrupt")
    faults = tuple(
        replace(fault, until=min(fault.until or 8.0, 8.0)) if fault.kind != "join" else fault
        for fault in generate(seed, 6, window_s=6.0, kinds=kinds)
    )
    links = Links(latency_s=0.05, loss=0.1)
    made = run(Writer(8, 8.0, 25.0), 6, faults, 25.0, seed, links)
    assert len(values(made, "final")) == len(values(made, "values")) == 1
    acknowledged = sum(row.value for row in made.series("acknowledged"))
    # Who crashed between its commit and the acknowledgement wrote without a row of it.
    assert values(made, "hits").pop() >= acknowledged
    if not any(fault.kind == "crash" for fault in faults):
        assert values(made, "hits") <= {acknowledged}
