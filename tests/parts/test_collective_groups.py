"""Groups of a grid, shards by replicas: each its own sums, state and ring, one master for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import pytest
import torch

from shoal.engine.event.simulation import EventSettings, simulate
from shoal.lab.explore import explore
from shoal.parts.collective._errors import (
    CollectiveError,
    ConnectionLost,
    Diverged,
    Mismatch,
    SyncFailed,
)
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.shared_state import SharedState, digest
from shoal.parts.collective.tour import tour_cost
from shoal.wire.message import message
from shoal.world.faults import Crash, Fault, Join, Partition
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

LINKS = Links(latency_s=0.01, uplink_bytes_per_s=1e6)
RING = Ring(stall_s=0.5, piece_bytes=64, few=1, checked=True)


def run_groups(
    program: Any, peers: int, faults: tuple[Fault, ...] = (), links: Any = LINKS, **settings: float
) -> Run:
    return simulate(
        lambda peer: program if peer else Master(end_s=100.0, **settings),
        Network(peers + 1, links=links, faults=faults),
        settings=EventSettings(strict=True, horizon_s=300.0),
    )  # fmt: skip


async def all_there(group: Communicator, peers: int, until_s: float = 5.0) -> None:
    while group.everybody < peers and group.peer.now() < until_s:
        await group.update_topology()
        await group.peer.sleep_until(group.peer.now() + 0.1)


# The order of the ring.


@dataclass(frozen=True)
class Optimises:
    """Peers 1 and 2 are a group, the others another one; each finds its own ring."""

    peers: int
    probe_bytes: int = 1 << 14
    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        own = int(peer.id > 2)
        try:
            async with Communicator(peer, 0, group=own, ring=RING, fetch_s=1.0) as group:
                await all_there(group, self.peers)
                await group.optimize_topology(self.probe_bytes)
                values = torch.full((30,), 64**peer.id, dtype=torch.int64)
                await group.all_reduce_with_retry(values)
                self.end[peer.id] = (group.ring, group.rates, int(values[0]))
        except CollectiveError as error:
            self.end[peer.id] = type(error).__name__


def test_groups_of_different_sizes_find_their_own_rings() -> None:
    program = Optimises(7)
    links = Links(latency_s=0.01, uplink_bytes_per_s=1e7, slow_pairs=0.4, slow_bytes_per_s=2e5)
    assert run_groups(program, 7, links=links, diverged_s=5.0).finished
    for members in ((1, 2), (3, 4, 5, 6, 7)):
        (ring,) = {program.end[peer][0] for peer in members}
        assert sorted(ring) == list(members)
        assert {program.end[peer][2] for peer in members} == {sum(64**p for p in members)}
        for peer in members:
            assert set(program.end[peer][1]) == set(members) - {peer}
    cost = torch.zeros(5, 5, dtype=torch.float64)
    for peer in range(3, 8):
        for target, rate in program.end[peer][1].items():
            assert rate == pytest.approx(8 * min(1e7, links.path_of(peer, target)), rel=0.1)
            cost[peer - 3, target - 3] = 1e9 / rate
    chosen = tour_cost(cost.numpy(), tuple(peer - 3 for peer in program.end[3][0]))
    ways = [tour_cost(cost.numpy(), (0, *way)) for way in permutations(range(1, 5))]
    assert chosen == pytest.approx(min(ways))
    assert chosen < sorted(ways)[len(ways) // 2]


@pytest.mark.parametrize("at_ms", range(600, 1500, 60))
def test_a_loss_while_links_are_measured_parts_nobody(at_ms: int) -> None:
    """Those who learn of it in the middle measure as often as those who do not."""
    program = Optimises(7)
    fault = Crash(who=(5,), at=at_ms / 1000)
    assert run_groups(program, 7, (fault,), diverged_s=5.0).finished
    whole = {p: program.end[p] for p in (1, 2, 3, 4, 6, 7)}
    assert not [told for told in whole.values() if isinstance(told, str)], whole
    assert {whole[p][2] for p in (1, 2)} == {64 + 64**2}
    (total,) = {whole[p][2] for p in (3, 4, 6, 7)}
    assert total - sum(64**p for p in (3, 4, 6, 7)) in (0, 64**5)


# What one group does is nothing to the other.


@dataclass(frozen=True)
class Apart:
    """Group 0 (peers 1 to 3) reduces without any retry; group 1 (4 to 6) has the trouble.

    size: of group 0's tensors, which take the way of small ones or that of the ring.
    """

    size: int
    joins: bool = False
    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        try:
            await self.work(peer)
        except CollectiveError as error:
            self.end[peer.id] = type(error).__name__

    async def work(self, peer: Any) -> None:
        calm = peer.id <= 3
        ring = Ring(stall_s=0.5, piece_bytes=1 << 12, checked=True, direct_bytes=1 << 12)
        async with Communicator(peer, 0, group=int(not calm), ring=ring) as group:
            if peer.now() > 1.0:
                await group.update_topology()
                self.end[peer.id] = (peer.now(), set(), group.ring)
                return
            await all_there(group, 5 if self.joins else 6)
            sums, epochs, begun_s = [], set(), peer.now()
            while peer.now() < begun_s + 1.5:
                values = torch.full((self.size if calm else 300,), 64**peer.id, dtype=torch.int64)
                if calm:
                    await group.all_reduce(values)
                else:
                    await group.all_reduce_with_retry(values)
                assert bool((values == values[0]).all())
                sums.append(int(values[0]))
                epochs.add(group.epoch)
                # All of a group end together: a number that they have in common says when.
                steps = torch.tensor([int(peer.now() >= begun_s + 1.5)])
                await group.all_reduce_with_retry(steps, "max", tag=1)
                if steps[0]:
                    break
            await group.update_topology()
            self.end[peer.id] = (sums, epochs, group.ring)


@pytest.mark.parametrize("size", [50, 20_000])
@pytest.mark.parametrize("fault", [Crash(who=(5,), at=0.6), Partition(who=(5,), at=0.6)])
def test_a_loss_in_one_group_does_not_touch_reductions_of_the_other(
    size: int, fault: Fault
) -> None:
    program = Apart(size)
    calm = Apart(size)
    run_groups(calm, 6)
    assert run_groups(program, 6, (fault,)).finished
    assert program.end.get(5) == (None if isinstance(fault, Crash) else "MasterLost")
    for peer in (1, 2, 3):
        sums, epochs, _ = program.end[peer]
        assert set(sums) == {64 + 64**2 + 64**3}
        assert len(epochs) == 1
        # As many as without the loss: none of them was done twice.
        assert sums == calm.end[peer][0]
    assert program.end[4][0][-1] == program.end[6][0][-1] == 64**4 + 64**6


def test_who_joins_a_group_waits_for_all_groups_and_stops_none() -> None:
    program = Apart(20_000, joins=True)
    late = Join(who=(6,), at=1.01)
    assert run_groups(program, 6, (late,)).finished
    for peer in (1, 2, 3):
        assert set(program.end[peer][0]) == {64 + 64**2 + 64**3}
        assert program.end[peer][2] == (1, 2, 3)
    for peer in (4, 5):
        assert set(program.end[peer][0]) == {64**4 + 64**5}
        assert sorted(program.end[peer][2]) == [4, 5, 6]
    # Let in by the call that all make at the end.
    assert program.end[6][0] > 1.2 + 0.5


@dataclass(frozen=True)
class Waits:
    """Group 0: peer 1 works for long while peer 2 waits for it; group 1 waits for all."""

    works_s: float
    calls: tuple[str, str] = ("update_topology", "update_topology")
    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        own = int(peer.id > 2)
        async with Communicator(peer, 0, group=own, ring=RING) as group:
            await all_there(group, 4)
            values = torch.ones(5)
            if peer.id == 1:
                await peer.sleep_until(peer.now() + self.works_s)
            try:
                if not own:
                    await group.all_reduce(values)
                await getattr(group, self.calls[own])()
                self.end[peer.id] = "done"
            except Diverged:
                self.end[peer.id] = "diverged"
            if own:
                await group.all_reduce(values)
            assert bool((values == 2.0).all())
            await group.update_topology()


def test_a_long_wait_in_one_group_is_no_divergence_from_another() -> None:
    program = Waits(works_s=20.0)
    assert run_groups(program, 4, diverged_s=5.0).finished
    assert program.end == dict.fromkeys((1, 2, 3, 4), "done")


def test_groups_that_wait_for_different_calls_of_all_are_told() -> None:
    program = Waits(1.0, ("update_topology", "are_peers_pending"))
    assert run_groups(program, 4, diverged_s=5.0).finished
    assert program.end == dict.fromkeys((1, 2, 3, 4), "diverged")


# States, and all of it under faults.


@dataclass(frozen=True)
class Rounds:
    """Every round a sum and a state of the group, and a joint call of all; the groups' states have
    other names, sizes and revisions. Peer p adds 64**p to every element."""

    rounds: int = 3
    log: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        self.log.append(("begins", peer.id))
        own = shard_of(peer.id)
        ring = Ring(stall_s=0.5, piece_bytes=2048, few=1, checked=True, direct_bytes=1024)
        try:
            async with Communicator(peer, 0, group=own, ring=ring, master_timeout_s=3.0) as group:
                await self.work(peer, group, own)
        except CollectiveError as error:
            self.log.append(("left", peer.id, type(error).__name__))

    async def work(self, peer: Any, group: Communicator, own: int) -> None:
        await all_there(group, 6)
        await group.update_topology()
        names = ("a", "b") if own else ("c",)
        state = SharedState(
            {name: torch.zeros(20 + 10 * own, dtype=torch.int64) for name in names}, 3 + 4 * own
        )
        for _ in range(self.rounds):
            values = torch.full((50 if own else 9000,), 64**peer.id, dtype=torch.int64)
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
            for tensor in state.tensors.values():
                tensor += values[0]
            while True:
                try:
                    await group.sync_shared_state(state)
                    break
                except SyncFailed:
                    continue
            digests = tuple(digest(tensor) for tensor in state.tensors.values())
            self.log.append(("state", peer.id, group.committed, digests))
            state.revision += 1
            await group.are_peers_pending()


def shard_of(peer: int) -> int:
    return int(peer > 3)


def complaint(log: list[Any]) -> str | None:
    """Sums hold members of their group, each once, and are equal; so are states after them."""
    found: dict[tuple[str, int, int], dict[int, Any]] = {}
    for kind, peer, *more in log:
        if kind in ("done", "state"):
            found.setdefault((kind, shard_of(peer), more[0]), {})[peer] = more[1]
    for (kind, own, number), by_peer in found.items():
        if len(set(by_peer.values())) > 1:
            return f"{kind} {number} of group {own}: {by_peer}"
        if kind == "done":
            total = next(iter(by_peer.values()))
            counts = {peer: total >> 6 * peer & 63 for peer in range(7)}
            if any(n not in (0, 1) or (n and shard_of(p) != own) for p, n in counts.items()):
                return f"{kind} {number} of group {own}: contributions {counts}"
            if not all(counts[peer] for peer in by_peer) or counts[0]:
                return f"{kind} {number} of group {own}: {counts} at {set(by_peer)}"
    return None


def test_groups_keep_sums_and_states_of_their_own() -> None:
    program = Rounds()
    assert run_groups(program, 6).finished
    assert complaint(program.log) is None
    done = [entry for entry in program.log if entry[0] == "done"]
    found = [(shard_of(p), total) for _, p, _, total in done]
    sums = {0: 64 + 64**2 + 64**3, 1: 64**4 + 64**5 + 64**6}
    assert sorted(found) == [(own, sums[own]) for own in (0, 1) for _ in range(9)]
    assert "contributions" in (complaint([("done", 1, 1, 64 + 64**4)]) or "")
    assert "contributions" in (complaint([("done", 1, 1, 128)]) or "")
    assert "group 1" in (complaint([("state", 4, 1, b"a"), ("state", 5, 1, b"b")]) or "")
    assert complaint([("state", 1, 1, b"a"), ("state", 5, 1, b"b")]) is None


@pytest.mark.parametrize("block", range(2))
def test_no_fault_list_hangs_a_grid_or_mixes_its_groups(block: int) -> None:
    logs: list[list[Any]] = []

    def make() -> Any:
        program = Rounds()
        logs.append(program.log)
        return lambda peer: program if peer else Master(end_s=60.0, diverged_s=5.0)

    found = explore(
        make, Network(7, links=LINKS), seeds=50, first_seed=500 * block, horizon_s=120.0,
        invariants=(lambda run: complaint(logs[-1]),), rounds=0, window_s=2.0,
    )  # fmt: skip
    assert not found.failures, found.failures[0].to_data()
    assert found.traces >= 30
    done = sum(entry[0] == "done" for log in logs for entry in log)
    assert done > 50 * 6, "the faults left nothing to check"


@dataclass(frozen=True)
class Offers:
    """Peer 5 has another dtype in its shared state; group 0 has nothing to do with it."""

    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        own = shard_of(peer.id)
        async with Communicator(peer, 0, group=own, ring=RING) as group:
            await all_there(group, 6)
            kind = torch.float64 if peer.id == 5 else torch.float32
            state = SharedState({"w": torch.full((4,), float(own), dtype=kind)})
            try:
                await group.sync_shared_state(state)
                self.end[peer.id] = float(state.tensors["w"][0])
            except Mismatch as error:
                self.end[peer.id] = (error.peers, "peer 5" in str(error))
            await group.update_topology()


def test_a_state_of_another_dtype_is_named_and_stays_in_its_group() -> None:
    program = Offers()
    assert run_groups(program, 6).finished
    assert program.end == {
        **dict.fromkeys((1, 2, 3), 0.0),
        **dict.fromkeys((4, 5, 6), ((5,), True)),
    }


# Training on a grid: every replica holds all weights, a shard at each of its peers.


@message(tag=("step",))
class Share:
    """What one shard's weights say of the samples of its replica."""

    step: int
    values: torch.Tensor


DIM, STEPS, RATE = 6, 12, 0.2


def data(replica: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(replica)
    x = torch.randn(20, 2 * DIM, generator=generator, dtype=torch.float64)
    return x, x @ torch.arange(2.0 * DIM, dtype=torch.float64)


@dataclass(frozen=True)
class Sharded:
    """Least squares by gradient descent: a replica's two peers exchange their parts of the outcome,
    and each averages its own gradient with those of its shard. Without its other half a peer can do
    nothing, so it leaves."""

    end: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)
    sizes: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        own, replica = shard_of(peer.id), (peer.id - 1) % 3
        other = 1 + replica + 3 * (1 - own)
        x, y = data(replica)
        mine = x[:, own * DIM : (own + 1) * DIM]
        weights = torch.zeros(DIM, dtype=torch.float64)
        async with Communicator(peer, 0, group=own, ring=RING) as group:
            await all_there(group, 6)
            for step in range(STEPS):
                said = mine @ weights
                await peer.send(other, Share(step, said))
                heard = await peer.gather(
                    Share, tag=(step,), expect=[other], deadline=peer.now() + 3.0
                )
                if not heard:
                    return
                gradient = mine.T @ (said + heard[other].values - y) / len(y)
                await group.all_reduce_with_retry(gradient, "avg")
                self.sizes.append((step, own, group.world_size))
                weights -= RATE * gradient
                state = SharedState({f"shard {own}": weights}, step)
                await group.sync_shared_state(state)
            self.end[peer.id] = weights


def centrally(replicas: tuple[int, ...]) -> torch.Tensor:
    weights = torch.zeros(2 * DIM, dtype=torch.float64)
    for _ in range(STEPS):
        gradients = [x.T @ (x @ weights - y) / len(y) for x, y in map(data, replicas)]
        weights -= RATE * sum(gradients) / len(gradients)
    return weights


def test_a_grid_trains_as_one_machine_would() -> None:
    program = Sharded()
    assert run_groups(program, 6).finished
    whole = centrally((0, 1, 2))
    for peer in range(1, 7):
        own = shard_of(peer)
        assert torch.allclose(program.end[peer], whole[own * DIM : (own + 1) * DIM], atol=1e-9)


def test_a_grid_goes_on_without_a_replica_that_lost_a_shard() -> None:
    program = Sharded()
    assert run_groups(program, 6, (Crash(who=(2,), at=0.9),)).finished
    assert sorted(program.end) == [1, 3, 4, 6]
    assert torch.equal(program.end[1], program.end[3])
    assert torch.equal(program.end[4], program.end[6])
    assert {size for step, _, size in program.sizes if step == STEPS - 1} == {2}
    assert {size for step, _, size in program.sizes if step == 0} == {3}
