"""Who signed what: keys for one round and peer, one set of survivors; rosters in folders."""

from __future__ import annotations

import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked_sum import codes_of

from shoal.base.errors import PeerError, UsageError
from shoal.parts.privacy.mask_graph import Assumed, MaskGraph
from shoal.parts.privacy.mask_stream import add_masks
from shoal.parts.privacy.masked_hub import MaskedHub
from shoal.parts.privacy.masked_peer import Advert, MaskedPeer
from shoal.parts.privacy.masked_sum import MaskedSum
from shoal.parts.privacy.signed_round import Roster, SignedRound, bitmap, told
from shoal.wire.identity import SIGNATURE_BYTES, Identity

GRAPH = MaskGraph.of(range(1, 20), Assumed(), 4)
ROSTER = Roster.of_run(4)
TOLD = told(torch.arange(3.0), {})


def rounds(round: int = 2, roster: Roster = ROSTER, said: bytes = TOLD) -> dict[int, SignedRound]:
    return {me: SignedRound(roster, GRAPH, round, me, said) for me in GRAPH.peers}


def advert_of(me: int, round: int = 2) -> Advert:
    graph = GRAPH
    return MaskedPeer(me, graph.neighbors(me), graph.threshold, round, bytes([me]) * 32).advert


# Keys.


def test_keys_hold_for_their_peer_round_and_session_alone() -> None:
    advert, everybody = advert_of(3), rounds()
    signature = everybody[3].sign_keys(advert)
    assert all(each.keys_hold(3, advert, signature) for each in everybody.values())
    other = advert._replace(commitment=bytes(32))
    reader = everybody[1]
    assert not reader.keys_hold(3, other, signature)
    assert not reader.keys_hold(4, advert, signature)
    assert not reader.keys_hold(3, advert, everybody[4].sign_keys(advert))
    assert not reader.keys_hold(99, advert, b"")
    assert not rounds(3)[1].keys_hold(3, advert, signature)
    assert not rounds(roster=Roster.of_run(4, "again"))[1].keys_hold(3, advert, signature)
    assert not rounds(roster=Roster.of_run(5))[1].keys_hold(3, advert, signature)
    # The mask key and the sealing key are not interchangeable.
    swapped = Advert(advert.seal, advert.mask, advert.commitment)
    assert not reader.keys_hold(3, swapped, signature)
    reader.check_keys({3: advert}, {3: signature})
    with pytest.raises(PeerError, match="passed on for peer 3 are not what it signed for round 2"):
        reader.check_keys({3: other}, {3: signature})


def test_a_public_key_that_another_repeats_makes_another_mask() -> None:
    """Or its masks with a third would be the first one's, and cancel between the two."""
    graph = MaskGraph(tuple(range(6)), degree=5, threshold=3, key=(1,))
    peers = {me: MaskedSum(graph, 24).peer(me) for me in graph.peers}
    adverts = {me: peer.advert for me, peer in peers.items()}
    adverts[4] = adverts[4]._replace(mask=adverts[0].mask)
    book = {j: adverts[j] for j in graph.neighbors(2)}
    peers[2].shares(book)
    masks = peers[2].masks({j: bytes(96) for j in graph.neighbors(2)})
    secrets = [secret for secret, _ in masks]
    assert len(set(secrets)) == len(secrets) == 6
    # What is left of peer 2's vector when all masks but those with 0 and 4 are known.
    view = add_masks(torch.full((1 << 12,), 5), (masks[1], masks[4]), 24)
    assert not torch.equal(view, torch.full((1 << 12,), 5))


# Survivors.


def test_the_set_that_enough_witnesses_signed_is_accepted() -> None:
    everybody, threshold = rounds(), GRAPH.threshold
    there = set(GRAPH.peers) - {7}
    survivors = bitmap(GRAPH.peers, there)
    witnesses = [peer for peer in GRAPH.witnesses if peer in there]
    signatures = {peer: everybody[peer].vouch(survivors) for peer in witnesses}
    assert everybody[witnesses[0]].vouch(survivors) == signatures[witnesses[0]]
    first = witnesses[:threshold]
    marks = bitmap(GRAPH.witnesses, first)
    signed = b"".join(signatures[peer] for peer in first)
    for me in there:
        assert everybody[me].agreed(survivors, marks, signed) == there
    with pytest.raises(PeerError, match="without this peer, which sent its vector"):
        everybody[7].agreed(survivors, marks, signed)
    me = everybody[min(there)]
    few = bitmap(GRAPH.witnesses, first[1:])
    with pytest.raises(PeerError, match=f"need {threshold} witnesses"):
        me.agreed(survivors, few, signed[SIGNATURE_BYTES:])
    with pytest.raises(PeerError, match=f"need {threshold} witnesses"):
        me.agreed(survivors, marks, signed + bytes(SIGNATURE_BYTES))
    with pytest.raises(PeerError, match="malformed"):
        me.agreed(survivors + b"\0", marks, signed)
    wrong = bytes(SIGNATURE_BYTES) + signed[SIGNATURE_BYTES:]
    with pytest.raises(PeerError, match=f"witness {first[0]} did not sign"):
        me.agreed(survivors, marks, wrong)
    other = bitmap(GRAPH.peers, GRAPH.peers)
    fresh = SignedRound(ROSTER, GRAPH, 2, min(there), TOLD)
    with pytest.raises(PeerError, match="did not sign these survivors of round 2"):
        fresh.agreed(other, marks, signed)
    for changed in (
        SignedRound(ROSTER, GRAPH, 3, min(there), TOLD),
        SignedRound(ROSTER, GRAPH, 2, min(there), told(torch.ones(3), {})),
        SignedRound(Roster.of_run(4, "again"), GRAPH, 2, min(there), TOLD),
    ):
        with pytest.raises(PeerError, match="did not sign these survivors"):
            changed.agreed(survivors, marks, signed)


def test_a_witness_vouches_once_and_answers_for_nothing_else() -> None:
    (witness,) = GRAPH.witnesses[:1]
    own = rounds()[witness]
    all_there, less = bitmap(GRAPH.peers, GRAPH.peers), set(GRAPH.peers)
    less.remove(next(peer for peer in GRAPH.peers if peer != witness))
    own.vouch(all_there)
    with pytest.raises(PeerError, match="a second set of survivors of round 2"):
        own.vouch(bitmap(GRAPH.peers, less))
    with pytest.raises(PeerError, match="a second set of survivors of round 2"):
        own.agreed(bitmap(GRAPH.peers, less), b"", b"")
    with pytest.raises(PeerError, match="without this peer"):
        rounds()[witness].vouch(bitmap(GRAPH.peers, set(GRAPH.peers) - {witness}))
    strangers = set(GRAPH.peers) - set(GRAPH.witnesses)
    assert len(strangers) == 19 - GRAPH.degree
    for peer in strangers:
        with pytest.raises(PeerError, match="is no witness"):
            rounds()[peer].vouch(all_there)


@given(peers=st.integers(8, 120), word=st.integers(0, 10**6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_two_sets_have_enough_witnesses(peers: int, word: int, data: st.DataObject) -> None:
    """Corrupt ones sign both, each honest one either."""
    assumed = Assumed()
    graph = MaskGraph.of(range(peers), assumed, word)
    corrupt, _ = assumed.gone(peers)
    liars = set(range(corrupt)) & set(graph.witnesses)
    honest = len(graph.witnesses) - len(liars)
    one = data.draw(st.integers(0, honest))
    assert min(one, honest - one) + len(liars) < graph.threshold
    assert len(graph.witnesses) == graph.degree
    assert set(graph.witnesses) <= set(graph.peers)


def divided(graph: MaskGraph, corrupt: set[int]) -> tuple[dict[int, set[int]], set[int]]:
    """Which keys a hub asks each honest holder for, so that it opens as many as it can; the honest
    clients whose keys it does not get. Corrupt holders give it all that they have."""
    honest = [peer for peer in graph.peers if peer not in corrupt]
    asked = {holder: set[int]() for holder in honest}
    left = set(honest)

    def willing(peer: int) -> list[int]:
        most = graph.degree - graph.threshold
        return [j for j in graph.neighbors(peer) if j in asked and len(asked[j]) < most]

    def needed(peer: int) -> int:
        return graph.threshold - len(corrupt & set(graph.neighbors(peer)))

    while able := [peer for peer in left if len(willing(peer)) >= needed(peer)]:
        peer = min(able, key=lambda p: (needed(p), len(willing(p)) - needed(p), p))
        left.remove(peer)
        for holder in sorted(willing(peer), key=lambda j: len(asked[j]))[: needed(peer)]:
            asked[holder].add(peer)
    return asked, left


def test_without_one_set_for_all_a_hub_that_lies_opens_a_sum_of_fewer() -> None:
    """What the witnesses are for. Each holder gives one secret of each neighbour, and is named
    enough survivors, and still the hub and 2 corrupt clients learn the sum of 4 of 8 honest ones.
    With one set for all it would be 5 or more."""
    assumed = Assumed()
    graph = MaskGraph.of(range(10), assumed, 0)
    corrupt = {0, 1}
    asked, left = divided(graph, corrupt)
    assert len(left) == 4
    assert assumed.needed(10).honest == 5
    process, codes = MaskedSum(graph, 24), codes_of(10, 4)
    peers = {me: process.peer(me) for me in graph.peers}
    hub = MaskedHub(graph, 0, 4, 24)
    for me in graph.peers:
        hub.take_advert(me, peers[me].advert)
    for me in graph.peers:
        hub.take_shares(me, peers[me].shares(hub.book(me)))
    for me in graph.peers:
        row = add_masks(codes[me], peers[me].masks(hub.inbox(me)), 24)
        if me in left | corrupt:
            hub.take_vector(me, row)
    for me, own in peers.items():
        near = graph.neighbors(me)
        gone = asked[me] & set(near) if me in asked else set(near) - left - corrupt
        survivors = [j for j in near if j not in gone]
        if me in corrupt:
            # It tells the hub whatever it holds.
            held = own._held
            assert held is not None
            hub._asked[me] = (tuple(survivors), tuple(sorted(gone)))
            seeds, keys = {j: held[j][0] for j in survivors}, {j: held[j][1] for j in gone}
        else:
            seeds, keys = own.reveal(survivors, sorted(gone))
        for owner, share in seeds.items():
            hub._revealed.setdefault((owner, "seed"), {})[me] = share
        for owner, share in keys.items():
            hub._revealed.setdefault((owner, "key"), {})[me] = share
    total = add_masks(hub.total, hub.masks(), 24)
    known = codes[sorted(corrupt)].sum(0)
    assert torch.equal(total - known, codes[sorted(left)].sum(0))


@pytest.mark.parametrize("peers", [7, 19, 30, 100])
def test_how_many_honest_clients_are_in_any_sum(peers: int) -> None:
    """`threshold` neighbours in the set, all but the corrupt honest, and the client itself."""
    assumed = Assumed()
    needed = assumed.needed(peers)
    corrupt, _ = assumed.gone(peers)
    assert needed.honest >= needed.threshold - corrupt + 1 >= 2
    for word in range(40):
        graph = MaskGraph.of(range(peers), assumed, word)
        worst = max(
            len(set(graph.neighbors(peer)) & set(range(corrupt)))
            for peer in range(corrupt, peers)
        )  # fmt: skip
        assert graph.threshold - worst + 1 >= needed.honest


def test_what_was_told_is_told_apart() -> None:
    base = torch.arange(4.0)
    given_ = {"a": torch.ones(2), "b": torch.zeros(2)}
    same = told(base.clone(), dict(reversed(given_.items())))
    assert told(base, given_) == same
    others = [
        told(base.double(), given_), told(base.reshape(2, 2), given_), told(base, {}),
        told(base, {"a": given_["a"]}), told(base, {"a": given_["b"], "b": given_["a"]}),
        told(base + 1, given_), told(base, {"ab": given_["a"], "b": given_["b"]}),
    ]  # fmt: skip
    assert len({same, *others}) == 8


# Rosters.


def test_rosters_of_runs_follow_from_seed_and_session() -> None:
    one, again, other = Roster.of_run(3), Roster.of_run(3), Roster.of_run(4)
    assert one.session == again.session
    assert len({one.session, other.session, Roster.of_run(3, "b").session}) == 3
    keys = [roster.key_of(peer) for roster, peer in product((one, other), range(9))]
    assert len(set(keys)) == 18
    assert again.key_of(5) == keys[5]
    away = pickle.loads(pickle.dumps(one))
    assert (away.session, away.key_of(5)) == (one.session, keys[5])


def test_a_folder_says_who_is_who(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    Roster.write(folder, 3)
    roster = Roster.of_folder(folder, 3, seed=1)
    assert [roster.identity_of(peer).public for peer in range(3)] == [
        roster.key_of(peer) for peer in range(3)
    ]
    assert roster.key_of(3) is None
    assert roster.key_of(-1) is None
    before = (folder / "roster.txt").read_text()
    Roster.write(folder, 3)
    assert (folder / "roster.txt").read_text() == before, "keys that are there are kept"
    # Elsewhere there is the own key alone.
    (folder / "peer-2.key").unlink()
    assert Roster.of_folder(folder, 3, seed=1).identity_of(1) == roster.identity_of(1)
    with pytest.raises(UsageError, match=r"peer-2.key: No such file"):
        Roster.of_folder(folder, 3, seed=1).identity_of(2)
    Identity.new().save(folder / "peer-2.key")
    with pytest.raises(UsageError, match=r"is not what .* says of peer 2"):
        Roster.of_folder(folder, 3, seed=1).identity_of(2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda lines: lines[:2], "2 keys for 3 peers"),
        (lambda lines: [lines[0], lines[0], lines[2]], "that no other peer has"),
        (lambda lines: [lines[0][:-2], *lines[1:]], "for peer 0; need a public key of 64"),
        (lambda lines: ["no key", *lines[1:]], "'no key' for peer 0"),
    ],
)
def test_a_roster_that_says_something_else_is_refused(tmp_path: Path, change, what: str) -> None:
    Roster.write(tmp_path, 3)
    path = tmp_path / "roster.txt"
    lines = [line.partition(" ")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(change(lines)))
    with pytest.raises(UsageError, match=what):
        Roster.of_folder(tmp_path, 3, seed=1)
    path.unlink()
    with pytest.raises(UsageError, match=r"roster .*roster.txt: .*No such file"):
        Roster.of_folder(tmp_path, 3, seed=1)


def test_bits_of_survivors_are_in_the_order_of_peers() -> None:
    peers = tuple(range(3, 40, 3))
    flags = np.array([peer % 2 for peer in peers], np.uint8)
    chosen = {peer for peer in peers if peer % 2}
    assert bitmap(peers, chosen) == np.packbits(flags, bitorder="little").tobytes()
