"""The membership view is a CRDT, hash order is fair, samples are the first living peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import DecodeError, Leaving, UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Peer
from shoal.parts.overlay.live_sample import LiveSample, Ping, answer, hash_order, without
from shoal.parts.overlay.membership import Membership
from shoal.parts.overlay.presence import Presence
from shoal.wire.message import Packed, message
from shoal.world.faults import Crash, Join, Leave
from shoal.world.links import Links
from shoal.world.network import Network


@st.composite
def views(draw: Any) -> Membership:
    """Views as they come about: changes and activity of peers with ids from an open network."""
    view = Membership.of(draw(st.sets(st.integers(0, 6), max_size=5)))
    for _ in range(draw(st.integers(0, 6))):
        peer = draw(st.sampled_from([0, 1, 2, 5, 1 << 40, (1 << 63) - 1]))
        if draw(st.booleans()):
            view = view.changed(
                peer, counter=draw(st.integers(0, 4)), joined=draw(st.booleans()),
                round=draw(st.integers(0, 30)),
            )  # fmt: skip
        else:
            view = view.seen([peer], draw(st.integers(0, 30)))
    return view


@given(a=views(), b=views(), c=views())
@settings(max_examples=300, deadline=None)
def test_merge_is_commutative_associative_idempotent(
    a: Membership, b: Membership, c: Membership
) -> None:
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a
    # What was known stays known: merging never takes anything back.
    assert a.merge(b).merge(a) == a.merge(b)


@given(a=views(), b=views())
@settings(max_examples=200, deadline=None)
def test_merge_is_the_larger_of_each(a: Membership, b: Membership) -> None:
    """Against a plain dictionary."""

    def table(view: Membership) -> dict[int, tuple[int, int]]:
        rows = zip(view.ids.tolist(), view.active.tolist(), view.entry.tolist(), strict=True)
        return {peer: (active, entry) for peer, active, entry in rows}

    both, one, other = table(a.merge(b)), table(a), table(b)
    assert set(both) == set(one) | set(other)
    for peer, row in both.items():
        sides = [side[peer] for side in (one, other) if peer in side]
        assert row == tuple(map(max, zip(*sides, strict=True)))


@given(view=views(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_view_survives_the_wire_and_damage_is_found(view: Membership, data: Any) -> None:
    packed = view.pack()
    assert len(packed) == view.byte_count() == 4 + 16 * len(view)
    assert Membership.unpack(packed) == view
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    damaged = bytearray(packed)
    damaged[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(DecodeError):
        Membership.unpack(damaged)
    with pytest.raises(DecodeError):
        Membership.unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


def test_who_is_a_candidate() -> None:
    view = Membership.of(range(4)).seen([0, 1, 99], 10).seen([1], 7)
    assert view.candidates(10, 5).tolist() == [0, 1]
    assert view.candidates(10, 10).tolist() == [0, 1, 2, 3]
    left = view.changed(1, counter=1, joined=False, round=11)
    assert left.candidates(11, 5).tolist() == [0]
    assert left.changed(1, counter=0, joined=True, round=30).candidates(30, 100).tolist() == [
        0,
        2,
        3,
    ]
    back = left.changed(1, counter=2, joined=True, round=12)
    assert back.candidates(12, 5).tolist() == [0, 1]
    assert back.state_of(1) == (2, True)
    assert back.state_of(77) is None
    assert 99 not in view
    with pytest.raises(UsageError, match="counter=-1"):
        view.changed(1, counter=-1, joined=True, round=0)


@given(ids=st.sets(st.integers(0, (1 << 63) - 1), max_size=40), round=st.integers(0, 1 << 40))
@settings(max_examples=100, deadline=None)
def test_equal_views_give_equal_orders(ids: set[int], round: int) -> None:
    known = np.array(sorted(ids), np.int64)
    order = hash_order(known, "sample", round)
    assert sorted(order.tolist()) == known.tolist()
    assert order.tolist() == hash_order(known.copy(), "sample", round).tolist()
    # A peer less does not change the order of the others.
    if ids:
        missing = known[known != known[0]]
        assert hash_order(missing, "sample", round).tolist() == without(order, {int(known[0])})


def test_every_peer_is_drawn_equally_often() -> None:
    """s / n of the rounds within 4 sigma, for every one of 100 peers at once."""
    peers, size, rounds = 100, 10, 3000
    known = np.arange(peers)
    counts = np.zeros(peers)
    pairs = 0
    last: set[int] = set()
    for round in range(rounds):
        drawn = hash_order(known, "sample", round)[:size]
        counts[drawn] += 1
        pairs += len(last & set(drawn.tolist()))
        last = set(drawn.tolist())
    share = size / peers
    sigma = (rounds * share * (1 - share)) ** 0.5
    assert np.abs(counts - rounds * share).max() <= 4 * sigma
    # Consecutive samples are independent: they share size^2 / peers on average.
    assert abs(pairs / rounds - size * size / peers) < 4 * (0.9 * 0.9 / rounds) ** 0.5 + 0.01


@message
class Stop:
    pass


@dataclass(frozen=True)
class Asks:
    """Peer 0 samples; the others answer until told to stop. `found` is for the test to read."""

    count: int
    sampler: LiveSample = field(default_factory=LiveSample)
    found: list[Any] = field(default_factory=list)

    async def run(self, peer: Peer) -> None:
        if peer.id == 0:
            await peer.sleep_until(1.0)
            order = hash_order(np.arange(len(peer.roster)), "sample", 7).tolist()
            self.found.append(
                await self.sampler(peer, order, self.count, number=1, round=3, counter=0)
            )
            for other in peer.roster[1:]:
                await peer.send(other, Stop())
            return
        async with peer.tasks() as group:
            handle = group.start(self.pongs(peer))
            await peer.recv(Stop, deadline=500.0)
            handle.cancel()

    async def pongs(self, peer: Peer) -> None:
        while (ping := await peer.recv(Ping, deadline=500.0)) is not None:
            await answer(peer, ping.source, ping.message, round=peer.id, counter=2)


def asked(count: int, dead: int, peers: int = 40, most: int = 32) -> tuple[Any, list[int], Any]:
    program = Asks(count, LiveSample(timeout_s=5.0, most=most))
    gone = [int(p) for p in hash_order(np.arange(1, peers), "sample", 7)][:dead]
    faults = (Crash(who=tuple(gone), at=0.5),) if gone else ()
    run = simulate(
        program, Network(peers, links=Links(latency_s=0.05), faults=faults), seed=1,
        settings=EventSettings(strict=True),
    )  # fmt: skip
    order = hash_order(np.arange(peers), "sample", 7).tolist()
    alive = [p for p in order if p not in gone]
    return program.found[0], alive, run


def test_a_sample_is_the_first_living_in_hash_order() -> None:
    found, alive, run = asked(10, 0)
    assert list(found.live) == alive[:10]
    assert found.waves == 1
    assert found.waited_s == pytest.approx(0.1)
    pings = 10 - (0 in alive[:10])
    assert run.bytes_by_kind["Ping"] == run.bytes_by_kind["Pong"] == pings * 40
    assert {peer: pong.round for peer, pong in found.pongs.items()} == {
        peer: peer for peer in found.live if peer != 0
    }


def test_misses_are_replaced_by_twice_four_times_as_many() -> None:
    """The first 13 are dead: 4 asked, then 8, then 16; two timeouts instead of 13."""
    found, alive, _ = asked(4, 13)
    assert list(found.live) == alive[:4]
    assert found.waves == 3
    # The last wave holds a dead peer as well, so it is waited for.
    assert 10.0 < found.waited_s <= 15.1
    slow, _, _ = asked(4, 13, most=1)
    assert list(slow.live) == alive[:4]
    assert slow.waves > 3


def test_too_few_living_give_a_shorter_sample() -> None:
    found, alive, _ = asked(10, 35)
    assert list(found.live) == alive
    assert len(found.live) == 5
    alone, _, _ = asked(3, 0, peers=1)
    assert alone.live == (0,)
    assert alone.waited_s == 0.0


def test_sampler_settings() -> None:
    with pytest.raises(UsageError, match="timeout_s=0"):
        LiveSample(timeout_s=0.0)
    with pytest.raises(UsageError, match="most=0"):
        LiveSample(most=0)


@dataclass(frozen=True)
class Meets:
    """Everybody keeps a presence; peers beyond `founders` advertise. `seen` is read by the test."""

    founders: int
    seen: dict[int, Presence] = field(default_factory=dict)

    async def run(self, peer: Peer) -> None:
        known = Presence(
            peer, peer.roster[: self.founders], sampler=LiveSample(), inactivity_rounds=20,
            rounds=100, end_s=50.0,
        )  # fmt: skip
        self.seen[peer.id] = known
        async with peer.tasks() as group:
            handles = [group.start(known.answer_pings()), group.start(known.take_changes())]
            try:
                if not known.founder:
                    known.counter += 1
                    await known.advertise(True, 10)
                await peer.sleep_until(40.0)
            except Leaving:
                known.counter += 1
                await known.advertise(False, 10)
            for handle in handles:
                handle.cancel()


def test_joiners_wait_for_the_next_round_and_leavers_go_at_once() -> None:
    program = Meets(4)
    faults = (Join(who=(4,), at=5.0), Leave(who=(1,), at=6.0))
    run = simulate(program, Network(5, links=Links(latency_s=0.01), faults=faults), seed=2)
    known = program.seen[2]
    assert 4 not in known.view
    assert known.view.state_of(1) == (1, False)
    assert [row.value for row in run.series("met", 2)] == [4.0]
    known.learn(3)
    assert known.view.state_of(4) == (1, True)
    assert 4 in known.order(3)
    assert 1 not in known.order(3)
    known.learn(1)
    known.learn(100)
    assert known.round == 3


def test_a_view_that_counted_further_is_overtaken() -> None:
    """A peer that lost its store finds its own old entry and goes beyond it."""
    program = Meets(3)
    simulate(program, Network(3, links=Links(latency_s=0.01)), seed=2)
    known = program.seen[0]
    old = Membership.of(range(3)).changed(0, counter=5, joined=False, round=2)
    assert known.read(Packed(old))
    assert known.view.state_of(0) == (6, True)
    damaged = bytearray(old.pack())
    damaged[3] ^= 1
    before = known.view
    assert not known.read(Packed(bytes(damaged)))
    assert known.view is before
