"""Damage on the way: to pieces, to states, and to what peers and master say; and peers that differ
by mistake, which is no damage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collective_faults import PEERS, RING, Counts, complaint, run_group

from shoal.base.errors import WireError
from shoal.parts.collective._errors import (
    CollectiveError,
    MasterLost,
    Mismatch,
    SyncFailed,
    TooFewPeers,
)
from shoal.parts.collective._wire import Ruling, Status, Vote, Word
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.ring import Ring
from shoal.parts.collective.shared_state import (
    Election,
    Offer,
    SharedState,
    encode_offer,
    read_dissenters,
    read_plan,
)
from shoal.wire import codec
from shoal.world.faults import Corrupt

# Pieces.


@pytest.mark.parametrize("direct_bytes", [0, 1 << 18])
@pytest.mark.parametrize("who", [1, 4])
@pytest.mark.parametrize("probability", [0.03, 0.1, 0.3, 0.7])
def test_who_damages_what_it_sends_costs_the_others_nothing(
    probability: float, who: int, direct_bytes: int
) -> None:
    """Led around, and dropped where that does not help; nobody else is."""
    program = Counts(
        rounds=6, ring=Ring(stall_s=0.5, piece_bytes=64, few=1, checked=True,
                            direct_bytes=direct_bytes),
    )  # fmt: skip
    run = run_group(program, (Corrupt(who=(who,), at=0.5, probability=probability),), timeout_s=3.0)
    assert run.finished
    assert run.virtual_s < 10.0
    assert complaint(program.log) is None
    done = Counter(entry[1] for entry in program.log if entry[0] == "done")
    assert [done[peer] for peer in range(1, PEERS + 1) if peer != who] == [6] * 4
    assert {row.value for row in run.series("dropped")} <= {float(who)}
    if probability >= 0.1:
        assert [row.value for row in run.series("dropped")] == [float(who)]


@pytest.mark.parametrize("probability", [0.03, 0.3, 0.7])
def test_where_all_damage_what_they_send_nobody_hangs_or_is_told_wrong_sums(
    probability: float,
) -> None:
    program = Counts(rounds=6)
    everybody = tuple(range(PEERS + 1))
    run = run_group(program, (Corrupt(who=everybody, at=0.5, probability=probability),))
    assert run.finished
    assert complaint(program.log) is None


@dataclass(frozen=True)
class Fetches:
    """Peers 1 to 4 have the same state, of which peer 5 has nothing yet."""

    end: dict[int, Any] = field(default_factory=dict, compare=False)
    failed: list[int] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        try:
            async with Communicator(peer, 0, ring=RING, fetch_s=0.3) as group:
                await self.work(peer, group)
        except CollectiveError as error:
            self.end[peer.id] = type(error).__name__

    async def work(self, peer: Any, group: Communicator) -> None:
        while group.everybody < PEERS:
            await group.update_topology()
            await peer.sleep_until(peer.now() + 0.1)
        state = SharedState({"w": torch.full((2000,), 7.0)}, 4)
        if peer.id == 5:
            state = SharedState({"w": torch.zeros(2000)}, 0)
        while True:
            before = state.tensors["w"].clone()
            try:
                await group.sync_shared_state(state)
                break
            except SyncFailed:
                assert torch.equal(state.tensors["w"], before)
                self.failed.append(peer.id)
        self.end[peer.id] = (state.revision, set(state.tensors["w"].tolist()))


def test_a_state_that_one_peer_gives_damaged_is_taken_from_another() -> None:
    program = Fetches()
    run = run_group(program, (Corrupt(who=(1,), at=0.1, probability=0.5),), timeout_s=3.0)
    assert run.finished
    assert program.end == dict.fromkeys(range(1, 6), (4, {7.0}))
    assert program.failed.count(5) == 1, "peer 1 was asked first, and only once"


def test_an_election_that_failed_has_others_give() -> None:
    def offer(revision: int, content: bytes) -> bytes:
        keys = (("w", "float", content, False),)
        return encode_offer(Offer("enforce_popular", revision, keys))

    offers = {1: offer(3, b"x"), 2: offer(3, b"x"), 3: offer(0, b"y")}
    election = Election()
    sources = []
    for _ in range(4):
        outcome = election.held(offers)
        sources.append(read_plan(outcome.answers[3][1]).source)
        election = outcome.election.failed()
    assert sources == [1, 2, 1, 2]
    outcome = election.held(offers)
    assert outcome.election.committed() == Election(3)


# Words.


@dataclass(frozen=True)
class Reduces:
    """Reduces again and again; keeps how it ended, and when."""

    peers: int = 3
    until_s: float = 8.0
    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        try:
            async with Communicator(peer, 0, ring=RING, master_timeout_s=1.5) as group:
                while group.everybody < self.peers:
                    await group.update_topology()
                    await peer.sleep_until(peer.now() + 0.1)
                stop = torch.zeros(1, dtype=torch.int64)
                while not stop[0]:
                    values = torch.full((50,), 64**peer.id, dtype=torch.int64)
                    await group.all_reduce_with_retry(values)
                    assert bool((values == values[0]).all())
                    self.end[peer.id] = ("sum", int(values[0]))
                    stop[0] = peer.now() > self.until_s
                    await group.all_reduce_with_retry(stop, "max", tag=1)
                    await peer.sleep_until(peer.now() + 0.05)
        except CollectiveError as error:
            self.end[peer.id] = (type(error).__name__, round(peer.now(), 1))


def test_a_master_whose_words_are_damaged_is_lost_to_all() -> None:
    program = Reduces()
    assert run_group(program, (Corrupt(who=(0,), at=2.0, probability=1.0),), peers=3).finished
    # A flipped bit may hit what nobody reads, so that a word comes through now and then; also one
    # that says that the others have gone, as whoever has lost the master does.
    first, *others = sorted((at_s, why) for why, at_s in program.end.values())
    assert first[1] == MasterLost.__name__
    assert first[0] >= 3.3
    assert others[-1][0] <= 8.0
    assert {why for _, why in others} <= {MasterLost.__name__, TooFewPeers.__name__}


def test_who_cannot_be_understood_by_the_master_finds_none() -> None:
    """Each of its messages is damaged, from the start; the others go on without it."""
    program = Reduces(peers=2, until_s=4.0)
    run = run_group(program, (Corrupt(who=(3,), at=0.0, probability=1.0),), peers=3)
    assert run.finished
    assert program.end[3][0] == MasterLost.__name__
    assert run.virtual_s < 20.0
    assert program.end[1] == program.end[2] == ("sum", 64 + 64**2)


def test_who_is_not_understood_any_more_is_dropped_and_told_so() -> None:
    program = Reduces(until_s=5.0)
    run = run_group(program, (Corrupt(who=(3,), at=2.0, probability=1.0),), peers=3)
    assert run.finished
    assert program.end[3][0] == "Evicted"
    assert program.end[3][1] < 8.0
    assert program.end[1] == program.end[2] == ("sum", 64 + 64**2)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_words_that_are_damaged_now_and_then_are_said_again(probability: float) -> None:
    program = Reduces(until_s=4.0)
    run = run_group(program, (Corrupt(who=(0,), at=0.0, probability=probability),), peers=3)
    assert run.finished
    assert set(program.end.values()) == {("sum", 64 + 64**2 + 64**3)}
    assert not run.series("dropped")


STATUS = Status(
    3, 7, 1, "update_topology", 2, b"detail", (Vote(0, 1, 2, "sum torch.float32", 5, 3, 2, True),),
    False,
)  # fmt: skip
RULING = Ruling(
    3, 8, True, True, 4, (1, 2, 3), 3, 2, "ok", b"detail",
    (Word(0, 1, 5, 2, (1, 2, 3), 4, ((2, "sum torch.int64"),)),),
)  # fmt: skip


@given(which=st.sampled_from([STATUS, RULING]), place=st.integers(0, 10_000))
@settings(max_examples=300)
def test_no_flipped_bit_makes_another_word(which: Any, place: int) -> None:
    frame = bytearray(b"".join(codec.encode(which)))
    assert codec.decode(frame)[0] == which
    bit = place % (8 * len(frame))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        codec.decode(frame)


# Peers that differ by mistake.


@dataclass(frozen=True)
class Differs:
    """Peer 2 comes with `wrong` to a reduction, before and after others that are right."""

    wrong: Any
    before: int = 0
    direct_bytes: int = 1 << 18
    end: dict[int, list[Any]] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        ring = Ring(stall_s=0.5, piece_bytes=64, checked=True, direct_bytes=self.direct_bytes)
        end = self.end.setdefault(peer.id, [])
        async with Communicator(peer, 0, ring=ring) as group:
            while group.everybody < 4:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            for _ in range(self.before):
                await group.all_reduce(torch.ones(60))
            for _ in range(4):
                values = self.wrong.clone() if peer.id == 2 else torch.ones(60)
                before = values.clone()
                try:
                    await group.all_reduce(values)
                except Mismatch as error:
                    assert torch.equal(values, before)
                    end.append((error.peers, str(error)))
            right = torch.ones(60)
            await group.all_reduce(right)
            end.append(float(right[0]))


@pytest.mark.parametrize("direct_bytes", [0, 1 << 18])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (torch.ones(60, dtype=torch.float64), "peer 2 calls 'sum torch.float64 60 "),
        (torch.ones(61), "peer 2 calls 'sum torch.float32 61 "),
    ],
)
def test_who_comes_with_another_dtype_or_size_is_named_and_nobody_is_blamed(
    wrong: torch.Tensor, says: str, before: int, direct_bytes: int
) -> None:
    """Four times, which would be enough strikes to drop somebody."""
    program = Differs(wrong, before, direct_bytes)
    run = run_group(program, peers=4)
    assert run.finished
    for peer in (1, 2, 3, 4):
        *mismatches, last = program.end[peer]
        assert last == 4.0
        assert [who for who, _ in mismatches] == [(2,)] * 4
        assert all(says in text for _, text in mismatches)
    assert not run.series("broken_link")
    assert not run.series("dropped")


def test_a_layout_of_no_majority_names_everybody() -> None:
    def offer(kind: str) -> bytes:
        return encode_offer(Offer("enforce_popular", 0, (("w", kind, b"x", False),)))

    outcome = Election().held({4: offer("a"), 5: offer("b")})
    assert {answer for answer, _ in outcome.answers.values()} == {"mismatch"}
    assert read_dissenters(outcome.answers[4][1]) == (4, 5)
    three = Election().held({4: offer("a"), 5: offer("b"), 6: offer("a")})
    assert read_dissenters(three.answers[6][1]) == (5,)
