"""A hub that swaps keys, tells clients different things or replays old words; frames of rubbish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_secure_aggregation import PLAIN, WORLD, fine, sources

from shoal.base.errors import PeerError
from shoal.base.ids import PeerId
from shoal.engine.event import simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.kernel.peer import Peer
from shoal.lab.launch import program_of
from shoal.parts.privacy import _masked_wire as wire
from shoal.parts.privacy._secure_client import Client
from shoal.parts.privacy._secure_hub import Hub
from shoal.parts.privacy.masked_hub import MaskedHub
from shoal.parts.privacy.masked_peer import MaskedPeer
from shoal.parts.privacy.sealed_shares import SEALED_BYTES
from shoal.parts.privacy.secure_rounds import SecureRounds
from shoal.parts.privacy.signed_round import Roster, SignedRound, bitmap, chosen_of
from shoal.systems.privacy.secure_aggregation import SecureAggregation
from shoal.wire.message import Packed
from shoal.world.network import Network
from shoal.world.record import Run

ROUNDS = 2
SMALL = WORLD.with_settings({"rounds": ROUNDS})
CLIENTS = range(1, 8)
Change = Callable[[PeerId, Any], Any]


@dataclass(frozen=True, eq=False)
class Changed(SecureRounds):
    """One peer's words are changed before they go out; None: not sent."""

    liar: int = 0
    make: Callable[[SecureRounds], Change] = lambda _: lambda _to, message: message

    async def run(self, peer: Peer) -> None:
        if peer.id == self.liar:
            peer = _Changed(peer, self.make(self))  # type: ignore[assignment]
        await super().run(peer)


class _Changed:
    def __init__(self, peer: Peer, change: Change) -> None:
        self.peer, self.change = peer, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peer, name)

    async def send(self, to: PeerId, message: Any) -> None:
        changed = self.change(to, message)
        if changed is not None:
            await self.peer.send(to, changed)


def world(**settings: Any) -> tuple[SecureRounds, Network]:
    found = program_of(SecureAggregation(strategy=PLAIN, audit=True, **settings), SMALL, 3)
    assert isinstance(found[0], SecureRounds)
    return found


def changed(make: Callable[[SecureRounds], Change], liar: int = 0, **settings: Any) -> Run:
    program, network = world(**settings)
    found = simulate(
        Changed(program.method, program.masking, liar=liar, make=make), network, seed=3
    )
    assert found.finished
    return found


def reasons(found: Run, name: str, round: int) -> dict[int, str]:
    """Why each peer refused, or gave up, a round."""
    return {
        row.peer: dict(row.labels)["why"]
        for row in found.series(name) if int(row.value) == round
    }  # fmt: skip


def entries_of(book: wire.Book) -> dict[int, bytes]:
    size = wire.entry_bytes(signs=True)
    if len(book.keys) % size:
        size = wire.entry_bytes(signs=False)
    found = wire.apart(book.peers, book.keys, size)
    assert found is not None
    return found


def with_entry(book: wire.Book, peer: int, entry: bytes) -> wire.Book:
    return wire.Book(book.round, *wire.together({**entries_of(book), peer: entry}))


# Keys.


def own_keys(signed: bool) -> Callable[[SecureRounds], Change]:
    """The hub takes the place of peer 2: its own keys, with its own signature or peer 2's."""

    def make(program: SecureRounds) -> Change:
        def change(to: PeerId, message: Any) -> Any:
            if not isinstance(message, wire.Book) or 2 not in message.peers:
                return message
            graph = program.graph(message.round)
            fake = MaskedPeer(2, graph.neighbors(2), graph.threshold, message.round, b"h" * 32)
            keys = b"".join(fake.advert)
            signature = entries_of(message)[2][len(keys) :]
            if signed:
                rounds = SignedRound(program.roster, graph, message.round, 0, bytes(32))
                signature = rounds.sign_keys(fake.advert)
            return with_entry(message, 2, keys + signature)

        return change

    return make


@pytest.mark.parametrize("signed", [False, True])
def test_keys_that_the_hub_swaps_are_refused(signed: bool) -> None:
    found = changed(own_keys(signed))
    program, _ = world()
    for round in range(ROUNDS):
        near = program.graph(round).neighbors(2)
        why = reasons(found, "gave_up", round)
        assert set(near) <= set(why)
        for peer in near:
            assert f"passed on for peer 2 are not what it signed for round {round}" in why[peer]
            assert (round, peer) not in {(row.round, row.peer) for row in found.series("masked")}
    assert not found.series("summed")


def test_keys_can_be_signed_for_a_hub_that_only_looks() -> None:
    found = changed(own_keys(True), lying=False, signing=True)
    why = reasons(found, "gave_up", 0)
    program, _ = world(lying=False, signing=True)
    for peer in program.graph(0).neighbors(2):
        assert "passed on for peer 2 are not what it signed" in why[peer]
    calm = changed(lambda _: lambda _to, message: message, lying=False, signing=True)
    fine(calm)
    assert "Question" in calm.bytes_by_kind
    assert not {"Standing", "Agreed"} & set(calm.bytes_by_kind)


def test_unsigned_keys_can_be_swapped_unseen() -> None:
    """The negative control: in the mode of a hub that only looks nobody notices, and the hub reads
    the shares that are meant for peer 2."""
    got: list[bool] = []

    def make(program: SecureRounds) -> Change:
        swap = own_keys(False)(program)

        def change(to: PeerId, message: Any) -> Any:
            if isinstance(message, wire.Dealt) and to == 2:
                graph = program.graph(message.round)
                fake = MaskedPeer(2, graph.neighbors(2), graph.threshold, message.round, b"h" * 32)
                fake.shares(books[message.round])
                sealed_shares = wire.apart(message.peers, message.sealed, SEALED_BYTES)
                fake.masks(sealed_shares or {})
                got.append(not fake.bad)
            if isinstance(message, wire.Book) and to == 2:
                read = {j: wire.advert_of(entry) for j, entry in entries_of(message).items()}
                books[message.round] = {j: pair[0] for j, pair in read.items() if pair}
            return swap(to, message)

        books: dict[int, Any] = {}
        return change

    found = changed(make, lying=False)
    assert got == [True] * ROUNDS
    assert not found.series("gave_up")


@pytest.mark.parametrize("way", ["of the round before", "of another session"])
def test_keys_that_are_replayed_are_refused(way: str) -> None:
    def make(program: SecureRounds) -> Change:
        old: dict[int, bytes] = {}

        def change(to: PeerId, message: Any) -> Any:
            if not isinstance(message, wire.Book) or 2 not in message.peers:
                return message
            graph = program.graph(message.round)
            entry = old.get(message.round - 1, entries_of(message)[2])
            old[message.round] = entries_of(message)[2]
            if way == "of another session":
                other = MaskedPeer(2, graph.neighbors(2), graph.threshold, message.round, b"o" * 32)
                roster = Roster.of_run(3, "last week")
                before = SignedRound(roster, graph, message.round, 2, bytes(32))
                entry = b"".join((*other.advert, before.sign_keys(other.advert)))
            return with_entry(message, 2, entry)

        return change

    found = changed(make)
    program, _ = world()
    assert bool(reasons(found, "gave_up", 0)) == (way == "of another session")
    for round in range(1, ROUNDS):
        why = reasons(found, "gave_up", round)
        for peer in program.graph(round).neighbors(2):
            assert f"passed on for peer 2 are not what it signed for round {round}" in why[peer]


def test_a_client_that_signs_no_keys_is_left_out_and_nobody_else() -> None:
    def make(program: SecureRounds) -> Change:
        def change(to: PeerId, message: Any) -> Any:
            if isinstance(message, wire.Advertise):
                return replace_keys(message, message.keys[:-1] + bytes([message.keys[-1] ^ 1]))
            return message

        return change

    found = changed(make, liar=3)
    fine(found)
    assert [set(who) for who in sources(found).values()] == [{1, 2, 4, 5, 6, 7}] * ROUNDS


def replace_keys(message: wire.Advertise, keys: bytes) -> wire.Advertise:
    return wire.Advertise(message.round, keys)


# Survivors.


@dataclass(frozen=True, eq=False)
class TwoFaced(SecureRounds):
    """A hub that tells half of the clients that one is gone, and the others that another is."""

    async def run(self, peer: Peer) -> None:
        await (_TwoFacedHub(self, peer) if peer.id == self.hub else Client(self, peer)).live()


class _TwoFacedHub(Hub):
    async def _vouched(self, sum_of: MaskedHub, signed: SignedRound) -> wire.Agreed:
        graph, round, peer = sum_of.graph, sum_of.round, self.peer
        gone = [peer for peer in graph.peers if peer not in graph.witnesses][:2]
        faces = [bitmap(graph.peers, sum_of.summed - {one}) for one in gone]
        shown = {witness: place % 2 for place, witness in enumerate(graph.witnesses)}
        for turn in (0, 1):
            for client in sorted(sum_of.summed):
                survivors = faces[(shown.get(client, client % 2) + turn) % 2]
                await peer.send(PeerId(client), wire.Standing(round, survivors))
        patience_s = self.program.masking.phase_s
        heard = await self._gather(wire.Vouched, round, graph.witnesses, patience_s)
        for face, survivors in enumerate(faces):
            signers = {
                witness: told.signature for witness, told in heard.items()
                if signed.vouches(witness, survivors, told.signature)
            }  # fmt: skip
            assert all(shown[witness] == face for witness in signers)
            # What it has, and what it has filled up with signatures of the other set.
            for some in (signers, {w: told.signature for w, told in heard.items()}):
                agreed = wire.Agreed(
                    round, survivors, bitmap(graph.witnesses, some),
                    b"".join(some[witness] for witness in sorted(some)),
                )  # fmt: skip
                for client in sorted(sum_of.summed):
                    await peer.send(PeerId(client), agreed)
        # Whoever would answer has the time to.
        await peer.sleep_until(peer.now() + 4.0)
        raise PeerError("nobody answers to this")


def check_two_faced(found: Run) -> None:
    assert found.finished
    assert not found.series("revealed")
    assert not found.series("summed")
    why = [(row.peer, dict(row.labels)["why"]) for row in found.series("refused")]
    assert {peer for peer, _ in why} == set(CLIENTS)
    told = " ".join(text for _, text in why)
    assert "shown a second set of survivors of round 0; it vouched for another" in told
    assert "did not sign these survivors of round 0" in told
    assert "need 3 witnesses" in told
    assert "without this peer, which sent its vector" in told


def test_a_hub_that_tells_of_different_survivors_opens_nothing() -> None:
    program, network = world()
    check_two_faced(simulate(TwoFaced(program.method, program.masking), network, seed=3))


@pytest.mark.live
def test_over_sockets_a_hub_that_tells_of_different_survivors_opens_nothing() -> None:
    program, network = world()
    method = replace(program.method, rounds=1)
    found = run_live(
        TwoFaced(method, program.masking), network, seed=3, settings=LiveSettings(horizon_s=90.0)
    )
    check_two_faced(found)


@dataclass(frozen=True, eq=False)
class Divided(SecureRounds):
    """A hub that asks each client for as many keys as a question of its own could have."""

    async def run(self, peer: Peer) -> None:
        await (_DividedHub(self, peer) if peer.id == self.hub else Client(self, peer)).live()


class _DividedHub(Hub):
    async def _vouched(self, sum_of: MaskedHub, signed: SignedRound) -> wire.Agreed:
        graph = sum_of.graph
        for client in sorted(sum_of.summed):
            near = graph.neighbors(client)
            keys = len(near) - graph.threshold
            question = wire.Question(sum_of.round, near[keys:], near[:keys])
            await self.peer.send(PeerId(client), question)
        return await super()._vouched(sum_of, signed)


def test_questions_of_single_clients_are_not_answered_to_a_hub_that_may_lie() -> None:
    program, network = world()
    found = simulate(Divided(program.method, program.masking), network, seed=3)
    fine(found)
    assert all(not dict(row.labels)["keys"] for row in found.series("revealed"))


def other_parameters(program: SecureRounds) -> Change:
    def change(to: PeerId, message: Any) -> Any:
        if isinstance(message, wire.Begin) and to == 3 and message.round < ROUNDS:
            return wire.Begin(message.round, message.params * 0.5, message.extra)
        return message

    return change


def test_who_is_sent_other_parameters_answers_nothing() -> None:
    found = changed(other_parameters)
    for round in range(ROUNDS):
        (why,) = reasons(found, "refused", round).items()
        assert why[0] == 3
        assert "together with the parameters that this peer was sent" in why[1]
    assert 3 not in {row.peer for row in found.series("revealed")}
    # The others do not know of it, and their sum is theirs.
    fine(found)


@dataclass(frozen=True, eq=False)
class Late(SecureRounds):
    """The vector of client 3 comes when the sum is closed."""

    async def run(self, peer: Peer) -> None:
        await super().run(_Late(peer) if peer.id == 3 else peer)  # type: ignore[arg-type]


class _Late:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peer, name)

    async def send(self, to: PeerId, message: Any) -> None:
        if isinstance(message, wire.Masked):
            await self.peer.sleep_until(self.peer.now() + 8.3)
        await self.peer.send(to, message)


@pytest.mark.parametrize("lying", [False, True])
def test_of_a_client_that_is_late_the_key_is_opened_and_the_own_mask_is_not(lying: bool) -> None:
    program, network = world(work_s=8.0, phase_s=2.0, lying=lying)
    found = simulate(Late(program.method, program.masking), network, seed=3)
    fine(found)
    assert [set(who) for who in sources(found).values()] == [{1, 2, 4, 5, 6, 7}] * ROUNDS
    told = {"seeds": 0, "keys": 0}
    for row in found.series("revealed"):
        assert row.peer != 3
        for kind in told:
            told[kind] += "3" in dict(row.labels)[kind].split()
    near = sum(len(program.graph(round).neighbors(3)) for round in range(ROUNDS))
    assert told == {"seeds": 0, "keys": near}


# Rubbish.


def rubbish(kind: type, **fields: Any) -> Callable[[SecureRounds], Change]:
    def make(program: SecureRounds) -> Change:
        def change(to: PeerId, message: Any) -> Any:
            if not isinstance(message, kind) or message.round >= ROUNDS:
                return message
            names = message.__struct_fields__
            return kind(**({name: getattr(message, name) for name in names} | fields))

        return change

    return make


FROM_A_CLIENT: dict[str, tuple[type, dict[str, Any]]] = {
    "no keys": (wire.Advertise, {"keys": b""}),
    "keys without a signature": (wire.Advertise, {"keys": b"k" * 96}),
    "keys of low order": (wire.Advertise, {"keys": bytes(160)}),
    "shares for strangers": (wire.Deal, {"peers": (-1, 1 << 62), "sealed": bytes(192)}),
    "shares for one twice": (wire.Deal, {"peers": (2, 2), "sealed": bytes(192)}),
    "no shares": (wire.Deal, {"peers": (), "sealed": b""}),
    "half a vector": (wire.Masked, {"codes": Packed(b"half")}),
    "a vector of nothing": (wire.Masked, {"codes": Packed(b"")}),
    "no signature": (wire.Vouched, {"signature": b""}),
    "a wrong signature": (wire.Vouched, {"signature": bytes(64)}),
    "openings of strangers": (wire.Reveal, {"seeds": (-5,), "keys": (), "shares": bytes(40)}),
    "openings that are short": (wire.Reveal, {"shares": b"short"}),
}


@pytest.mark.parametrize("name", FROM_A_CLIENT)
def test_rubbish_of_a_client_costs_nobody_else_anything(name: str) -> None:
    kind, fields = FROM_A_CLIENT[name]
    found = changed(rubbish(kind, **fields), liar=3)
    fine(found)
    assert not found.series("abandoned")
    inside = kind in (wire.Vouched, wire.Reveal)
    assert [3 in who for who in sources(found).values()] == [inside] * ROUNDS


FROM_THE_HUB: dict[str, tuple[type, dict[str, Any]]] = {
    "parameters of another shape": (wire.Begin, {"params": torch.ones(3)}),
    "extras of nothing": (wire.Begin, {"extra": {"center": torch.ones(3)}}),
    "no keys": (wire.Book, {"peers": (), "keys": b""}),
    "keys of strangers": (wire.Book, {"peers": (-1, 1 << 62), "keys": bytes(320)}),
    "keys that are short": (wire.Book, {"keys": b"short"}),
    "shares of strangers": (wire.Dealt, {"peers": (77,), "sealed": bytes(96)}),
    "shares that are short": (wire.Dealt, {"sealed": b"short"}),
    "survivors of nothing": (wire.Standing, {"survivors": b""}),
    "survivors of more": (wire.Standing, {"survivors": b"\xff"}),
    "nobody agreed": (wire.Agreed, {"witnesses": b"", "signatures": b""}),
    "strangers agreed": (wire.Agreed, {"witnesses": b"\xff\xff"}),
    "agreed on nobody": (wire.Agreed, {"survivors": bytes(1)}),
}


@pytest.mark.parametrize("name", FROM_THE_HUB)
def test_rubbish_of_the_hub_ends_rounds_and_no_client(name: str) -> None:
    kind, fields = FROM_THE_HUB[name]
    found = changed(rubbish(kind, **fields))
    assert not found.series("summed")
    assert not found.series("revealed")
    told = [*found.series("gave_up"), *found.series("refused")]
    if kind is not wire.Begin:
        assert {row.peer for row in told} <= set(CLIENTS)
        assert len(told) >= 4
    assert len(found.series("abandoned")) == ROUNDS


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"survivors": ()}, "has 0 peers"),
        ({"survivors": (2, 2, 2)}, "asked twice"),
        ({"survivors": (-1, 1 << 62)}, "strangers"),
        ({"dropped": (99,)}, "about strangers"),
    ],
)  # fmt: skip
def test_rubbish_questions_are_refused(fields: dict[str, Any], why: str) -> None:
    found = changed(rubbish(wire.Question, **fields), lying=False)
    assert not found.series("revealed")
    told = [dict(row.labels)["why"] for row in found.series("refused")]
    assert len(told) == 7 * ROUNDS
    assert all(why in text for text in told)


def test_bitmaps_are_read_strictly() -> None:
    assert chosen_of((1, 2, 3), b"\x05") == (1, 3)
    assert chosen_of((1, 2, 3), b"\x0d") is None
    assert chosen_of((1, 2, 3), b"\x05\x00") is None
    assert chosen_of((), b"") == ()
