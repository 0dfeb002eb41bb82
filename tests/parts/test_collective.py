"""Reductions in a ring, votes, shared state and tours: against closed forms and under faults."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base import keyed
from shoal.base.errors import PeerError, UsageError
from shoal.engine.event.simulation import EventSettings, simulate
from shoal.parts.collective._errors import (
    CollectiveError,
    ConnectionLost,
    Mismatch,
    PendingOperations,
    RevisionViolation,
    TooFewPeers,
)
from shoal.parts.collective._wire import Status
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master, State
from shoal.parts.collective.quantised import Quantised
from shoal.parts.collective.ring import OPS, Progress, Ring, chunk_bounds
from shoal.parts.collective.shared_state import SharedState
from shoal.parts.collective.tour import Tour, link_cost, tour_cost
from shoal.world.faults import Crash, Hold, Loss, Partition, Slow
from shoal.world.links import Links
from shoal.world.network import Network

STRICT = EventSettings(strict=True, horizon_s=300.0)


def numbers(size: int, peer: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + peer)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator, dtype=dtype)
    return torch.randint(-9, 10, (size,), generator=generator, dtype=dtype)


@dataclass(frozen=True)
class Reduces:
    """One reduction, no master."""

    size: int
    ring: Ring
    dtype: torch.dtype
    found: dict[int, tuple[torch.Tensor, Progress]] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        own = numbers(self.size, peer.id, self.dtype)
        before, count = own.clone(), Progress()
        pieces = await self.ring.reduce(peer, 1, peer.roster, own, count)
        assert torch.equal(own, before)
        for start, piece in pieces:
            own[start : start + len(piece)] = piece
        self.found[peer.id] = own, count


def reduced(peers: int, size: int, ring: Ring, dtype: torch.dtype) -> Reduces:
    program = Reduces(size, ring, dtype)
    assert simulate(program, Network(peers), settings=STRICT).finished
    return program


def in_ring_order(peers: int, size: int, op: str, dtype: torch.dtype) -> torch.Tensor:
    """The stated order: chunk c from place c on around the ring."""
    does = {
        "sum": torch.add, "avg": torch.add, "prod": torch.mul, "min": torch.minimum,
        "max": torch.maximum,
    }[op]  # fmt: skip
    all_of_them = [numbers(size, peer, dtype) for peer in range(peers)]
    bounds = chunk_bounds(size, peers)
    out = torch.empty(size, dtype=dtype)
    for c in range(peers):
        here = slice(bounds[c], bounds[c + 1])
        out[here] = reduce(does, [all_of_them[(c + k) % peers][here] for k in range(peers)])
    return out / peers if op == "avg" else out


@given(
    peers=st.integers(1, 8), size=st.integers(0, 70), op=st.sampled_from(OPS),
    piece=st.sampled_from([8, 40, 1 << 20]), ahead=st.integers(1, 3), checked=st.booleans(),
)  # fmt: skip
@settings(max_examples=80)
def test_a_reduction_is_the_stated_one_bit_for_bit(
    peers: int, size: int, op: str, piece: int, ahead: int, checked: bool
) -> None:
    ring = Ring(op=op, piece_bytes=piece, ahead=ahead, checked=checked)
    for dtype in (torch.float32, torch.int64):
        if op == "avg" and dtype == torch.int64:
            continue
        found = reduced(peers, size, ring, dtype).found
        want = in_ring_order(peers, size, op, dtype)
        assert len(found) == peers
        for values, _ in found.values():
            assert torch.equal(values, want)
        if dtype == torch.int64 and op == "sum":
            own = [numbers(size, p, dtype).numpy() for p in range(peers)]
            assert np.array_equal(want.numpy(), np.sum(own, axis=0))


@pytest.mark.parametrize(("peers", "size"), [(4, 10), (2, 7), (8, 80), (8, 3), (5, 5000)])
def test_bytes_are_those_of_the_formula(peers: int, size: int) -> None:
    found = reduced(peers, size, Ring(piece_bytes=4096), torch.float32).found
    sent = [found[p][1].payload_bytes for p in range(peers)]
    assert sum(sent) == 2 * (peers - 1) * size * 4
    if size % peers == 0:
        assert set(sent) == {2 * (peers - 1) * size * 4 // peers}
    if (peers, size) == (4, 10):
        assert sorted(b // 4 for b in sent) == [14, 15, 15, 16]


@given(
    peers=st.integers(2, 8), size=st.integers(1, 200),
    kind=st.sampled_from(["min_max", "zero_point"]), op=st.sampled_from(["sum", "avg"]),
)  # fmt: skip
@settings(max_examples=40)
def test_quantised_reductions_end_with_equal_bits(
    peers: int, size: int, kind: str, op: str
) -> None:
    ring = Ring(op=op, piece_bytes=256, quantise=Quantised(kind))
    found = reduced(peers, size, ring, torch.float32).found
    first = found[0][0]
    assert all(torch.equal(values, first) for values, _ in found.values())
    # Every hop adds at most half a step of a partial sum's range, and the owner one more.
    own = torch.stack([numbers(size, p, torch.float32) for p in range(peers)])
    span = 2 * own.abs().sum(0).max().item()
    error = (first - in_ring_order(peers, size, op, torch.float32)).abs().max().item()
    assert error <= peers * span / 510 * 1.001 / (peers if op == "avg" else 1)


@given(seed=st.integers(0, 10_000), exponent=st.integers(-30, 30), size=st.integers(1, 500))
@settings(max_examples=100)
def test_one_hop_errs_by_at_most_half_a_step(seed: int, exponent: int, size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codec = Quantised()
    error = (codec.decode(codec.encode(x)) - x).abs().max()
    assert error <= (x.max() - x.min()) / 510 * 1.001 + x.abs().max() * 1e-6
    zero = Quantised("zero_point")
    x[0] = 0.0
    assert zero.decode(zero.encode(x))[0] == 0.0


def test_what_a_ring_cannot_reduce_is_refused() -> None:
    for ring, values in (
        (Ring(), torch.zeros(4, 4).t()[1:]), (Ring(), torch.zeros(3, dtype=torch.bool)),
        (Ring(op="avg"), torch.zeros(3, dtype=torch.int64)),
        (Ring(quantise=Quantised()), torch.zeros(3, dtype=torch.float64)),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            ring.check(values)
    with pytest.raises(UsageError, match="op="):
        Ring(op="median")


# Tours.


@given(peers=st.integers(2, 7), seed=st.integers(0, 1000))
@settings(max_examples=40)
def test_a_small_tour_is_the_cheapest(peers: int, seed: int) -> None:
    rates = np.random.default_rng(seed).uniform(5e6, 1e9, (peers, peers))
    cost = link_cost(rates)
    ways = itertools.permutations(range(1, peers))
    least = min(tour_cost(cost, (0, *way)) for way in ways)
    order = Tour().order(cost)
    assert sorted(order) == list(range(peers))
    assert tour_cost(cost, order) == pytest.approx(least, rel=1e-12)


def test_local_search_comes_close_to_the_cheapest_tour() -> None:
    ratios = []
    for seed in range(8):
        cost = link_cost(np.random.default_rng(seed).uniform(5e6, 1e9, (11, 11)))
        exact, searched = Tour(exact=12).order(cost), Tour(exact=4).order(cost)
        assert sorted(searched) == list(range(11))
        ratios.append(tour_cost(cost, searched) / tour_cost(cost, exact))
    assert min(ratios) >= 1 - 1e-12
    assert np.median(ratios) < 1.05


# Groups with a master.


@dataclass(frozen=True)
class Trains:
    """Waits for `peers`, then reduces `rounds` times; keeps what each operation gave."""

    peers: int
    rounds: int = 4
    size: int = 50
    piece_bytes: int = 64
    log: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        try:
            ring = Ring(stall_s=0.5, piece_bytes=self.piece_bytes)
            async with Communicator(peer, 0, ring=ring, master_timeout_s=3.0) as group:
                await self.work(peer, group)
        except CollectiveError as error:
            self.log.append(("left", peer.id, type(error).__name__))

    async def work(self, peer: Any, group: Communicator) -> None:
        while group.everybody < self.peers and peer.now() < 5.0:
            await group.update_topology()
            await peer.sleep_until(peer.now() + 0.1)
        for round in range(self.rounds):
            values = numbers(self.size, peer.id + 10 * round, torch.float32)
            before = values.clone()
            while True:
                try:
                    await group.all_reduce(values)
                    break
                except CollectiveError as error:
                    assert torch.equal(values, before), "an operation that failed left a trace"
                    if not isinstance(error, ConnectionLost):
                        raise
            self.log.append(("done", peer.id, group.committed, values.numpy().tobytes()))
            await peer.sleep_until(peer.now() + 0.2)


def run_group(program: Any, peers: int, faults: tuple[Any, ...] = (), seed: int = 0) -> Any:
    links = Links(latency_s=0.01, uplink_bytes_per_s=1e6)
    return simulate(
        lambda peer: Master(end_s=100.0) if peer == 0 else program,
        Network(peers + 1, links=links, faults=faults), seed=seed, settings=STRICT,
    )  # fmt: skip


def check_parity(log: list[Any]) -> dict[int, int]:
    """Every operation that completed has one result, a sum over some of the peers."""
    count: dict[int, int] = {}
    for number in sorted({entry[2] for entry in log if entry[0] == "done"}):
        results = {entry[3] for entry in log if entry[0] == "done" and entry[2] == number}
        assert len(results) == 1, f"operation {number}: {len(results)} results"
        count[number] = sum(entry[0] == "done" and entry[2] == number for entry in log)
    return count


def test_an_undisturbed_group_reduces_and_ends() -> None:
    program = Trains(4)
    assert run_group(program, 4).finished
    assert check_parity(program.log) == dict.fromkeys(range(1, 5), 4)


@pytest.mark.parametrize("fault", [Crash(who=(2,), at=0.72), Partition(who=(3,), at=0.735)])
def test_survivors_of_a_loss_in_mid_reduce_hold_the_same_sum_in_under_a_second(
    fault: Any,
) -> None:
    program = Trains(4, size=20_000, piece_bytes=4096)
    run = run_group(program, 4, (fault,))
    assert run.finished
    count = check_parity(program.log)
    lost = fault.who[0]
    assert all(
        sum(e[0] == "done" and e[1] == p for e in program.log) == 4
        for p in range(1, 5)
        if p != lost
    )
    assert min(count.values()) == 3
    last = max(e[2:] for e in program.log if e[0] == "done")[1]
    want = sum(numbers(20_000, p + 30, torch.float32).double() for p in range(1, 5) if p != lost)
    assert np.allclose(np.frombuffer(last, np.float32), want.numpy(), atol=1e-4)


def fault_list(seed: int) -> tuple[Any, ...]:
    """One to four faults on one to three of the peers 1 to 5, within the first three seconds."""

    def draw(*key: int | str) -> float:
        return keyed.uniform(seed, *key)

    made = []
    for k in range(1 + int(4 * draw("faults"))):
        order = sorted(range(1, 6), key=lambda peer: draw("who", k, peer))
        who = tuple(order[: 1 + int(3 * draw("victims", k))])
        at = 0.0 if draw("at once", k) < 0.2 else round(3 * draw("at", k), 3)
        end = round(at + 0.05 + 2.5 * draw("until", k), 3)
        until = end if draw("ends", k) < 0.5 else None
        made.append(
            (
                Crash(who=who, at=at, until=until),
                Partition(who=who, at=at, until=until),
                Partition(who=who, at=at, until=until, one_way=True),
                Loss(who=who, at=at, until=end, probability=0.3),
                Hold(who=who, at=at, until=end),
                Slow(who=who, at=at, until=end),
            )[int(6 * draw("kind", k))]
        )
    return tuple(made)


def test_who_comes_back_when_all_is_done_is_told_that_it_is_not_in_the_group() -> None:
    program = Trains(5, rounds=3)
    assert run_group(program, 5, (Crash(who=(1, 3), at=0.0, until=5.029),), 1084).finished
    assert {("left", 1, "TooFewPeers"), ("left", 3, "TooFewPeers")} <= set(program.log)
    check_parity(program.log)


@pytest.mark.parametrize("block", range(4))
def test_no_fault_list_makes_a_group_hang_or_differ(block: int) -> None:
    disturbed = 0
    for seed in range(50 * block, 50 * block + 50):
        program = Trains(5, rounds=3)
        run = run_group(program, 5, fault_list(seed), seed)
        assert run.finished, f"seed {seed} hangs"
        check_parity(program.log)
        disturbed += sum(entry[0] == "done" for entry in program.log) != 15
    assert disturbed >= 10, "the faults hit nothing"


@dataclass(frozen=True)
class Misuses:
    """What a program can do wrong, and what it is told."""

    told: dict[int, list[str]] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        told = self.told.setdefault(peer.id, [])
        async with Communicator(peer, 0) as group:
            while group.everybody < 3:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            values = torch.ones(8)
            running = group.all_reduce_async(values, tag=7)
            await peer.sleep_until(peer.now() + 0.005)
            with pytest.raises(PendingOperations, match="tag=7"):
                await group.all_reduce(values, tag=7)
            with pytest.raises(PendingOperations, match="in flight"):
                await group.update_topology()
            await running.join()
            assert values[0] == 3.0
            try:
                await group.all_reduce(torch.ones(peer.id))
            except Mismatch:
                told.append("mismatch")
            many = [torch.full((40,), float(i)) for i in range(6)]
            await group.all_reduce_multiple_with_retry(many, "avg", max_in_flight=3)
            assert all(torch.equal(t, torch.full((40,), float(i))) for i, t in enumerate(many))
            assert await group.are_peers_pending() is False
            told.append(f"{group.world_size} {sorted(group.ring)}")


def test_misuse_gives_typed_errors_and_leaves_the_group_whole() -> None:
    program = Misuses()
    assert run_group(program, 3).finished
    assert program.told == {p: ["mismatch", "3 [1, 2, 3]"] for p in (1, 2, 3)}


@dataclass(frozen=True)
class Syncs:
    """Two synchronisations; peer 3 comes with other content, peer 4 jumps a revision."""

    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        async with Communicator(peer, 0, ring=Ring(piece_bytes=64)) as group:
            while group.everybody < 4:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            value = 9.0 if peer.id == 3 else 1.0
            state = SharedState({"a": torch.full((100,), value), "b": torch.zeros(3)})
            await group.sync_shared_state(state)
            assert torch.equal(state.tensors["a"], torch.ones(100))
            state.tensors["b"] += 1.0 if peer.id != 1 else 2.0
            state.revision += 2 if peer.id == 4 else 1
            try:
                await group.sync_shared_state(state)
            except RevisionViolation:
                self.end[peer.id] = "excluded"
                return
            self.end[peer.id] = (state.revision, state.tensors["b"].tolist())


def test_shared_state_goes_by_popularity_and_a_jumped_revision_is_excluded() -> None:
    program = Syncs()
    assert run_group(program, 4).finished
    agreed = (1, [1.0] * 3)
    assert program.end == {1: agreed, 2: agreed, 3: agreed, 4: "excluded"}


@dataclass(frozen=True)
class Alone:
    """A group of one."""

    told: list[str] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        async with Communicator(peer, 0) as group:
            await group.update_topology()
            with pytest.raises(TooFewPeers):
                await group.all_reduce_with_retry(torch.ones(3))
            self.told.append("few")


def test_one_peer_is_too_few() -> None:
    program = Alone()
    assert run_group(program, 1).finished
    assert program.told == ["few"]
    assert issubclass(TooFewPeers, PeerError)


def test_lateness_of_one_peer_is_patience_with_the_others() -> None:
    """A machine that runs one peer late may run another one late next."""

    def dropped_after(pause_s: float) -> float:
        state = State(Master(timeout_s=0.6), 0.0, lambda name, who: None)
        now, number = 0.0, 0
        heard_s = {1: 0.0, 2: 0.0}
        while number == 0 or 2 in state.members:
            now += 0.1
            number += 1
            for who in (1, 2):
                silent = (who == 1 and 1.0 < now < 1.0 + pause_s) or (who == 2 and now > 5.0)
                if not silent:
                    call = "update_topology" if number == 1 else ""
                    state.heard(who, Status(1, number, 0, call, 1, b"", (), False), now)
                    heard_s[who] = now
            state.tick(now, 0.0)
            list(state.rulings())
            assert now < 30.0
        return now - heard_s[2]

    calm, held_up = dropped_after(0.0), dropped_after(0.5)
    assert calm <= 0.8
    # Three times half a second, of which a fifth is forgotten by then.
    assert 1.4 <= held_up <= 2.2
