"""Secure aggregation: 100 peers with 1,000,000 parameters each, of whom a fifth drops out.

All peers and the hub run one after the other in this process, on their own state and with what they
would send as bytes; what a message costs on its way is not in it. A fifth of the peers is gone
after its shares were dealt, which is the dearest moment: the hub has to take off a mask for each
pair with a peer that is still there. Sums are compared with the sum of what was masked, entry by
entry. The least that a peer can take is the key stream of its masks. Against a hub that lies, keys
and survivors are signed; that is counted by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from shoal.base.stopwatch import Stopwatch
from shoal.lab.bench._row import Note, Row
from shoal.parts.privacy import _masked_wire as wire
from shoal.parts.privacy.mask_graph import Assumed, MaskGraph, log2_closed, log2_cut
from shoal.parts.privacy.mask_stream import PIECE_BYTES, Cipher, add_mask, add_masks, stream
from shoal.parts.privacy.masked_hub import MaskedHub
from shoal.parts.privacy.masked_peer import MaskedPeer
from shoal.parts.privacy.sealed_shares import derived
from shoal.parts.privacy.signed_round import Roster, SignedRound, bitmap, told
from shoal.parts.transform.fixed_point import FixedPoint
from shoal.tensor import keyed
from shoal.wire.codec import encode
from shoal.wire.message import Packed

PEERS, DIM, GONE = 100, 1_000_000, 0.2
LIES = Assumed(corrupt=0.2, dropout=GONE)
LOOKS = Assumed(corrupt=0.2, dropout=GONE, lying=False)


def measure(tiny: bool, note: Note) -> Iterator[Row]:
    peers, dim = (10, 1_000) if tiny else (PEERS, DIM)
    rates = {}
    for cipher in ("aes", "chacha20"):
        note(f"key stream, {cipher}")
        rates[cipher] = _rate(cipher, 1 << 20 if tiny else 1 << 26)
        added = _added_rate(cipher, 1 << 18 if tiny else 1 << 22)
        yield Row.of(f"key stream, {cipher}", rates[cipher], "GB/s")
        yield Row.of(
            f"masks made and added, {cipher}", added, "GB/s",
            against=("key stream alone", rates[cipher]), bound=">= 0.6",
        )  # fmt: skip
    for assumed, hub in ((LIES, "a hub that lies"), (LOOKS, "a hub that looks")):
        yield from _sum(assumed, hub, peers, dim, rates["aes"], note)


def _rate(cipher: Cipher, size: int) -> float:
    """GB/s of bare key stream, in pieces as masks take it."""
    took = []
    for turn in range(5):
        watch = Stopwatch()
        secret = turn.to_bytes(32, "little")
        for _ in range(size // PIECE_BYTES):
            stream(secret, PIECE_BYTES, cipher)
        took.append(watch.cpu_s)
    return size / max(median(took), 1e-9) / 1e9


def _added_rate(cipher: Cipher, entries: int) -> float:
    total, took = np.zeros(entries, np.uint32), []
    for turn in range(9):
        watch = Stopwatch()
        add_mask(total, turn.to_bytes(32, "little"), 1, cipher)
        took.append(watch.cpu_s)
    return total.nbytes / max(median(took), 1e-9) / 1e9


@dataclass
class _Bill:
    """CPU seconds of one peer by what it does, and bytes by direction."""

    keys_s: float = 0.0
    signs_s: float = 0.0
    masks_s: float = 0.0
    opening_s: float = 0.0
    up: int = 0
    down: int = 0


@dataclass
class _Bills:
    peers: list[_Bill] = field(default_factory=list)
    hub_s: float = 0.0

    def of(self, name: str, who: list[int]) -> float:
        return median([float(getattr(self.peers[peer], name)) for peer in who])


def _size(message: object) -> int:
    return sum(len(piece) for piece in encode(message))  # type: ignore[arg-type]


def _sum(
    assumed: Assumed, what: str, peers: int, dim: int, rate: float, note: Note
) -> Iterator[Row]:
    graph = MaskGraph.of(range(peers), assumed, "bench")
    codec = FixedPoint(clients=peers)
    bills, hub = _Bills([_Bill() for _ in graph.peers]), MaskedHub(graph, 0, dim + 1, codec.width)
    order = sorted(graph.peers, key=lambda peer: keyed.fold(torch.tensor(peer), "gone").item())
    gone = set(order[: round(GONE * peers)])
    there = [peer for peer in graph.peers if peer not in gone]
    note(f"{what}: keys and shares of {peers} peers")
    signed = _signed(graph, dim, bills) if assumed.lying else {}
    own = _agree(graph, hub, bills, signed)
    note(f"{what}: {len(there)} masked vectors")
    exact, view = _collect(own, hub, bills, there, codec, dim)
    note(f"{what}: opening")
    if signed:
        _vouch(graph, bills, there, signed)
    total, taken_off, opening_s = _open(own, hub, bills, there, codec.width, not signed)
    k, t = graph.degree, graph.threshold
    corrupt, dropped = assumed.gone(peers)
    yield Row.of(f"{what}: neighbours k ({corrupt} corrupt, {dropped} gone of {peers})", k, "")
    yield Row.of(f"{what}: threshold t, shares that open a secret", t, "")
    yield Row.of(
        f"{what}: chance that the honest are cut apart", 2.0 ** log2_cut(assumed, peers, k), "",
        bound=f"<= {2.0**-40}",
    )  # fmt: skip
    yield Row.of(
        f"{what}: chance that the sum stays closed", 2.0 ** log2_closed(assumed, peers, k, t), "",
        bound=f"<= {2.0**-30}",
    )  # fmt: skip
    yield Row.of(f"{what}: entries of the sum that are wrong", float((total != exact).sum()), "",
                 bound="<= 0")  # fmt: skip
    counts = np.bincount(view.numpy() >> (codec.width - 8), minlength=256)
    yield Row.of(
        f"{what}: what it gets of a peer is uniform, chi-square over 256 cells",
        float(stats.chisquare(counts).pvalue), "p-value", bound=">= 0.001",
    )  # fmt: skip
    least_s = (k + 1) * 4 * (dim + 1) / rate / 1e9
    masks_s = bills.of("masks_s", there)
    yield Row.of(f"{what}: a peer, keys and shares, CPU", bills.of("keys_s", there), "s")
    if signed:
        yield Row.of(f"{what}: fewest honest peers in a sum", assumed.needed(peers).honest, "")
        yield Row.of(f"{what}: a peer, signatures, CPU", bills.of("signs_s", there), "s")
    yield Row.of(
        f"{what}: a peer, masks and packing, CPU", masks_s, "s",
        against=(f"key stream of {k + 1} masks", least_s), bound="<= 2",
    )  # fmt: skip
    yield Row.of(f"{what}: a peer, opening, CPU", bills.of("opening_s", there), "s")
    yield Row.of(
        f"{what}: hub, CPU", bills.hub_s, "s", against=("plain star", _plain_s(len(there), dim))
    )
    yield Row.of(
        f"{what}: hub, masks taken off, CPU", opening_s, "s",
        against=(f"key stream of {taken_off} masks", taken_off * 4 * (dim + 1) / rate / 1e9),
        bound="<= 2",
    )  # fmt: skip
    up, down = bills.of("up", there), bills.of("down", there)
    yield Row.of(f"{what}: a peer sends", up, "bytes", against=("plain star", 4.0 * dim))
    yield Row.of(f"{what}: a peer hears of keys and shares", down, "bytes")
    vector = codec.width // 8 * (dim + 1)
    if dim == DIM:
        yield Row.of(
            f"{what}: keys, shares and openings of a peer", up + down - vector, "bytes",
            against=("plain star, up and down", 8.0 * dim), bound="<= 0.01",
        )  # fmt: skip


def _signed(graph: MaskGraph, dim: int, bills: _Bills) -> dict[int, SignedRound]:
    """Everybody's way to sign, bound to the parameters that the round began with."""
    roster, params = Roster.of_run(0, "bench"), torch.zeros(dim, device="cpu")
    # Identities are there before any round.
    assert None not in [roster.key_of(peer) for peer in graph.peers]
    signed = {}
    for me in (*graph.peers, len(graph.peers)):
        watch = Stopwatch()
        signed[me] = SignedRound(roster, graph, 0, me, told(params, {}))
        if me in graph.peers:
            bills.peers[me].signs_s += watch.cpu_s
        else:
            bills.hub_s += watch.cpu_s
    return signed


def _agree(
    graph: MaskGraph, hub: MaskedHub, bills: _Bills, signed: dict[int, SignedRound]
) -> dict[int, MaskedPeer]:
    own, entries, signatures = {}, {}, {}
    for me, bill in enumerate(bills.peers):
        watch = Stopwatch()
        secret = derived(bytes(32), f"bench {me}")
        peer = own[me] = MaskedPeer(me, graph.neighbors(me), graph.threshold, 0, secret)
        advert = peer.advert
        bill.keys_s += watch.cpu_s
        watch = Stopwatch()
        signatures[me] = signed[me].sign_keys(advert) if signed else b""
        bill.signs_s += watch.cpu_s
        entries[me] = b"".join((*advert, signatures[me]))
        bill.up += _size(wire.Advertise(0, entries[me]))
        watch = Stopwatch()
        assert not signed or signed[len(graph.peers)].keys_hold(me, advert, signatures[me])
        hub.take_advert(me, advert)
        bills.hub_s += watch.cpu_s
    for me, bill in enumerate(bills.peers):
        book = hub.book(me)
        bill.down += _size(wire.Book(0, *wire.together({j: entries[j] for j in book})))
        watch = Stopwatch()
        if signed:
            signed[me].check_keys(book, signatures)
        bill.signs_s += watch.cpu_s
        watch = Stopwatch()
        shares = own[me].shares(book)
        bill.keys_s += watch.cpu_s
        bill.up += _size(wire.Deal(0, *wire.together(shares)))
        watch = Stopwatch()
        hub.take_shares(me, shares)
        bills.hub_s += watch.cpu_s
    return own


def _collect(
    own: dict[int, MaskedPeer], hub: MaskedHub, bills: _Bills, there: list[int], codec: FixedPoint,
    dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the sum must be, int64 [dim + 1], and what the hub got of the first peer."""
    exact = torch.zeros(dim + 1, dtype=torch.int64, device="cpu")
    one, view = torch.ones(1, dtype=torch.int64, device="cpu"), exact
    for me in there:
        bill, inbox = bills.peers[me], hub.inbox(me)
        bill.down += _size(wire.Dealt(0, *wire.together(inbox)))
        vector = keyed.normal(keyed.grid(keyed.key_of(me, "bench"), dim))
        watch = Stopwatch()
        masks = own[me].masks(inbox)
        bill.keys_s += watch.cpu_s
        payload, _ = codec.encode(vector, None, keyed.key_of(me, "round"))
        codes = torch.cat([payload.codes.to(torch.int64), one])
        watch = Stopwatch()
        masked = add_masks(codes, masks, codec.width)
        data = wire.Row(masked, codec.width).pack()
        bill.masks_s += watch.cpu_s
        bill.up += _size(wire.Masked(0, Packed(data)))
        watch = Stopwatch()
        heard = wire.row_of(Packed(data), dim + 1, codec.width)
        assert heard is not None
        hub.take_vector(me, heard)
        bills.hub_s += watch.cpu_s
        exact += codes
        view = masked if me == there[0] else view
    return exact, view


def _vouch(
    graph: MaskGraph, bills: _Bills, there: list[int], signed: dict[int, SignedRound]
) -> None:
    """Witnesses sign who is there; everybody checks as many of them as are needed."""
    survivors, found = bitmap(graph.peers, there), {}
    hub = signed[len(graph.peers)]
    for me in there:
        bill = bills.peers[me]
        if me in graph.witnesses:
            bill.down += _size(wire.Standing(0, survivors))
            watch = Stopwatch()
            found[me] = signed[me].vouch(survivors)
            bill.signs_s += watch.cpu_s
            bill.up += _size(wire.Vouched(0, found[me]))
            watch = Stopwatch()
            assert hub.vouches(me, survivors, found[me])
            bills.hub_s += watch.cpu_s
    first = sorted(found)[: graph.threshold]
    marks, signatures = bitmap(graph.witnesses, first), b"".join(found[me] for me in first)
    for me in there:
        bill = bills.peers[me]
        bill.down += _size(wire.Agreed(0, survivors, marks, signatures))
        watch = Stopwatch()
        agreed = signed[me].agreed(survivors, marks, signatures)
        bill.signs_s += watch.cpu_s
        assert len(agreed) == len(there)


def _open(
    own: dict[int, MaskedPeer], hub: MaskedHub, bills: _Bills, there: list[int], bits: int,
    asks: bool,
) -> tuple[Tensor, int, float]:  # fmt: skip
    """The sum, how many masks were taken off it, and how long that took."""
    for me in there:
        bill, question = bills.peers[me], hub.question(me)
        bill.down += _size(wire.Question(0, *question)) if asks else 0
        watch = Stopwatch()
        seeds, keys = own[me].reveal(*question)
        bill.opening_s += watch.cpu_s
        (named, opened), (others, more) = wire.together(seeds), wire.together(keys)
        bill.up += _size(wire.Reveal(0, named, others, opened + more))
        watch = Stopwatch()
        hub.take_reveal(me, seeds, keys)
        bills.hub_s += watch.cpu_s
    watch = Stopwatch()
    masks = hub.masks()
    opened = Stopwatch()
    total = add_masks(hub.total, masks, bits)
    took_s = opened.cpu_s
    bills.hub_s += watch.cpu_s
    return total, len(masks), took_s


def _plain_s(count: int, dim: int) -> float:
    """Of adding so many float32 vectors as they come."""
    vector = keyed.normal(keyed.grid(keyed.key_of(0, "bench"), dim))
    total = torch.zeros(dim, device="cpu")
    watch = Stopwatch()
    for _ in range(count):
        total += vector
    return watch.cpu_s
