"""One peer of a fabric without a centre: calls, content, a hash table and shared state in one hand.

    async with Node(peer, identity, bootstrap=[0]) as node:
        node.serve("svc.echo", echo)
        answer = await node.call(3, "svc.echo", b"ho", deadline=peer.now() + 2)
        cid = await node.put(checkpoint)                      # name it, keep it, tell who has it
        same = await node.get(cid, deadline=peer.now() + 60)
        await node.store(b"key", b"value", subkey=b"lora", lifetime_s=600.0, deadline=...)
        await node.state["models"].write("newest", str(cid))  # on all peers soon, signed

The same text runs on the virtual network and on sockets. Models are kept equal on top of this: a
trainer publishes a checkpoint's identifier in the shared registry, the others watch it and fetch
the blocks that changed, from each other (`publish`, `newer`, `get`).
Source: Yang et al. 2025, Lattica (arXiv 2510.00183).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec

from shoal.base.errors import (
    DeadlineExceeded,
    DecodeError,
    PeerUnreachable,
    ProgramError,
    UsageError,
)
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup
from shoal.parts.overlay._outgoing import Stream
from shoal.parts.overlay._served import Request
from shoal.parts.overlay.anti_entropy import AntiEntropy, Pace
from shoal.parts.overlay.block_exchange import Exchange, ExchangeSettings
from shoal.parts.overlay.content import BLOCK_BYTES, Blocks, Cid
from shoal.parts.overlay.crdt import Element, LwwMap, OrSet, Plain, PNCounter
from shoal.parts.overlay.crdt_store import rules
from shoal.parts.overlay.kademlia import Kademlia, KademliaSettings
from shoal.parts.overlay.records import KeyOf
from shoal.parts.overlay.rpc import Rpc, RpcSettings
from shoal.parts.overlay.traversal import Path, Traversal
from shoal.wire.identity import Identity

_WATCH_S = 0.25
_FOREVER_S = 1e9


@dataclass(frozen=True)
class NodeSettings:
    """Settings of the parts; store: the name of the shared state, block_bytes: of blobs."""

    rpc: RpcSettings = field(default_factory=RpcSettings)
    dht: KademliaSettings = field(default_factory=KademliaSettings)
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    pace: Pace = field(default_factory=Pace)
    store: str = "shared"
    block_bytes: int = BLOCK_BYTES
    content_bytes: int = 1 << 30
    join_s: float = 5.0


class Node:
    """An async context. identity: this peer's key pair; bootstrap: peers to begin with; key_of: the
    public keys of peers: with them records of the hash table are signed, and nobody else may write
    the shared state. end_s: when upkeep ends at the latest. traversal: of a peer behind a NAT box,
    registered and with `messages=True`.

    >>> from dataclasses import dataclass
    >>> from shoal.engine.event import simulate
    >>> from shoal.world.links import Links
    >>> from shoal.world.network import Network
    >>> @dataclass(frozen=True)
    ... class Fabric:
    ...     async def run(self, peer):
    ...         keys = {p: Identity.from_seed(bytes([p]) * 32) for p in peer.roster}
    ...         async with Node(
    ...             peer, keys[peer.id], bootstrap=[0], key_of=lambda p: keys[p].public, end_s=20.0
    ...         ) as node:
    ...             if peer.id == 1:
    ...                 await node.publish("newest", b"weights" * 1000, deadline=9.0)
    ...             cid = await node.newer("newest", None, deadline=9.0)
    ...             peer.record("right", await node.get(cid, deadline=9.0) == b"weights" * 1000)
    ...             await peer.sleep_until(10.0)
    >>> run = simulate(Fabric(), Network(4, links=Links(latency_s=0.01)))
    >>> [row.value for row in run.series("right")]
    [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self, peer: Peer, identity: Identity, *, bootstrap: Sequence[int] = (),
        key_of: KeyOf | None = None, settings: NodeSettings | None = None,
        end_s: float = _FOREVER_S, traversal: Traversal | None = None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.settings = settings = settings or NodeSettings()
        self.rpc = Rpc(peer, settings.rpc)
        self.dht = Kademlia(
            peer, settings.dht, identity=None if key_of is None else identity, key_of=key_of
        )
        self.blocks = Blocks(settings.content_bytes)
        self.exchange = Exchange(peer, self.blocks, dht=self.dht, settings=settings.exchange)
        authors = None
        if key_of is not None:
            keys = (key_of(each) for each in peer.roster)
            authors = frozenset(key for key in keys if key is not None)
        self.state = State(
            AntiEntropy(
                peer, identity, rules(settings.store, authors=authors), end_s=end_s,
                pace=settings.pace,
            )
        )  # fmt: skip
        self._bootstrap = [PeerId(p) for p in bootstrap if p != peer.id]
        self._traversal = traversal
        self._ways: dict[PeerId, Path | None] = {}
        self._tasks: TaskGroup | None = None
        self._stored: dict[bytes, dict[bytes, tuple[bytes, float]]] = {}

    async def __aenter__(self) -> Node:
        self._tasks = group = await self.peer.tasks().__aenter__()
        try:
            self.rpc.start(group)
            self.exchange.start(group)
            self.dht.start(group)
            self.state.replica.start(group)
            await self.dht.join(self._bootstrap, deadline=self.peer.now() + self.settings.join_s)
        except BaseException as error:
            await group.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:  # fmt: skip
        self.rpc.stop()
        self.dht.stop()
        self.state.replica.stop()
        return await self._group.__aexit__(kind, error, trace)

    @property
    def _group(self) -> TaskGroup:
        if self._tasks is None:
            raise ProgramError("Node: used outside of `async with Node(...)`")
        return self._tasks

    # Calls.

    def serve(self, method: str, handler: Callable[[Request], Awaitable[Any]]) -> None:
        """See `Rpc.serve`."""
        self.rpc.serve(method, handler)

    def serve_stream(self, method: str, handler: Callable[[Request], Awaitable[None]]) -> None:
        """See `Rpc.serve_stream`."""
        self.rpc.serve_stream(method, handler)

    async def call(
        self, to: PeerId | int, method: str, payload: Any = b"", *, deadline: float,
        compression: str = "",
    ) -> Any:  # fmt: skip
        """See `Rpc.call`. PeerUnreachable in place of DeadlineExceeded when that peer was never
        heard from; its text names the ways that were tried."""
        await self.reach(to)
        try:
            return await self.rpc.call(
                to, method, payload, deadline=deadline, compression=compression
            )
        except DeadlineExceeded as error:
            if PeerId(to) in self.rpc.lives:
                raise
            raise PeerUnreachable(
                f"call {method!r} of peer {to}: no word from it by {deadline:.3f} s; tried: "
                f"{self._tried(PeerId(to))}"
            ) from error

    async def reach(self, to: PeerId | int) -> None:
        """Find a way to a peer behind a NAT box, once; PeerUnreachable when there is none."""
        to = PeerId(to)
        if self._traversal is None or to in self._ways or to in self.rpc.lives:
            return
        self._ways[to] = await self._traversal.connect(to)
        if self._ways[to] is None:
            del self._ways[to]
            raise PeerUnreachable(f"peer {to}: tried: {self._tried(to)}")

    def _tried(self, to: PeerId) -> str:
        if self._traversal is None:
            return "its connection"
        way = self._ways.get(to)
        if way is None:
            return "its endpoint, hole punching from both sides, and the relay"
        return f"{'its endpoint' if way.direct else 'the relay'} {way.endpoint}"

    def stream(
        self, to: PeerId | int, method: str, payload: Any = b"", *, deadline: float,
        compression: str = "",
    ) -> Stream:  # fmt: skip
        """See `Rpc.stream`."""
        return self.rpc.stream(to, method, payload, deadline=deadline, compression=compression)

    # Content.

    async def put(self, blob: bytes, *, deadline: float | None = None) -> Cid:
        """Keep a blob here and name this peer as a source of it, as far as that works until the
        deadline (default: five seconds from now)."""
        cid = self.blocks.add_blob(blob, self.settings.block_bytes)
        until_s = self.peer.now() + 5.0 if deadline is None else deadline
        await self.exchange.publish(cid, deadline=until_s)
        return cid

    async def get(self, cid: Cid | str, *, deadline: float, sources: Sequence[int] = ()) -> bytes:
        """A blob, every block of it checked; only blocks that are not here are fetched.

        DecodeError for a text that is no identifier, UsageError for that of something else than a
        blob, DeadlineExceeded when blocks are missing then.
        """
        root = Cid.parse(cid) if isinstance(cid, str) else cid
        blob = self.blocks.blob(root)
        if blob is None:
            await self.exchange.fetch(root, deadline=deadline, sources=[PeerId(p) for p in sources])
            blob = self.blocks.blob(root)
            assert blob is not None, "fetched blocks are pinned"
        return blob

    def drop(self, cid: Cid) -> None:
        """Give a blob's room back; blocks that other blobs share stay."""
        self.dht.withdraw(cid.pack())
        self.blocks.drop_blob(cid)

    # The hash table.

    async def store(
        self, key: bytes, value: bytes, *, subkey: bytes = b"", lifetime_s: float, deadline: float
    ) -> int:
        """Write this peer's value under a key and subkey; how many nodes hold it now.

        Values of one peer under one key expire each by itself; those that have expired are left
        out when the next is written. UsageError for a lifetime that is over already.
        """
        if not lifetime_s > 0:
            raise UsageError(
                f"store {key[:40]!r}: lifetime_s={lifetime_s}; such a record has expired before "
                "anybody reads it (give a positive time)"
            )
        now_s = self.peer.now()
        mine = self._stored.setdefault(key, {})
        for old in [each for each, (_, until_s) in mine.items() if until_s <= now_s]:
            del mine[old]
        mine[subkey] = (value, now_s + lifetime_s)
        # How long each has left, not until when: readers have other clocks.
        left = [(each, what, until_s - now_s) for each, (what, until_s) in sorted(mine.items())]
        data = msgspec.msgpack.encode(left)
        longest_s = max(until_s for _, until_s in mine.values()) - now_s
        return await self.dht.put(
            key, data, deadline=deadline, lifetime_s=min(longest_s, self.settings.dht.lifetime_s)
        )

    async def load(
        self, key: bytes, *, deadline: float, holders: int = 1
    ) -> dict[tuple[PeerId, bytes], bytes]:
        """What was stored under a key, by (peer, subkey); empty when there is nothing."""
        found = await self.dht.get(key, deadline=deadline, holders=holders)
        out: dict[tuple[PeerId, bytes], bytes] = {}
        for owner, data in found.values.items():
            try:
                entries = msgspec.msgpack.decode(data, type=list[tuple[bytes, bytes, float]])
            except msgspec.DecodeError:
                continue
            age_s = found.age_s[owner]
            out |= {(owner, sub): value for sub, value, left_s in entries if left_s > age_s}
        return out

    # Models on top.

    async def publish(self, name: str, blob: bytes, *, deadline: float) -> Cid:
        """Put a blob and write its identifier into the registry under a name."""
        cid = await self.put(blob, deadline=deadline)
        await self.state["registry"].write(name, f"{self.peer.id} {cid}")
        return cid

    async def newer(self, name: str, than: Cid | None, *, deadline: float) -> Cid | None:
        """Wait for another version than this in the registry; None at the deadline.

        What another author wrote there and is no identifier counts as nothing.
        """
        while True:
            entry = self.state["registry"].map.get(name)
            source, _, text = str(entry or "").partition(" ")
            cid = _cid_in(text)
            if cid is not None and cid != than:
                who = int(source) if source.isdecimal() and len(source) < 10 else -1
                if who in self.peer.roster:
                    self.exchange.met(cid, [who])
                return cid
            now_s = self.peer.now()
            if now_s >= deadline:
                return None
            await self.peer.sleep_until(min(now_s + _WATCH_S, deadline) + 1e-8)


def _cid_in(text: str) -> Cid | None:
    try:
        return Cid.parse(text)
    except DecodeError:
        return None


class State:
    """Shared values by key, each a CRDT that every peer may change at any time."""

    def __init__(self, replica: AntiEntropy) -> None:
        self.replica = replica

    def __getitem__(self, key: str) -> Shared:
        return Shared(self.replica, key)

    @property
    def digest(self) -> bytes:
        """Equal on two peers exactly when their whole states are."""
        return self.replica.digest


class Shared:
    """One shared value. What `write`, `add`, `remove` and `count` return is durable here, and on
    the others soon."""

    def __init__(self, replica: AntiEntropy, key: str) -> None:
        self._replica, self._key = replica, key

    @property
    def map(self) -> Mapping[str, Plain]:
        """As a dictionary, of which the latest write of an entry counts."""
        return self._replica.value(self._key, LwwMap).value

    @property
    def members(self) -> frozenset[Element]:
        """As a set, in which an add wins over a removal that has not seen it."""
        return self._replica.value(self._key, OrSet).value

    @property
    def total(self) -> int:
        """As a counter."""
        return self._replica.value(self._key, PNCounter).value

    async def write(self, entry: str, value: Plain) -> None:
        """Set an entry of the dictionary; None deletes it."""
        me = self._replica.author
        await self._replica.write(
            self._key, LwwMap, lambda known, stamp: known.written(me, stamp, entry, value)
        )

    async def add(self, element: Element) -> None:
        """Add to the set."""
        me = self._replica.author
        await self._replica.write(self._key, OrSet, lambda known, stamp: known.added(me, element))

    async def remove(self, element: Element) -> None:
        """Remove from the set what is seen of this element."""
        await self._replica.write(self._key, OrSet, lambda known, stamp: known.removed(element))

    async def count(self, amount: int) -> None:
        """Count up, or down when negative."""
        me = self._replica.author
        await self._replica.write(
            self._key, PNCounter, lambda known, stamp: known.added(me, amount)
        )
