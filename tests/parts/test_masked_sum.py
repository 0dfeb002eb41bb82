"""Masked sums: exact whoever drops out, uniform to who lacks a mask, and nothing told twice."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shoal.base.errors import DecodeError, PeerError, UsageError
from shoal.parts.privacy import _masked_wire as wire
from shoal.parts.privacy.mask_graph import Assumed, MaskGraph, log2_closed, log2_cut
from shoal.parts.privacy.mask_stream import PIECE_BYTES, add_mask, add_masks, stream
from shoal.parts.privacy.masked_hub import MaskedHub
from shoal.parts.privacy.masked_peer import Advert, MaskedPeer
from shoal.parts.privacy.masked_sum import PHASES, MaskedSum, gone_by_key
from shoal.parts.privacy.prime_field import PRIME
from shoal.parts.privacy.sealed_shares import (
    SEALED_BYTES,
    SHARE_BYTES,
    Seal,
    elements_of,
    secret_of,
    share_bytes,
    share_of,
    uniform_elements,
)
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.parts.privacy.share_correction import corrected
from shoal.tensor import keyed
from shoal.wire.message import Packed

SMALL = MaskGraph(tuple(range(6)), degree=5, threshold=3, key=(1,))


def codes_of(peers: int, entries: int, *words: int, below: int = 1 << 16) -> torch.Tensor:
    key = keyed.key_of(3, "codes", *words)
    return keyed.grid(keyed.grid(key, peers), entries).remainder(below)


# The graph.


@given(
    peers=st.sets(st.integers(0, 10_000), min_size=4, max_size=60), half=st.integers(1, 12),
    word=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_everybody_has_as_many_neighbours_and_is_one_of_theirs(
    peers: set[int], half: int, word: int
) -> None:
    who = tuple(sorted(peers))
    degree = min(2 * half, len(who) - 1)
    graph = MaskGraph(who, degree, 2, (word, "graph"))
    for peer in who:
        near = graph.neighbors(peer)
        assert len(near) == degree
        assert list(near) == sorted(set(near) - {peer})
        assert all(peer in graph.neighbors(other) for other in near)
    assert MaskGraph(who, degree, 2, (word, "graph")).neighbors(who[0]) == graph.neighbors(who[0])
    if degree < len(who) - 1 and len(who) > 12:
        others = [MaskGraph(who, degree, 2, (word, i)).neighbors(who[0]) for i in range(8)]
        assert len(set(others)) > 1


PUBLISHED = [
    (100, 0.45, 0.45, False, 92), (1_000, 0.45, 0.45, False, 822), (100, 0.33, 0.33, False, 68),
    (1_000, 0.33, 0.33, False, 286), (10_000, 0.33, 0.33, False, 422),
    (1_000_000, 0.33, 0.33, False, 518), (100, 0.3, 0.3, True, 92), (1_000, 0.3, 0.3, True, 872),
    (100, 0.05, 0.33, False, 28), (1_000, 0.05, 0.33, False, 72), (100_000, 0.05, 0.33, False, 96),
    (100, 0.05, 0.33, True, 72), (1_000, 0.05, 0.33, True, 398), (10_000, 0.05, 0.33, True, 746),
    (100, 0.33, 0.05, False, 34), (1_000, 0.33, 0.05, True, 132),
]  # fmt: skip
"""Degrees that the published implementation of the protocol tests for, at sigma 40 and eta 20."""


@pytest.mark.parametrize(("peers", "corrupt", "dropout", "lying", "degree"), PUBLISHED)
def test_degrees_are_the_published_ones(
    peers: int, corrupt: float, dropout: float, lying: bool, degree: int
) -> None:
    assumed = Assumed(corrupt, dropout, eta=20, lying=lying)
    found = assumed.needed(peers)
    # They draw a peer's neighbours from all peers, itself included, which is a little off.
    assert abs(found.degree - degree) <= 2
    assert log2_cut(assumed, peers, found.degree) <= -41
    assert log2_closed(assumed, peers, found.degree, found.threshold) <= -20
    bad, _ = assumed.gone(peers)
    if found.degree < peers - 1:
        most = 2 * found.threshold - found.degree - 1 if lying else found.threshold - 1
        tail = stats.hypergeom(peers - 1, bad, found.degree).sf(most)
        assert peers * tail <= 2.0**-41


def test_bounds_hold_where_they_can_be_seen() -> None:
    """At chances that are not tiny: random corrupt and dropped peers, many graphs."""
    assumed = Assumed(0.2, 0.2, sigma=4, eta=4, lying=False)
    peers, trials = 60, 400
    needed = assumed.needed(peers)
    bad, gone = assumed.gone(peers)
    assert needed.degree < peers - 1
    leaks = closed = 0
    for trial in range(trials):
        graph = MaskGraph(tuple(range(peers)), needed.degree, needed.threshold, (trial,))
        corrupt, dropped = set(range(bad)), set(range(bad, bad + gone))
        honest = set(range(peers)) - corrupt
        near = {peer: set(graph.neighbors(peer)) for peer in graph.peers}
        leak = any(len(near[p] & corrupt) >= needed.threshold for p in honest)
        left, seen = honest - dropped, set()
        edge = {min(left)}
        while edge:
            seen |= edge
            edge = {q for p in edge for q in near[p] & left} - seen
        leaks += leak or seen != left
        closed += any(len(near[p] - dropped) < needed.threshold for p in graph.peers)
    assert leaks / trials <= 2**-4
    assert closed / trials <= 2**-4


def test_wrong_assumptions_and_graphs_are_refused() -> None:
    with pytest.raises(UsageError, match="no degree keeps both promises"):
        Assumed(0.4, 0.4).needed(20)
    with pytest.raises(UsageError, match="at least 3"):
        Assumed().needed(2)
    with pytest.raises(UsageError, match="leave somebody"):
        Assumed(0.5, 0.5)
    for wrong in ((3, 2), (6, 2), (4, 1), (4, 5)):
        with pytest.raises(UsageError, match="MaskGraph: degree"):
            MaskGraph(tuple(range(6)), *wrong, (1,))
    with pytest.raises(UsageError, match="rising order"):
        MaskGraph((1, 0, 2, 3), 2, 2, (1,))


# Masks.


def test_streams_are_those_of_the_ciphers() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    secret = bytes(range(32))
    blocks = Cipher(algorithms.AES(secret), modes.ECB()).encryptor()
    counted = b"".join(blocks.update(i.to_bytes(16, "big")) for i in range(9))
    assert stream(secret, 9 * 16 - 5) == counted[:-5]
    # RFC 8439, appendix A.1, test vectors 1 and 2.
    assert stream(bytes(32), 80, "chacha20").hex().startswith("76b8e0ada0f13d90405d6ae55386bd28")
    assert stream(bytes(32), 80, "chacha20")[64:].hex() == "9f07e7be5551387a98ba977c732d080d"
    for wrong in (b"", bytes(31)):
        with pytest.raises(UsageError, match="need 32"):
            stream(wrong, 4)
    with pytest.raises(UsageError, match="need 'aes' or 'chacha20'"):
        stream(bytes(32), 4, "rot13")  # type: ignore[arg-type]


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
@pytest.mark.parametrize("cipher", ["aes", "chacha20"])
def test_a_mask_is_the_stream_and_cancels(word: type, cipher: str) -> None:
    size = 2 * PIECE_BYTES // word().itemsize + 37
    total = np.zeros(size, word)
    add_mask(total, bytes(32), 1, cipher)  # type: ignore[arg-type]
    exact = np.frombuffer(stream(bytes(32), total.nbytes, cipher), word)  # type: ignore[arg-type]
    assert (total == exact).all()
    add_mask(total, bytes(32), -1, cipher)  # type: ignore[arg-type]
    assert not total.any()
    with pytest.raises(UsageError, match="need uint32 or uint64"):
        add_mask(np.zeros(3), bytes(32), 1)


def test_masked_numbers_are_uniform_and_independent() -> None:
    view = add_masks(torch.full((1 << 17,), 5), ((b"k" * 32, 1),), 24).numpy()
    other = add_masks(torch.full((1 << 17,), 5), ((b"l" * 32, 1),), 24).numpy()
    assert view.max() < 1 << 24
    for numbers in (view >> 14, view & 1023, other >> 14):
        assert stats.chisquare(np.bincount(numbers, minlength=1024)).pvalue > 1e-3
    both = (view >> 19) * 32 + (other >> 19)
    assert stats.chisquare(np.bincount(both, minlength=1024)).pvalue > 1e-3
    # The test has power: small numbers without a mask, and twice the same mask.
    bare = add_masks(codes_of(1, 1 << 17, below=1 << 20)[0], (), 24).numpy()
    assert stats.chisquare(np.bincount(bare >> 14, minlength=1024)).pvalue < 1e-12
    same = (view >> 19) * 32 + (view >> 19)
    assert stats.chisquare(np.bincount(same, minlength=1024)).pvalue < 1e-12


# Sums.


@given(
    peers=st.integers(4, 12), bits=st.integers(8, 62), entries=st.integers(1, 9),
    seed=st.integers(0, 999), data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_sum_is_exact_whoever_drops_out_when(
    peers: int, bits: int, entries: int, seed: int, data: st.DataObject
) -> None:
    degree = data.draw(st.sampled_from([peers - 1, *range(2, peers - 1, 2)]))
    threshold = data.draw(st.integers(2, degree))
    graph = MaskGraph(tuple(range(3, 3 + peers)), degree, threshold, (seed,))
    gone = data.draw(
        st.dictionaries(st.sampled_from(graph.peers), st.sampled_from(PHASES), max_size=peers)
    )
    codes = codes_of(peers, entries, seed, below=1 << min(bits - 4, 50))
    process = MaskedSum(graph, bits, secret=seed.to_bytes(32, "little"), round=seed)
    left = [p for p in graph.peers if p not in gone]
    try:
        summed = process(codes, gone)
    except PeerError:
        # Somebody had fewer neighbours left than open a secret, or than it goes on with.
        counts = [sum(q in left for q in graph.neighbors(p)) for p in graph.peers]
        assert min(counts) < threshold
        return
    assert list(summed.peers) == [p for p in graph.peers if gone.get(p) not in PHASES[:3]]
    rows = [graph.peers.index(p) for p in summed.peers]
    assert torch.equal(summed.total, codes[rows].sum(0) & ((1 << bits) - 1))


def test_a_fifth_of_a_hundred_may_go() -> None:
    graph = MaskGraph.of(range(100), Assumed(), 5)
    assert graph.degree < 99
    codes = codes_of(100, 300)
    gone = gone_by_key(100, 0.2, 5)
    assert sorted(set(gone.values())) == sorted(PHASES)
    summed = MaskedSum(graph, 24)(codes, gone)
    there = [p for p in range(100) if gone.get(p, "reveal") == "reveal"]
    assert list(summed.peers) == there
    assert len(there) == 85
    assert torch.equal(summed.total, codes[there].sum(0))


def test_the_hub_sees_uniform_vectors() -> None:
    """All that it gets of vectors that hold one number, before anything is opened."""
    codes = torch.full((6, 1 << 15), 77)
    views = MaskedSum(SMALL, 24)(codes, {4: "vector"}).views
    assert sorted(views) == [0, 1, 2, 3, 5]
    for view in views.values():
        assert stats.chisquare(np.bincount(view.numpy() >> 14, minlength=1024)).pvalue > 1e-3
    # Also together: any four of the five, added up, lack a mask.
    for some in combinations(views, 4):
        total = torch.stack([views[p] for p in some]).sum(0) & ((1 << 24) - 1)
        assert stats.chisquare(np.bincount(total.numpy() >> 14, minlength=1024)).pvalue > 1e-3


def test_who_leaves_a_mask_out_spoils_the_sum_and_shows() -> None:
    """The negative control: with a mask left out neither exactness nor uniformity survives."""
    process, codes = MaskedSum(SMALL, 24), torch.full((6, 1 << 15), 77)
    peers = {me: process.peer(me) for me in SMALL.peers}
    hub = MaskedHub(SMALL, 0, 1 << 15, 24)
    for me in SMALL.peers:
        assert hub.take_advert(me, peers[me].advert)
    for me in SMALL.peers:
        assert hub.take_shares(me, peers[me].shares(hub.book(me)))
    for me in SMALL.peers:
        masks = peers[me].masks(hub.inbox(me))
        hub.take_vector(me, add_masks(codes[me], masks[:-1] if me == 2 else masks, 24))
    for me in SMALL.peers:
        hub.take_reveal(me, *peers[me].reveal(*hub.question(me)))
    total = add_masks(hub.total, hub.masks(), 24)
    assert stats.chisquare(np.bincount(total.numpy() >> 14, minlength=1024)).pvalue > 1e-3
    assert not torch.equal(total, codes.sum(0))
    bare = add_masks(codes[0], (), 24).numpy()
    assert stats.chisquare(np.bincount(bare >> 14, minlength=1024)).pvalue < 1e-12


# Shares.


def test_fewer_than_the_threshold_learn_nothing() -> None:
    """The joint law of two colluders' shares, threshold 3, is that of uniform elements whatever
    the secret; three of them open it."""
    scheme, count = Shamir(6, 2), 30_000
    for secret in (0, PRIME - 1):
        drawn = uniform_elements(bytes([secret % 251]) * 32, 2 * count)
        shares = scheme.spread(np.full(count, secret, np.uint64), drawn)
        for one, other in ((0, 1), (2, 5)):
            high = [(shares[h] >> np.uint64(58)).astype(int) for h in (one, other)]
            counts = np.bincount(high[0] * 8 + high[1], minlength=64)
            assert stats.chisquare(counts).pvalue > 1e-4
        assert (scheme.reconstruct(shares[[1, 4, 5]], [1, 4, 5]) == secret).all()
    with pytest.raises(UsageError, match="random elements; need 2"):
        scheme.spread(np.zeros(3, np.uint64), np.zeros(5, np.uint64))


def test_uniform_elements_are_uniform() -> None:
    drawn = uniform_elements(bytes(32), 64_000)
    assert len(drawn) == 64_000
    assert int(drawn.max()) < PRIME
    assert stats.chisquare(np.bincount((drawn >> np.uint64(55)).astype(int))).pvalue > 1e-3


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=30)
def test_secrets_are_elements_and_back(secret: bytes) -> None:
    elements = elements_of(secret)
    assert secret_of(elements) == secret
    assert (share_of(share_bytes(elements)) == elements).all()
    elements[-1] = 1 << 40
    assert secret_of(elements) is None


@given(
    degree=st.integers(0, 6), more=st.integers(0, 9), seed=st.integers(0, 10_000),
    part=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_wrong_shares_are_corrected_and_named(
    degree: int, more: int, seed: int, part: float
) -> None:
    draws = random.Random(seed)
    polynomial = [draws.randrange(PRIME) for _ in range(degree + 1)]
    points = draws.sample(range(1, 40), degree + 1 + more)
    values = [sum(c * pow(x, i, PRIME) for i, c in enumerate(polynomial)) % PRIME for x in points]
    wrong = sorted(draws.sample(range(len(points)), round(part * (more // 2))))
    for place in wrong:
        values[place] = (values[place] + draws.randrange(1, PRIME)) % PRIME
    found = corrected(points, values, degree)
    assert found is not None
    assert (found.secret, found.wrong) == (polynomial[0], tuple(wrong))
    assert corrected(points[:degree], values[:degree], degree) is None


def test_too_many_wrong_shares_give_nothing() -> None:
    points, values = list(range(1, 9)), [(5 + 3 * x) % PRIME for x in range(1, 9)]
    for place in (0, 2, 4, 6):
        values[place] += 1 + place * place
    assert corrected(points, values, 1) is None
    assert corrected([1, 2, 3], [0, 0, 0], 1) == corrected([1, 2], [0, 0], 1)


def test_seals_open_for_their_receiver_in_their_round_alone() -> None:
    seal = Seal(b"k" * 32, 4, 1, 2)
    sealed = seal.seal(b"shares")
    assert Seal(b"k" * 32, 4, 1, 2).open(sealed) == b"shares"
    assert sealed != Seal(b"k" * 32, 4, 2, 1).seal(b"shares")
    damaged = bytes([sealed[0] ^ 1]) + sealed[1:]
    for other, data in (
        (Seal(b"l" * 32, 4, 1, 2), sealed), (Seal(b"k" * 32, 5, 1, 2), sealed),
        (Seal(b"k" * 32, 4, 2, 1), sealed), (seal, damaged), (seal, sealed[:-1]), (seal, b""),
    ):  # fmt: skip
        with pytest.raises(DecodeError, match="not what it sealed"):
            other.open(data)


# Refusals.


def masked(process: MaskedSum | None = None) -> tuple[dict[int, MaskedPeer], MaskedHub]:
    """Six peers that have shared and masked; nothing is opened yet."""
    process = process or MaskedSum(SMALL, 24)
    graph = process.graph
    peers = {me: process.peer(me) for me in graph.peers}
    hub = MaskedHub(graph, 0, 4, 24)
    for me in graph.peers:
        hub.take_advert(me, peers[me].advert)
    for me in graph.peers:
        hub.take_shares(me, peers[me].shares(hub.book(me)))
    for me in graph.peers:
        masks = peers[me].masks(hub.inbox(me))
        if me != 5:
            hub.take_vector(me, add_masks(codes_of(6, 4)[me], masks, 24))
    return peers, hub


def test_both_kinds_of_one_peer_are_refused() -> None:
    peers, _ = masked()
    with pytest.raises(PeerError, match="asked twice about peers \\[3\\]"):
        peers[0].reveal([1, 2, 3], [3, 4])
    # A refused question tells nothing, and so forbids nothing.
    seeds, keys = peers[0].reveal([1, 2, 3], [4])
    assert (sorted(seeds), sorted(keys)) == ([1, 2, 3], [4])
    with pytest.raises(PeerError, match="the key of peer 3 after its seed"):
        peers[0].reveal([1, 2, 5], [3])
    with pytest.raises(PeerError, match="the seed of peer 4 after its key"):
        peers[0].reveal([1, 2, 4], [])
    # The same question again gets the same answer.
    assert peers[0].reveal([1, 2, 3], [4]) == (seeds, keys)


def test_other_questions_that_are_refused() -> None:
    peers, _ = masked()
    with pytest.raises(PeerError, match="the question of round 0 has 2 peers"):
        peers[0].reveal([1, 2], [3, 4, 5])
    with pytest.raises(PeerError, match="strangers \\[9\\]"):
        peers[0].reveal([1, 2, 3, 9], [])
    with pytest.raises(PeerError, match="about strangers, \\[0\\]"):
        peers[0].reveal([1, 2, 3], [0])
    early = MaskedSum(SMALL, 24).peer(0)
    with pytest.raises(PeerError, match="before it masked"):
        early.reveal([1, 2, 3], [])
    with pytest.raises(PeerError, match="a second time"):
        peers[0].masks({})
    with pytest.raises(PeerError, match="the book of round 0 has 2 peers"):
        early.shares({j: peers[j].advert for j in (1, 2)})
    with pytest.raises(UsageError, match="MaskedPeer"):
        MaskedPeer(0, (0, 1, 2), 2, 0, bytes(32))
    low = {j: Advert(bytes(32), peers[j].advert.seal, bytes(32)) for j in (1, 2, 3)}
    early.shares(low)
    with pytest.raises(PeerError, match="low order"):
        early.masks({j: bytes(SEALED_BYTES) for j in low})
    low = {j: Advert(peers[j].advert.mask, bytes(32), bytes(32)) for j in (1, 2, 3)}
    with pytest.raises(PeerError, match="low order"):
        early.shares(low)


def test_a_hub_that_lies_to_some_cannot_collect_both_secrets() -> None:
    """Each honest holder gives one kind: with 2 t > k + corrupt both cannot reach t."""
    for peers in (10, 30, 100):
        assumed = Assumed(0.2, 0.2)
        needed = assumed.needed(peers)
        worst = needed.degree
        most = 2 * needed.threshold - needed.degree - 1
        # `most` corrupt neighbours give both kinds, the others one each.
        assert (worst - most) + 2 * most < 2 * needed.threshold


# What is wrong on its way.


def test_the_hub_passes_over_what_is_malformed_or_repeated() -> None:
    process = MaskedSum(SMALL, 24)
    peers = {me: process.peer(me) for me in SMALL.peers}
    hub = MaskedHub(SMALL, 0, 4, 24)
    fine = peers[0].advert
    for wrong in (fine._replace(mask=fine.mask[:-1]), fine._replace(seal=bytes(32))):
        assert not hub.take_advert(0, wrong)
    assert not hub.take_advert(17, fine)
    assert all(hub.take_advert(me, peers[me].advert) for me in SMALL.peers)
    assert not hub.take_advert(0, peers[1].advert)
    assert hub.adverts[0] == fine
    shares = peers[0].shares(hub.book(0))
    assert not hub.take_shares(0, {**shares, 1: shares[1][:-1]})
    assert not hub.take_shares(0, {j: shares[j] for j in (1, 2)})
    assert not hub.take_vector(0, codes_of(1, 4)[0])
    assert hub.take_shares(0, shares)
    assert not hub.take_shares(0, shares)
    for me in (1, 2, 3, 4):
        hub.take_shares(me, peers[me].shares(hub.book(me)))
    for me in (0, 1, 2, 3):
        assert not hub.take_vector(me, torch.zeros(5, dtype=torch.int64))
        masks = peers[me].masks(hub.inbox(me))
        assert hub.take_vector(me, add_masks(codes_of(6, 4)[me], masks, 24))
        assert not hub.take_vector(me, torch.zeros(4, dtype=torch.int64))
    questions = {me: hub.question(me) for me in (0, 1, 2, 3)}
    assert questions[0] == ((1, 2, 3), (4,))
    assert not hub.take_vector(4, torch.zeros(4, dtype=torch.int64)), "the sum is closed"
    seeds, keys = peers[0].reveal(*questions[0])
    assert not hub.take_reveal(0, {**seeds, 4: seeds[1]}, keys)
    assert not hub.take_reveal(4, seeds, keys)
    assert hub.take_reveal(0, seeds, keys)
    assert hub.take_reveal(0, dict.fromkeys(seeds, bytes(SHARE_BYTES)), keys), "passed over"
    with pytest.raises(PeerError, match="1 shares of the seed of peer 1; need 3"):
        MaskedHub.masks(_only(hub, 1))
    for me in (1, 2, 3):
        hub.take_reveal(me, *peers[me].reveal(*questions[me]))
    total = add_masks(hub.total, hub.masks(), 24)
    assert torch.equal(total, codes_of(6, 4)[:4].sum(0))
    assert not hub.liars


def _only(hub: MaskedHub, owner: int) -> MaskedHub:
    """A hub that has to open one secret."""
    other = MaskedHub(hub.graph, 0, 4, 24)
    other.adverts, other._pieces = hub.adverts, hub._pieces
    other._revealed, other.summed = hub._revealed, {owner}
    return other


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "another value": lambda share: bytes([share[0] ^ 1]) + share[1:],
    "too short": lambda share: share[:-1],
    "too long": lambda share: share + b"\0",
    "no element of the field": lambda share: b"\xff" * 8 + share[8:],
    "nothing": lambda share: b"",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("liars", [1, 3])
def test_holders_that_reveal_wrong_shares(name: str, liars: int) -> None:
    """Of five shares three open: one wrong value is corrected, what is no share counts as absent;
    three wrong ones cost the round, and never give a wrong sum."""
    peers, hub = masked()
    for me in range(5):
        seeds, keys = peers[me].reveal(*hub.question(me))
        if me < liars:
            seeds = {j: WRONG[name](share) for j, share in seeds.items()}
            keys = {j: WRONG[name](share) for j, share in keys.items()}
        hub.take_reveal(me, seeds, keys)
    if liars == 3:
        with pytest.raises(PeerError, match="masked sum: "):
            hub.masks()
        return
    if name == "another value":
        # Four holders answer for each owner here: of four shares, three agree.
        with pytest.raises(PeerError, match="do not open what it advertised"):
            hub.masks()
        return
    total = add_masks(hub.total, hub.masks(), 24)
    assert torch.equal(total, codes_of(6, 4)[:5].sum(0))
    assert hub.liars == {0}


def test_wrong_values_are_corrected_where_there_are_shares_to_spare() -> None:
    graph = MaskGraph(tuple(range(10)), degree=9, threshold=3, key=(1,))
    process = MaskedSum(graph, 24)
    peers = {me: process.peer(me) for me in graph.peers}
    hub = MaskedHub(graph, 0, 4, 24)
    for me in graph.peers:
        hub.take_advert(me, peers[me].advert)
    for me in graph.peers:
        hub.take_shares(me, peers[me].shares(hub.book(me)))
    for me in range(9):
        hub.take_vector(me, add_masks(codes_of(10, 4)[me], peers[me].masks(hub.inbox(me)), 24))
    for me in range(9):
        seeds, keys = peers[me].reveal(*hub.question(me))
        if me in (0, 3):
            seeds = {j: WRONG["another value"](share) for j, share in seeds.items()}
            keys = {j: WRONG["another value"](share) for j, share in keys.items()}
        hub.take_reveal(me, seeds, keys)
    total = add_masks(hub.total, hub.masks(), 24)
    assert torch.equal(total, codes_of(10, 4)[:9].sum(0))
    assert hub.liars == {0, 3}


@pytest.mark.parametrize("way", ["garbage", "swapped", "field"])
def test_a_dealer_of_bad_shares_harms_nobody_while_it_stays(way: str) -> None:
    """Its neighbours cannot open what it sealed: its own secrets are lost, its round is not that
    of the others unless its mask has to be opened."""
    process = MaskedSum(SMALL, 24)
    peers = {me: process.peer(me) for me in SMALL.peers}
    hub = MaskedHub(SMALL, 0, 4, 24)
    for me in SMALL.peers:
        hub.take_advert(me, peers[me].advert)
    for me in SMALL.peers:
        shares = peers[me].shares(hub.book(me))
        if me == 2 and way == "garbage":
            shares = dict.fromkeys(shares, bytes(SEALED_BYTES))
        elif me == 2 and way == "swapped":
            order = sorted(shares)
            shares = {j: shares[i] for j, i in zip(order, order[1:] + order[:1], strict=True)}
        elif me == 2:
            bad = b"\xff" * (2 * SHARE_BYTES)
            seals = {j: peers[2]._seal(hub.adverts[j], 2, j) for j in shares}
            shares = {j: seal.seal(bad) for j, seal in seals.items()}
        assert hub.take_shares(me, shares)
    for me in SMALL.peers:
        masks = peers[me].masks(hub.inbox(me))
        assert peers[me].bad == (() if me == 2 else (2,))
        hub.take_vector(me, add_masks(codes_of(6, 4)[me], masks, 24))
    for me in SMALL.peers:
        hub.take_reveal(me, *peers[me].reveal(*hub.question(me)))
    with pytest.raises(PeerError, match="0 shares of the seed of peer 2"):
        hub.masks()


# On the wire.


@given(bits=st.integers(1, 62), entries=st.integers(1, 40), word=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_travel(bits: int, entries: int, word: int) -> None:
    codes = codes_of(1, entries, word, below=1 << bits)[0]
    row = wire.Row(codes, bits)
    data = row.pack()
    assert len(data) == row.byte_count() == -(-entries * bits // 8)
    found = wire.row_of(Packed(data), entries, bits)
    assert found is not None
    assert torch.equal(found, codes)
    assert wire.row_of(Packed(data + b"\0"), entries, bits) is None
    assert wire.row_of(Packed(row), entries + 1, bits) is None
    if entries * bits % 8:
        assert wire.row_of(Packed(data[:-1] + b"\xff"), entries, bits) is None


def test_pieces_go_together_and_apart() -> None:
    pieces = {5: b"ab", 2: b"cd"}
    peers, data = wire.together(pieces)
    assert (peers, data) == ((2, 5), b"cdab")
    assert wire.apart(peers, data, 2) == pieces
    assert wire.apart(peers, data, 3) is None
    assert wire.apart((2, 2), data, 2) is None
    assert wire.advert_of(bytes(95)) is None
    assert wire.advert_of(bytes(97)) is None
