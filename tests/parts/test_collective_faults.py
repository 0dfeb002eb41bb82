"""Collectives under generated faults: every contribution counts once, all have it or nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from shoal.engine.event.simulation import EventSettings, simulate
from shoal.lab.explore import explore
from shoal.parts.collective._errors import CollectiveError, ConnectionLost, Diverged, SyncFailed
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.shared_state import SharedState, digest
from shoal.world.faults import Corrupt, Crash, Fault, Partition
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

PEERS = 5
LINKS = Links(latency_s=0.01, uplink_bytes_per_s=1e6)
RING = Ring(stall_s=0.5, piece_bytes=64, few=1, checked=True)


@dataclass(frozen=True)
class Counts:
    """Peer p adds 64**p to every element, so that a sum tells how often each peer is in it; after
    every reduction the group agrees on a state."""

    rounds: int = 3
    size: int = 50
    ring: Ring = RING
    log: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        self.log.append(("begins", peer.id))
        try:
            async with Communicator(peer, 0, ring=self.ring, master_timeout_s=3.0) as group:
                await self.work(peer, group)
        except CollectiveError as error:
            self.log.append(("left", peer.id, type(error).__name__))

    async def work(self, peer: Any, group: Communicator) -> None:
        while group.everybody < PEERS and peer.now() < 5.0:
            await group.update_topology()
            await peer.sleep_until(peer.now() + 0.1)
        state = SharedState({"sum": torch.zeros(self.size, dtype=torch.int64)})
        for round in range(self.rounds):
            values = torch.full((self.size,), 64**peer.id, dtype=torch.int64)
            before = values.clone()
            while True:
                try:
                    await group.all_reduce(values)
                    break
                except CollectiveError as error:
                    assert torch.equal(values, before), "an operation that failed left a trace"
                    if not isinstance(error, ConnectionLost):
                        raise
            assert bool((values == values[0]).all()), "elements differ"
            self.log.append(("done", peer.id, group.committed, int(values[0])))
            state.tensors["sum"] += values
            state.revision = round
            while True:
                try:
                    await group.sync_shared_state(state)
                    break
                except SyncFailed:
                    continue
            self.log.append(("state", peer.id, group.committed, digest(state.tensors["sum"])))


def complaint(log: list[Any]) -> str | None:
    """What is wrong with what the peers saw: sums of one operation must be equal and hold each of
    their peers once; whoever is in one has it, or is gone before its next."""
    sums: dict[int, set[int]] = {}
    who: dict[int, set[int]] = {}
    for kind, peer, *more in log:
        if kind == "done":
            sums.setdefault(more[0], set()).add(more[1])
            who.setdefault(more[0], set()).add(peer)
    for number, found in sums.items():
        if len(found) > 1:
            return f"operation {number}: sums {sorted(found)}"
        (total,) = found
        counts = {peer: (total >> (6 * peer)) & 63 for peer in range(1, PEERS + 1)}
        if set(counts.values()) - {0, 1} or total & 63:
            return f"operation {number}: contributions {counts}"
        missing = {peer for peer, count in counts.items() if count} - who[number]
        for peer in missing:
            later = [n for n in sums if n > number and peer in who[n]]
            if later and ("begins", peer) not in log[_first(log, number) :]:
                return f"operation {number}: peer {peer} is in it, has it not, and went on"
        if extra := {peer for peer in who[number] if not counts[peer]}:
            return f"operation {number}: peers {extra} have it and are not in it"
    states: dict[int, set[bytes]] = {}
    for kind, _, *more in log:
        if kind == "state":
            states.setdefault(more[0], set()).add(more[1])
    # By the operation before: who comes when all have gone begins a history of its own.
    different = {number for number, found in states.items() if len(found) > 1}
    return f"states after operations {different} differ" if different else None


def _first(log: list[Any], number: int) -> int:
    return next(k for k, entry in enumerate(log) if entry[0] == "done" and entry[2] == number)


def master_and(program: Any, **settings: float) -> Callable[[int], Any]:
    return lambda peer: program if peer else Master(end_s=60.0, **settings)


def run_group(program: Any, faults: tuple[Fault, ...] = (), links: Any = LINKS, peers: int = PEERS,
              **settings: float) -> Run:  # fmt: skip
    network = Network(peers + 1, links=links, faults=faults)
    return simulate(
        master_and(program, **settings), network,
        settings=EventSettings(strict=True, horizon_s=300.0),
    )  # fmt: skip


def test_the_checker_sees_what_must_not_be() -> None:
    one, two = 64 + 64**2, 64 + 2 * 64**2
    good = [("done", 1, 1, one), ("done", 2, 1, one)]
    assert complaint(good) is None
    assert "sums" in (complaint([*good, ("done", 2, 1, 64)]) or "")
    assert "contributions" in (complaint([("done", 1, 1, two), ("done", 2, 1, two)]) or "")
    assert "not in it" in (complaint([("done", 1, 1, 64), ("done", 2, 1, 64)]) or "")
    assert "went on" in (complaint([("done", 1, 1, one), ("done", 2, 2, 64**2)]) or "")
    assert "differ" in (complaint([*good, ("state", 1, 0, b"a"), ("state", 2, 0, b"b")]) or "")


@pytest.mark.parametrize("direct_bytes", [0, 1 << 18])
@pytest.mark.parametrize("block", range(2))
def test_no_generated_fault_list_breaks_a_promise(block: int, direct_bytes: int) -> None:
    """All kinds of faults, the master's death among them; what fails is shrunk to a short list."""
    logs: list[list[Any]] = []
    ring = Ring(stall_s=0.5, piece_bytes=64, few=1, checked=True, direct_bytes=direct_bytes)

    def make() -> Any:
        program = Counts(ring=ring)
        logs.append(program.log)
        return master_and(program)

    def promises(run: Run) -> str | None:
        return complaint(logs[-1])

    found = explore(
        make, Network(PEERS + 1, links=LINKS), seeds=50, first_seed=1000 * block, horizon_s=120.0,
        invariants=(promises,), rounds=0, window_s=2.0,
    )  # fmt: skip
    assert not found.failures, found.failures[0].to_data()
    assert found.traces >= 25


@pytest.mark.parametrize("who", [1, 3])
def test_flipped_bits_are_found_out_and_change_no_sum(who: int) -> None:
    program = Counts(rounds=6)
    run = run_group(program, (Corrupt(who=(who, 0), probability=0.03),))
    assert run.finished
    assert complaint(program.log) is None
    assert sum(entry[0] == "done" for entry in program.log) >= 20


def test_who_damages_most_of_what_it_sends_is_dropped_and_the_others_go_on() -> None:
    """Its reports still come now and then, so that silence alone would never tell."""
    program = Counts(rounds=6, ring=Ring(stall_s=0.5, piece_bytes=64, few=1, checked=True))
    run = run_group(program, (Corrupt(who=(3,), at=0.5, probability=0.7),), timeout_s=3.0)
    assert run.finished
    assert complaint(program.log) is None
    assert run.series("broken_link")
    assert [row.value for row in run.series("dropped")] == [3.0]
    done = Counter(entry[1] for entry in program.log if entry[0] == "done")
    assert [done[peer] for peer in (1, 2, 4, 5)] == [6] * 4


@dataclass(frozen=True)
class OneWay:
    """One directed pair carries nothing."""

    rest: Links
    broken: tuple[int, int] = (1, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rest, name)

    def lost(self, source: Any, target: Any, message_key: Any, extra: Any = 0.0) -> Any:
        return (source, target) == self.broken or self.rest.lost(source, target, message_key, extra)


@pytest.mark.parametrize("size", [50, 70_000])
def test_a_ring_goes_around_a_pair_that_carries_nothing_and_nobody_is_dropped(size: int) -> None:
    program = Counts(size=size, ring=Ring(stall_s=0.5, piece_bytes=1 << 14, checked=True))
    links = OneWay(Links(latency_s=0.01, uplink_bytes_per_s=1e7))
    run = run_group(program, links=links)
    assert run.finished
    assert complaint(program.log) is None
    assert sum(entry[0] == "done" for entry in program.log) == 3 * PEERS
    assert not [entry for entry in program.log if entry[0] == "left"]
    assert run.series("broken_link")
    assert not run.series("dropped")


@dataclass(frozen=True)
class Grid:
    """Two groups of three: sums, averages and states of one are nothing to the other."""

    end: dict[int, Any] = field(default_factory=dict, compare=False)
    rounds: int = 5

    async def run(self, peer: Any) -> None:
        shard = (peer.id - 1) // 3
        async with Communicator(peer, 0, group=shard, ring=RING) as group:
            while group.everybody < 6:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            sums = []
            for _ in range(self.rounds):
                values = torch.full((30,), 64**peer.id, dtype=torch.int64)
                await group.all_reduce_with_retry(values)
                sums.append(int(values[0]))
                await peer.sleep_until(peer.now() + 0.2)
            state = SharedState({"a": torch.full((10,), 1.0 + shard + (peer.id == 3 * shard + 1))})
            await group.sync_shared_state(state)
            self.end[peer.id] = (group.ring, sums, float(state.tensors["a"][0]))


def test_groups_of_a_grid_keep_to_themselves() -> None:
    program = Grid()
    assert run_group(program, peers=6).finished
    for shard in range(2):
        mine = [3 * shard + 1 + k for k in range(3)]
        want = (tuple(mine), [sum(64**p for p in mine)] * 5, 1.0 + shard)
        assert [program.end[p] for p in mine] == [want] * 3


def test_a_loss_in_one_group_costs_the_other_no_result() -> None:
    program = Grid()
    assert run_group(program, (Crash(who=(2,), at=0.75),), peers=6).finished
    assert set(program.end) == {1, 3, 4, 5, 6}
    for p in (4, 5, 6):
        assert program.end[p][:2] == ((4, 5, 6), [sum(64**q for q in (4, 5, 6))] * 5)
    assert program.end[1][1][-1] == program.end[3][1][-1] == 64 + 64**3


@dataclass(frozen=True)
class Diverges:
    """Peers that wait for different things."""

    told: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        async with Communicator(peer, 0) as group:
            while group.everybody < 3:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            values = torch.ones(5)
            try:
                if peer.id == 1:
                    await group.update_topology()
                else:
                    await group.all_reduce(values, tag=peer.id)
            except Diverged:
                self.told.append((peer.id, round(peer.now())))
            assert bool((values == 1.0).all())
            await group.all_reduce(values)
            assert bool((values == 3.0).all())


def test_who_waits_for_different_things_is_told_and_the_group_goes_on() -> None:
    program = Diverges()
    assert run_group(program, peers=3, diverged_s=5.0).finished
    assert sorted(p for p, _ in program.told) == [1, 2, 3]
    assert all(5 <= at <= 7 for _, at in program.told)


@dataclass(frozen=True)
class Probes:
    """Measures the links and reduces once."""

    rates: dict[int, dict[int, float]] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        async with Communicator(peer, 0) as group:
            while group.everybody < 3:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            await group.optimize_topology()
            self.rates[peer.id] = group.rates
            values = torch.ones(1000)
            await group.all_reduce(values)
            assert bool((values == 3.0).all())


@pytest.mark.parametrize("mbit", [0.5, 2.0, 50.0])
def test_probing_a_slow_uplink_drops_nobody_and_finds_its_rate(mbit: float) -> None:
    program = Probes()
    links = Links(latency_s=0.03, uplink_bytes_per_s=mbit * 1e6 / 8)
    run = run_group(program, links=links, peers=3)
    assert run.finished
    assert not run.series("dropped")
    for rates in program.rates.values():
        assert all(rate == pytest.approx(mbit * 1e6, rel=0.3) for rate in rates.values())


@pytest.mark.parametrize("size", [50, 200_000])
@pytest.mark.parametrize("silent", [False, True])
def test_survivors_have_their_result_within_a_second(size: int, silent: bool) -> None:
    at_s, ends = 2.0, {}

    @dataclass(frozen=True)
    class Reduces:
        async def run(self, peer: Any) -> None:
            async with Communicator(peer, 0, master_timeout_s=3.0) as group:
                while group.everybody < 4:
                    await group.update_topology()
                    await peer.sleep_until(peer.now() + 0.05)
                while True:
                    values = torch.full((size,), 64**peer.id, dtype=torch.int64)
                    await group.all_reduce_with_retry(values)
                    if int(values[0]) >> (6 * 4) == 0:
                        assert bool((values == 64 + 64**2 + 64**3).all())
                        ends[peer.id] = peer.now()
                        return

    fault = Partition(who=(4,), at=at_s) if silent else Crash(who=(4,), at=at_s)

    @dataclass(frozen=True)
    class Tolerant:
        async def run(self, peer: Any) -> None:
            try:
                await Reduces().run(peer)
            except CollectiveError:
                ends[peer.id] = float("nan")

    links = Links(latency_s=0.002, uplink_bytes_per_s=1e8)
    assert run_group(Tolerant(), (fault,), links, peers=4).finished
    assert all(at_s < ends[peer] < at_s + 1.0 for peer in (1, 2, 3))
