"""Blobs from many peers at once: want-lists, rarest block first, every block checked.

Whoever fetches a blob serves what it has of it already, and tells with every question which blocks
that are and whom it knows: a swarm, in which the first source sends little more than one copy.
Sources: Bitswap (Benet 2014, IPFS, arXiv 1407.3561, section 3.4); rarest first (Cohen 2003,
"Incentives build robustness in BitTorrent", section 2.4).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from shoal.base.errors import DeadlineExceeded, DecodeError, PeerError, UsageError
from shoal.base.ids import PeerId
from shoal.base.limits import check_positive
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.overlay.content import MANIFEST, Blocks, Cid, Manifest
from shoal.parts.overlay.kademlia import Kademlia
from shoal.wire.message import Packed, message

_MOST_SOURCES = 64
_BANS = 256
"""The first ban is that part of the longest."""


@message
class Want:
    """A block of a blob, or (place -1) its manifest; place -2 only asks what there is.

    have: a bit for each block that the asker has.
    """

    root: bytes
    place: int
    have: bytes


@message
class Have:
    """What the answerer has of the blob, who else deals in it, and the block if it was wanted."""

    have: bytes
    peers: tuple[int, ...]
    block: Packed


@dataclass(frozen=True)
class ExchangeSettings:
    """in_flight_bytes: asked for and not here yet; in_flight_blocks: of those, from one source.

    timeout_s: how long a block may take; poll_s: how often sources are asked what they have;
    ban_s: how long nothing is taken at most from who sends bad blocks; the first one costs a 256th.
    """

    in_flight_bytes: int = 1 << 22
    in_flight_blocks: int = 2
    timeout_s: float = 10.0
    poll_s: float = 0.5
    ban_s: float = 600.0

    def __post_init__(self) -> None:
        check_positive("ExchangeSettings", self)


class Exchange:
    """One peer's side of the exchange; `start` comes first. See `Blocks` for what it holds.

    dht: finds sources and names this peer as one; without it, `fetch` must be told sources. Records
    "fetched_bytes" with every good block and "banned" with a peer that sent a bad one. Choosing a
    block looks at all that are missing: for blobs of many thousand blocks use larger blocks.

    >>> from shoal.engine.event import simulate
    >>> from shoal.world.links import Links
    >>> from shoal.world.network import Network
    >>> @dataclass(frozen=True)
    ... class Copy:
    ...     async def run(self, peer):
    ...         blocks = Blocks()
    ...         exchange = Exchange(peer, blocks)
    ...         async with peer.tasks() as group:
    ...             exchange.start(group)
    ...             root = Manifest.split(b"x" * 5000, block_bytes=1000)[0].cid
    ...             if peer.id == 0:
    ...                 blocks.add_blob(b"x" * 5000, block_bytes=1000)
    ...             else:
    ...                 await exchange.fetch(root, deadline=5.0, sources=[0])
    ...             peer.record("whole", blocks.blob(root) == b"x" * 5000)
    ...             await peer.sleep_until(5.0)
    >>> run = simulate(Copy(), Network(4, links=Links(latency_s=0.01)))
    >>> sum(row.value for row in run.series("whole"))
    4.0
    """

    def __init__(
        self, peer: Peer, blocks: Blocks, *, dht: Kademlia | None = None,
        settings: ExchangeSettings | None = None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.blocks = blocks
        self.settings = settings or ExchangeSettings()
        self.banned_until_s: dict[PeerId, float] = {}
        self._offences: dict[PeerId, int] = {}
        self.group: TaskGroup | None = None
        self._dht = dht
        self._dealers: dict[Cid, dict[PeerId, None]] = {}
        self._fetches: dict[Cid, _Fetch] = {}

    def start(self, group: TaskGroup) -> None:
        """Answer other peers, while the program that owns the group runs."""
        self.group = group
        self.peer.serve(Want, self.answer)

    async def fetch(
        self, root: Cid, *, deadline: float, sources: Collection[PeerId] = ()
    ) -> Manifest:
        """Get, keep and pin every block of a blob that is not here; DeadlineExceeded if some are
        still missing then (those that came stay, and another call goes on with them)."""
        if root.codec != MANIFEST:
            raise UsageError(f"fetch: {root} is no blob (use the identifier of its manifest)")
        if root in self._fetches:
            raise UsageError(f"fetch: {root} is being fetched already (wait for that)")
        fetch = self._fetches[root] = _Fetch(self, root, deadline)
        try:
            return await fetch.run(sources)
        finally:
            del self._fetches[root]

    async def found(self, root: Cid, deadline: float) -> tuple[PeerId, ...]:
        """Who says in the hash table that it has this blob."""
        if self._dht is None:
            return ()
        return await self._dht.providers(root.pack(), deadline=deadline)

    async def publish(self, root: Cid, *, deadline: float) -> int:
        """Name this peer as a source in the hash table; how many nodes know it."""
        if self._dht is None:
            return 0
        return await self._dht.provide(root.pack(), deadline=deadline)

    def is_banned(self, peer: PeerId) -> bool:
        return self.banned_until_s.get(peer, -1.0) > self.peer.now()

    def ban(self, peer: PeerId) -> None:
        """Take nothing from a peer that sent something else than it was asked for: shortly at
        first, since a bad link does that to honest peers, and twice as long every time."""
        if self.is_banned(peer):
            return
        self.peer.record("banned", peer)
        times = self._offences[peer] = self._offences.get(peer, 0) + 1
        share = min(1.0, 2.0 ** (times - 1) / _BANS)
        self.banned_until_s[peer] = self.peer.now() + share * self.settings.ban_s

    def here(self, manifest: Manifest | None) -> int:
        """A bit for each block of a blob that is here."""
        held = self.blocks
        if manifest is None:
            return 0
        return sum(1 << place for place, cid in enumerate(manifest.children) if cid in held)

    def dealers(self, root: Cid) -> dict[PeerId, None]:
        """Who asked for this blob or is known to have it, a bounded number."""
        return self._dealers.setdefault(root, {})

    def met(self, root: Cid, peers: Iterable[int]) -> None:
        dealers = self.dealers(root)
        known = self.peer.roster
        for peer in peers:
            if peer in known and peer != self.peer.id and len(dealers) < _MOST_SOURCES:
                dealers[PeerId(peer)] = None

    async def answer(self, envelope: Envelope[Want]) -> Have:
        """What a peer that asks is told."""
        want, source = envelope.message, envelope.source
        root = Cid.unpack(want.root)
        manifest = self.blocks.manifest(root)
        block = b""
        if manifest is not None:
            if want.place == -1:
                block = manifest.pack()
            elif 0 <= want.place < len(manifest.children):
                block = self.blocks.get(manifest.children[want.place]) or b""
            elif want.place != -2:
                raise DecodeError(f"want: block {want.place} of {len(manifest.children)}")
        if manifest is None and root not in self._fetches:
            # Nobody may fill the memory with blobs that are unknown here.
            return Have(b"", (), Packed(block))
        peers = tuple(peer for peer in self.dealers(root) if peer != source)
        self.met(root, (source,))
        if (fetch := self._fetches.get(root)) is not None:
            fetch.told(source, want.have)
        return Have(_pack(self.here(manifest)), peers, Packed(block))


class _Fetch:
    """One blob on its way. Bits of integers stand for its blocks."""

    def __init__(self, exchange: Exchange, root: Cid, deadline: float) -> None:
        self._exchange = exchange
        self._peer = exchange.peer
        self._root = root
        self._deadline = deadline
        self._manifest: Manifest | None = None
        self._missing = 0
        self._asked = 0
        self._asked_bytes = 0
        self._asked_of: dict[PeerId, int] = {}
        self._has: dict[PeerId, int] = {}
        self._copies: list[int] = []
        self._poller: TaskHandle | None = None

    async def run(self, sources: Collection[PeerId]) -> Manifest:
        exchange, blocks = self._exchange, self._exchange.blocks
        exchange.met(self._root, sources)
        manifest = blocks.manifest(self._root) or await self._fetch_manifest()
        blocks.pin((self._root, *manifest.children))
        blocks.add(self._root, manifest.pack())
        self._manifest = manifest
        self._copies = [0] * len(manifest.children)
        self._missing = ~exchange.here(manifest) & ((1 << len(manifest.children)) - 1)
        if self._missing:
            assert exchange.group is not None
            self._poller = exchange.group.start(self._poll())
            try:
                await self._poller.join()
            finally:
                self._poller.cancel()
        if self._missing:
            blocks.unpin((self._root, *manifest.children))
            raise self._late(f"{self._missing.bit_count()} of {len(manifest.children)} blocks")
        return manifest

    def _late(self, what: str) -> DeadlineExceeded:
        known = len(self._exchange.dealers(self._root))
        return DeadlineExceeded(f"fetch {self._root}: {what} missing; {known} sources known")

    async def _fetch_manifest(self) -> Manifest:
        exchange, peer = self._exchange, self._peer
        turn = 0
        while peer.now() + 1e-6 < self._deadline:
            exchange.met(self._root, await exchange.found(self._root, self._deadline))
            for source in list(exchange.dealers(self._root)):
                if exchange.is_banned(source):
                    continue
                answer = await self._ask(source, -1)
                if answer is None or not (data := _bytes(answer.block)):
                    continue
                if self._root.names(data):
                    return Manifest.unpack(data)
                exchange.ban(source)
            turn += 1
            await peer.sleep_until(min(peer.now() + exchange.settings.poll_s, self._deadline))
        raise self._late("the manifest is")

    async def _ask(self, source: PeerId, place: int) -> Have | None:
        settings = self._exchange.settings
        want = Want(self._root.pack(), place, _pack(self._exchange.here(self._manifest)))
        deadline = min(self._peer.now() + settings.timeout_s, self._deadline)
        try:
            answer = await self._peer.request(source, want, deadline=deadline)
        except PeerError:
            return None
        if not isinstance(answer, Have):
            return None
        self._exchange.met(self._root, answer.peers[:_MOST_SOURCES])
        return answer

    def told(self, source: PeerId, have: bytes) -> None:
        """A source said what it has."""
        if self._manifest is None or self._exchange.is_banned(source):
            return
        bits = int.from_bytes(have, "little") & ((1 << len(self._copies)) - 1)
        before = self._has.get(source, 0)
        self._has[source] = bits
        for place in _places(bits & ~before):
            self._copies[place] += 1
        for place in _places(before & ~bits):
            self._copies[place] -= 1

    async def _poll(self) -> None:
        """Ask the sources what they have, again and again, until nothing is missing."""
        exchange, peer = self._exchange, self._peer
        group = exchange.group
        assert group is not None
        while self._missing and peer.now() + 1e-6 < self._deadline:
            if not exchange.dealers(self._root):
                exchange.met(self._root, await exchange.found(self._root, self._deadline))
            for source in exchange.dealers(self._root):
                # Who is sending blocks tells with every one of them.
                if not exchange.is_banned(source) and not self._asked_of.get(source):
                    group.start(self._look(source), isolate=True)
            await peer.sleep_until(min(peer.now() + exchange.settings.poll_s, self._deadline))

    async def _look(self, source: PeerId) -> None:
        answer = await self._ask(source, -2)
        self.told(source, b"" if answer is None else answer.have)
        self._advance()

    def _advance(self) -> None:
        """Ask for as many blocks as may be under way, the rarest first, of idle sources first."""
        settings, manifest = self._exchange.settings, self._manifest
        group = self._exchange.group
        assert manifest is not None
        assert group is not None
        while self._missing and self._peer.now() < self._deadline:
            room = settings.in_flight_bytes - self._asked_bytes
            if self._asked_bytes and room < manifest.block_bytes:
                return
            wanted = self._missing & ~self._asked
            free = [
                (self._asked_of.get(source, 0), self._tie(source), source)
                for source, bits in self._has.items()
                if bits & wanted
                and self._asked_of.get(source, 0) < settings.in_flight_blocks
                and not self._exchange.is_banned(source)
            ]
            if not free:
                return
            source = min(free)[2]
            place = min(
                _places(self._has[source] & wanted),
                key=lambda place: (self._copies[place], self._tie(place)),
            )
            self._asked |= 1 << place
            self._asked_bytes += manifest.length(place)
            self._asked_of[source] = self._asked_of.get(source, 0) + 1
            group.start(self._get(source, place), isolate=True)

    def _tie(self, what: int) -> int:
        # Another order on every peer, so that they do not all want the same of the same.
        return (what + 1) * 2654435761 * (2 * int(self._peer.id) + 1) & 0xFFFFFFFF

    async def _get(self, source: PeerId, place: int) -> None:
        exchange, manifest = self._exchange, self._manifest
        assert manifest is not None
        answer = await self._ask(source, place)
        self._asked &= ~(1 << place)
        self._asked_bytes -= manifest.length(place)
        self._asked_of[source] -= 1
        block = b"" if answer is None else _bytes(answer.block)
        if block and not manifest.children[place].names(block):
            self.told(source, b"")
            exchange.ban(source)
        else:
            self.told(source, b"" if answer is None or not block else answer.have)
            if block and self._missing >> place & 1:
                exchange.blocks.add(manifest.children[place], block)
                exchange.peer.record("fetched_bytes", len(block))
                for same in _places(self._missing):
                    if manifest.children[same] in exchange.blocks:
                        self._missing &= ~(1 << same)
        if self._missing:
            self._advance()
        elif self._poller is not None:
            self._poller.cancel()


def _pack(bits: int) -> bytes:
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def _places(bits: int) -> Iterator[int]:
    """Which bits are set, ascending."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _bytes(packed: Packed) -> bytes:
    content = packed.content
    return content if isinstance(content, bytes) else bytes(content)  # type: ignore[arg-type]
