"""The hash table as a whole: searches against brute force, departures, silence, hostile nodes."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import pytest
from dht_program import (
    SHORT,
    Table,
    at,
    in_phase,
    key_of,
    nothing_is_invented,
    value_of,
    what_is_stored_is_found_after_faults,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ProgramError, UsageError
from shoal.base.ids import PeerId
from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Peer
from shoal.lab.explore import Trial, explore, generate
from shoal.parts.overlay import kademlia
from shoal.parts.overlay.kademlia import Kademlia, KademliaSettings, Stored
from shoal.parts.overlay.lookup import Find, Found
from shoal.parts.overlay.records import Copy, Record, sealed
from shoal.parts.overlay.routing_table import number_of, number_of_peer
from shoal.wire.identity import Identity
from shoal.wire.message import message
from shoal.world.faults import KINDS, Crash, Partition, Skew
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

WIDE = Links(latency_s=0.05, latency_spread=0.5)


@message
class Go:
    """Now."""


@dataclass(frozen=True)
class Each:
    """Every peer joins, then runs its coroutine function; node 0 is everybody's contact."""

    body: Callable[[Any, Kademlia], Awaitable[None]]
    settings: KademliaSettings = field(default_factory=lambda: KademliaSettings(k=8))
    end_s: float = 20.0
    signed: bool = False

    async def run(self, peer: Peer) -> None:
        keys: dict[str, Any] = {}
        if self.signed:
            keys = {"identity": identity_of(peer.id), "key_of": lambda p: identity_of(p).public}
        dht = Kademlia(peer, self.settings, **keys)
        async with peer.tasks() as group:
            dht.start(group)
            await dht.join([PeerId(0)] if peer.id else [], deadline=3.0)
            await peer.sleep_until(3.0)
            await self.body(peer, dht)
            await peer.sleep_until(self.end_s)
            dht.stop()


def identity_of(peer: int) -> Identity:
    return Identity.from_seed(peer.to_bytes(32, "big"))


def values(run: Run, name: str) -> list[float]:
    return [row.value for row in run.series(name)]


# A static network.


@pytest.mark.parametrize(("peers", "k"), [(3, 20), (60, 8), (150, 20)])
def test_a_search_returns_the_true_k_closest(peers: int, k: int) -> None:
    """Against brute force over all nodes."""

    async def body(peer: Peer, dht: Kademlia) -> None:
        for turn in range(3):
            await peer.sleep_until(5.0 + 2 * turn)
            number = number_of(f"{peer.id % 10} {turn}".encode())
            found = await dht.closest(number, deadline=peer.now() + 5.0)
            true = sorted(range(peers), key=lambda p: number_of_peer(p) ^ number)[:k]
            peer.record("right", float(found == true))

    run = simulate(Each(body, KademliaSettings(k=k)), Network(peers, links=WIDE))
    assert values(run, "right") == [1.0] * (3 * peers)


@given(seed=st.integers(0, 1 << 20), peers=st.integers(2, 25), k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_values_are_where_they_belong(seed: int, peers: int, k: int) -> None:
    """With any k: a value lies with the k closest nodes, and everybody finds it."""
    where: dict[int, bool] = {}

    async def body(peer: Peer, dht: Kademlia) -> None:
        if peer.id == 0:
            await dht.put(b"key", b"value", deadline=6.0)
        await peer.sleep_until(7.0)
        place = kademlia._place(b"value", b"key")
        where[peer.id] = bool(dht.held.under(place, now_s=7.0))
        await peer.sleep_until(7.5)
        found = await dht.get(b"key", deadline=10.0)
        peer.record("found", float(found.newest == b"value"))

    run = simulate(
        Each(body, KademliaSettings(k=k), end_s=12.0), Network(peers, links=WIDE), seed=seed
    )
    number = kademlia._number(kademlia._place(b"value", b"key"))
    closest = sorted(range(peers), key=lambda p: number_of_peer(p) ^ number)
    holders = {peer for peer, holds in where.items() if holds}
    assert values(run, "found") == [1.0] * peers
    # With buckets of a few contacts a search may miss a node; most are right, and none is far off.
    assert len(holders) == min(k, peers)
    assert holders <= set(closest[: 2 * k + 2])


def test_one_value_per_peer_under_a_shared_key_and_the_newest_first() -> None:
    async def body(peer: Peer, dht: Kademlia) -> None:
        await peer.sleep_until(4.0 + peer.id)
        if peer.id < 3:
            await dht.put(b"shared", b"first of %d" % peer.id, deadline=9.0)
        if peer.id == 1:
            await peer.sleep_until(8.0)
            await dht.put(b"shared", b"second of 1", deadline=10.0)
        await peer.sleep_until(15.0)
        found = await dht.get(b"shared", deadline=18.0, holders=3)
        peer.record("right", float(list(found.values.items()) == [
            (1, b"second of 1"), (2, b"first of 2"), (0, b"first of 0"),
        ]))  # fmt: skip

    run = simulate(Each(body), Network(12, links=WIDE))
    assert values(run, "right") == [1.0] * 12


def test_records_expire_and_provider_records_are_renewed() -> None:
    short = replace(SHORT, lifetime_s=4.0)

    async def body(peer: Peer, dht: Kademlia) -> None:
        if peer.id == 1:
            await dht.put(b"value", b"v", deadline=5.0)
            await dht.provide(b"block", deadline=5.0)
        if peer.id == 2:
            await dht.provide(b"block", deadline=5.0)
        for at_s in (6.0, 12.0, 22.0):
            await peer.sleep_until(at_s)
            peer.record(f"value {at_s:g}", len((await dht.get(b"value", deadline=at_s + 1)).values))
            found = await dht.providers(b"block", deadline=at_s + 1, holders=3)
            peer.record(f"providers {at_s:g}", sum(10**p for p in found))
            if peer.id == 1 and at_s == 12.0:
                dht.withdraw(b"block")

    run = simulate(Each(body, short, end_s=24.0), Network(10, links=WIDE))
    assert set(values(run, "value 6")) == {1.0}
    assert set(values(run, "value 12")) == {0.0}
    assert set(values(run, "providers 6")) == set(values(run, "providers 12")) == {110.0}
    assert set(values(run, "providers 22")) == {100.0}


@pytest.mark.parametrize("offset_s", [-30.0, 0.0, 30.0])
def test_what_the_owner_s_clock_shows_does_not_matter(offset_s: float) -> None:
    """It lasts for its lifetime everywhere, and readers learn how old it is."""
    longer = replace(SHORT, lifetime_s=60.0)

    async def body(peer: Peer, dht: Kademlia) -> None:
        if peer.id == 1:
            # By no clock of its own.
            await peer.recv(Go, deadline=float("inf"))
            peer.record("kept", await dht.put(b"k", b"v", deadline=peer.now() + 2, lifetime_s=6.0))
            return
        if peer.id == 0:
            await peer.sleep_until(4.0)
            await peer.send(PeerId(1), Go())
        for at_s in (7.0, 9.0, 12.0):
            await peer.sleep_until(at_s + 0.1 * peer.uniform("look"))
            found = await dht.get(b"k", deadline=peer.now() + 1.0)
            peer.record(f"found {at_s:g}", float(found.newest == b"v"))
            if found and not dht.held.under(kademlia._place(b"value", b"k"), now_s=peer.now()):
                age_s = found.age_s[PeerId(1)]
                assert abs(age_s - (peer.now() - 4.2)) < 0.6, age_s

    faults = (Skew(who=(1,), at=3.5, until=None, offset_s=offset_s, drift=0.0),)
    run = simulate(Each(body, longer, end_s=16.0), Network(10, links=WIDE, faults=faults))
    assert values(run, "kept")[0] >= 5
    assert values(run, "found 7") == values(run, "found 9") == [1.0] * 9
    assert values(run, "found 12") == [0.0] * 9


def test_a_record_that_ended_long_ago_is_not_brought_back() -> None:
    """Who kept one stores it again and again; signed as it is, it ends a lifetime later at most."""
    quick = replace(SHORT, lifetime_s=4.0)
    old = sealed(kademlia._place(b"value", b"k"), 1, 3 * 10**9, 2.0, b"old", identity_of(1))

    async def body(peer: Peer, dht: Kademlia) -> None:
        while peer.now() < 14.0:
            if peer.id == 2:
                again = kademlia.Store(kademlia._place(b"value", b"k"), (Copy(old, 2.0),), False)
                for other in peer.roster:
                    if other != peer.id:
                        await peer.send(other, again)
            await peer.sleep_until(peer.now() + 0.5)
            if peer.id == 3:
                found = await dht.get(b"k", deadline=peer.now() + 1.0)
                peer.record("found", float(bool(found)), at=f"{peer.now():.2f}")

    run = simulate(Each(body, quick, signed=True), Network(6, links=WIDE))
    rows = [(float(dict(row.labels)["at"]), row.value) for row in run.series("found")]
    assert any(value for at_s, value in rows if at_s < 5.0)
    # Written at 3 s for 2 s, taken until 4 s after its end, kept for 2 s after that.
    assert [value for at_s, value in rows if at_s > 11.5] == [0.0] * sum(a > 11.5 for a, _ in rows)


def test_a_search_leaves_a_copy_on_its_way() -> None:
    """Kademlia's cache: the closest node without the value gets one, for a short time."""
    copies: list[int] = []

    async def body(peer: Peer, dht: Kademlia) -> None:
        if peer.id == 0:
            await dht.put(b"hot", b"v", deadline=5.0)
        place = kademlia._place(b"value", b"hot")
        await peer.sleep_until(6.0)
        before = bool(dht.held.under(place, now_s=peer.now()))
        await peer.sleep_until(6.5)
        if peer.id % 4 == 0:
            assert (await dht.get(b"hot", deadline=8.0)).newest == b"v"
        await peer.sleep_until(8.0)
        cached = bool(dht.held.under(place, now_s=peer.now())) and not before
        await peer.sleep_until(12.0)
        copies.append(cached)
        peer.record("left", float(cached and bool(dht.held.under(place, now_s=peer.now()))))

    simulated = simulate(Each(body, KademliaSettings(k=2, cache_s=2.0)), Network(80, links=WIDE))
    assert sum(copies) >= 1
    assert sum(values(simulated, "left")) == 0


# Departures and silence: the figures of the specification, at a fast suite's size.


def departure(peers: int) -> Run:
    """A fifth of the peers stop at once; 300 searches, or all others' at a smaller size."""
    searching = tuple(p for p in range(peers) if p % 5)[:300]
    program = Table(
        peers, get_at_s=(20.0, 40.0), getters=searching, gap_s=10.0 / peers, join_gap_s=4.0 / peers
    )
    gone = Crash(who=tuple(range(0, peers, 5)), at=4.0 + 39.0)
    return simulate(program, Network(peers, links=WIDE, faults=(gone,)))


def check_departure(run: Run, searches: int) -> None:
    assert nothing_is_invented(run) is None
    for phase, least in ((0, 0.99), (1, 0.95)):
        found, hops = in_phase(run, "found", phase), in_phase(run, "hops", phase)
        assert len(found) == searches
        assert sum(found) / searches >= least
        assert median(hops) <= 4
        assert at(hops, 0.95) <= 6


def test_values_are_found_after_a_fifth_of_the_peers_left() -> None:
    check_departure(departure(120), 96)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_values_are_found_after_a_fifth_of_a_thousand_peers_left() -> None:
    check_departure(departure(1000), 300)


def test_half_of_the_peers_silent_costs_a_few_round_trips() -> None:
    """No search waits for the full timeout of a silent node."""
    peers = 120
    half = tuple(range(0, peers, 2))
    program = Table(
        peers, get_at_s=(20.0, 40.0), getters=tuple(range(1, peers, 2)), searches=2,
        gap_s=0.1, join_gap_s=4.0 / peers,
    )  # fmt: skip
    silence = Partition(who=half, at=4.0 + 39.0)
    run = simulate(program, Network(peers, links=WIDE, faults=(silence,)))
    found, times = in_phase(run, "found", 1), in_phase(run, "get_s", 1)
    assert len(found) == peers
    assert sum(found) / len(found) >= 0.99
    # A round trip takes 0.1 s at the median here, the timeout of a query 2 s.
    assert at(times, 0.95) <= 1.0


def test_a_partition_that_heals_is_forgotten() -> None:
    """Both halves went on alone; afterwards every value is found from everywhere."""
    program = Table(20, settings=SHORT, put_at_s=6.0, get_at_s=(8.0, 25.0), searches=4, gap_s=0.01)
    cut = Partition(who=tuple(range(8)), at=3.0, until=14.0)
    run = simulate(program, Network(20, links=WIDE, faults=(cut,)))
    assert min(in_phase(run, "found", 0)) == 0.0
    assert what_is_stored_is_found_after_faults(run) is None
    assert nothing_is_invented(run) is None


FUZZED = Table(
    6, settings=replace(SHORT, k=4, refresh_s=3.0, republish_s=3.0), put_at_s=0.5,
    get_at_s=(4.0, 20.0), searches=2, gap_s=0.01, timeout_s=3.0,
)  # fmt: skip
NEAR = Network(6, links=Links(latency_s=0.02))


def mended(fault: Any, window_s: float) -> Any:
    """The same fault with an end, after which the network is whole again."""
    if fault.kind == "join" or fault.until is not None:
        return fault
    return replace(fault, until=fault.at + window_s / 2)


def test_100_fault_lists_neither_invent_nor_lose_values() -> None:
    """Faults act during the first seconds; what was stored is found once they are over."""
    kinds = tuple(kind for kind in KINDS if kind != "leave")
    trial = Trial(
        lambda: FUZZED, NEAR, horizon_s=300.0,
        invariants=(nothing_is_invented, what_is_stored_is_found_after_faults),
    )  # fmt: skip
    happened = 0
    for seed in range(100):
        faults = tuple(mended(fault, 6.0) for fault in generate(seed, 6, window_s=6.0, kinds=kinds))
        run, problem = trial.run(seed, faults, seed % 10 == 0)
        assert problem == "", (seed, faults, problem)
        assert run is not None
        happened += min(in_phase(run, "found", 0), default=1.0) == 0.0
    # The faults are no formality: in many runs something was not found while they lasted.
    assert happened >= 10


def test_faults_without_an_end_invent_nothing_and_hang_nobody() -> None:
    found = explore(
        lambda: FUZZED, NEAR, seeds=30, horizon_s=300.0, invariants=(nothing_is_invented,),
        window_s=6.0,
    )  # fmt: skip
    assert found.failures == (), found.to_json()
    assert set(found.kinds) == set(KINDS)


# Hostile nodes.


def test_hostile_answers_do_no_harm() -> None:
    """A fifth of the nodes name strangers, themselves or thousands, forge, or answer nonsense."""

    async def body(peer: Peer, dht: Kademlia) -> None:
        if peer.id % 5 == 1:

            async def lies(envelope: Any) -> Any:
                turn = int(peer.uniform(envelope.source, len(dht.table)) * 5)
                number = envelope.message.number
                forged = sealed(number, 3, 1 << 62, 60.0, b"forged", identity_of(peer.id))
                return (
                    Found((10_000, -1, 1 << 62, peer.id), ()),
                    Found(tuple(range(60)) * 50, ()),
                    Found((peer.id,) * 300, (Copy(forged, 60.0),)),
                    Found((envelope.source,), (Copy(Record(1 << 63, 0, 9.0, b"", b""), 9.0),) * 20),
                    Stored(1),
                )[turn]

            peer.serve(Find, lies)
        await peer.sleep_until(3.5)
        if peer.id % 5 == 0:
            await dht.put(key_of(peer.id), value_of(peer.id), deadline=8.0)
        await peer.sleep_until(9.0)
        if peer.id % 5 != 1:
            number = peer.choice(range(0, 60, 5), "number")
            found = await dht.get(key_of(number), deadline=14.0)
            peer.record("right", float(found.values == {number: value_of(number)}))
            peer.record("queries", found.queries)

    run = simulate(Each(body, signed=True), Network(60, links=WIDE))
    right = values(run, "right")
    assert len(right) == 48
    assert sum(right) / len(right) >= 0.95
    # A flood of names is cut to k, so that it sends nobody around the network.
    assert max(values(run, "queries")) <= 40


def test_questions_out_of_form_are_refused_and_harm_nobody() -> None:
    async def body(peer: Peer, dht: Kademlia) -> None:
        if peer.id == 1:
            for question in (
                Find(b"", True), Find(b"x" * 33, False), kademlia.Store(b"", (), False),
            ):  # fmt: skip
                await peer.send(PeerId(0), question)
                assert await dht.ask(PeerId(0), question) is None
            big = sealed(bytes(32), 1, 1, 100.0, b"v" * 100_000)
            good = sealed(bytes(32), 1, 1, 100.0, b"v")
            bad = [Copy(good, left_s) for left_s in (0.0, -1.0, 101.0, math.nan, math.inf)]
            bad += [
                Copy(sealed(bytes(32), 1, 1, lifetime_s, b"v"), 1.0)
                for lifetime_s in (0.0, -1.0, 1e9, math.nan, math.inf)
            ]
            store = kademlia.Store(bytes(32), (Copy(big, 100.0), *bad), False)
            peer.record("stored", (await dht.ask(PeerId(0), store)).records)
            peer.record("alive", float(isinstance(await dht.ask(PeerId(0), kademlia.Ping()),
                                                  kademlia.Pong)))  # fmt: skip

    run = simulate(Each(body, end_s=6.0), Network(3, links=WIDE), settings=EventSettings())
    assert values(run, "stored") == [0.0]
    assert values(run, "alive") == [1.0]


def test_the_wire_carries_every_message() -> None:
    """Encoded and decoded, as on sockets; and two runs are the same."""
    program = Table(12, settings=SHORT, put_at_s=1.0, get_at_s=(3.0,))
    runs = [
        simulate(program, Network(12, links=WIDE), settings=EventSettings(strict=strict))
        for strict in (True, False)
    ]
    assert runs[0].trace_digest == runs[1].trace_digest
    assert in_phase(runs[0], "found", 0) == [1.0] * 12


def test_misuse_is_told() -> None:
    async def body(peer: Peer, dht: Kademlia) -> None:
        for wrong in (
            dht.put(b"k", b"v" * 70_000, deadline=5.0),
            dht.put(b"k", b"v", deadline=5.0, lifetime_s=1e9),
            dht.get(b"k", deadline=5.0, holders=0),
        ):
            with pytest.raises(UsageError, match=r"put|get"):
                await wrong
        with pytest.raises(ProgramError, match="start"):
            await Kademlia(peer).get(b"k", deadline=5.0)
        with pytest.raises(UsageError, match="key_of"):
            Kademlia(peer, identity=identity_of(1))

    simulate(Each(body, end_s=4.0), Network(1))
    with pytest.raises(UsageError, match="alpha=0"):
        KademliaSettings(alpha=0)
    with pytest.raises(UsageError, match="republish_s"):
        KademliaSettings(lifetime_s=10.0)
