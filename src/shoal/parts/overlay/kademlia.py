"""A distributed hash table: records under keys, kept by the nodes with the closest numbers.

    dht = Kademlia(peer)
    async with peer.tasks() as group:
        dht.start(group)
        await dht.join([contact], deadline=peer.now() + 10)
        await dht.put(b"model", b"version 3", deadline=peer.now() + 10)
        found = await dht.get(b"model", deadline=peer.now() + 10)
        dht.stop()

Numbers have 256 bits, distance is XOR, and a search halves the distance with every answer
(lookup.py). What a node knows of others is in routing_table.py, what it keeps for them in
records.py. Source: Maymounkov and Mazieres 2002, "Kademlia"; one record per peer under a shared key
as in Hivemind's DHT (Ryabinin and Gusev 2020, arXiv 2002.04013).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.base.errors import (
    DeadlineExceeded,
    DecodeError,
    PeerError,
    PeerUnreachable,
    ProgramError,
    UsageError,
)
from shoal.base.ids import PeerId
from shoal.base.limits import check_positive
from shoal.base.units import to_ns
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.overlay.lookup import Find, Found, Lookup
from shoal.parts.overlay.records import KEY_BYTES, Copy, KeyOf, Record, Records, is_intact, sealed
from shoal.parts.overlay.routing_table import BITS, RoutingTable, number_of, number_of_peer
from shoal.wire.identity import Identity
from shoal.wire.message import message

# How often the oldest contact of a full bucket is pinged at most, in seconds.
_CHECK_S = 10.0
# A search or a store of the table's own upkeep may take as many query timeouts.
_UPKEEP_TIMEOUTS = 4
_AT_ONCE = 16
_LEAST_PATIENCE_S = 0.02
_ANSWER_BYTES = 1 << 18


@message
class Ping:
    """Are you there? Asked before a contact loses its place."""


@message
class Pong:
    """Yes."""


@message
class Store:
    """Keep these records under a key; `cached` ones for a short time only."""

    key: bytes
    copies: tuple[Copy, ...]
    cached: bool


@message
class Stored:
    """How many of them are kept."""

    records: int


@dataclass(frozen=True)
class KademliaSettings:
    """k: contacts per bucket, and nodes that keep a record; alpha: queries under way at once.

    query_timeout_s: after that a node counts as silent. patience_s: when a search goes on without
    an answer, until round trips were measured; from then on the mean and four deviations of them,
    but no longer than this or two means.
    refresh_s: how often buckets without searches are searched; republish_s: how often records are
    stored anew. lifetime_s: of provider records, and the longest of any; cache_s: of copies on the
    way. record_bytes, sender_bytes, store_bytes: of one value, of all that one peer sent, of all.
    """

    k: int = 20
    alpha: int = 3
    query_timeout_s: float = 2.0
    patience_s: float = 0.5
    refresh_s: float = 600.0
    republish_s: float = 600.0
    lifetime_s: float = 7200.0
    cache_s: float = 60.0
    record_bytes: int = 1 << 16
    sender_bytes: int = 1 << 22
    store_bytes: int = 1 << 26

    def __post_init__(self) -> None:
        check_positive("KademliaSettings", self, finite=True)
        if self.lifetime_s <= self.republish_s:
            raise UsageError(
                f"KademliaSettings: lifetime_s={self.lifetime_s} is not longer than "
                f"republish_s={self.republish_s}: records would vanish in between (raise it)"
            )


@dataclass(frozen=True)
class Values:
    """What a search found. values: by owner, the newest first; hops: rounds of alpha queries until
    the first holder answered (0: this node holds it); queries: how many were made; age_s: since
    each was written, as the nodes that kept it count. False if empty.
    """

    values: dict[PeerId, bytes]
    hops: int
    queries: int
    age_s: dict[PeerId, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def newest(self) -> bytes | None:
        """The value that was written last."""
        return next(iter(self.values.values()), None)


@dataclass
class _Own:
    """What this peer wrote. renewed: until it is withdrawn; again_s: when it is stored again."""

    record: Record
    renewed: bool
    again_s: float
    ends_s: float


class Kademlia:
    """One node of the table. A peer has at most one; `start` and `join` come first.

    identity, key_of: this peer's key pair and everybody's public keys. With them a node's number is
    that of its key, records are signed, and peers without a known key are no nodes. Without them
    numbers follow from ids, and a hostile peer may write in another's name.

    A record lasts for its lifetime from when it was written: its owner says how much of that is
    left when it stores it, each node counts on by its own clock, and says so when it passes it on.
    So clocks need not agree, but for one thing: as anybody may keep a record and store it again, a
    record whose end is longer ago on a node's clock than the settings' `lifetime_s` is refused.
    Records of a peer that is gone live on until they expire, as long as fewer than k of the nodes
    closest to them vanish between two republications.

    >>> from shoal.engine.event import simulate
    >>> from shoal.world.links import Links
    >>> from shoal.world.network import Network
    >>> @dataclass(frozen=True)
    ... class Greeting:
    ...     async def run(self, peer):
    ...         dht = Kademlia(peer)
    ...         async with peer.tasks() as group:
    ...             dht.start(group)
    ...             await dht.join([0], deadline=1.0)
    ...             if peer.id == 3:
    ...                 await dht.put(b"greeting", b"hello", deadline=2.0)
    ...             await peer.sleep_until(2.0)
    ...             found = await dht.get(b"greeting", deadline=3.0)
    ...             peer.record("found", found.newest == b"hello")
    ...             dht.stop()
    >>> run = simulate(Greeting(), Network(8, links=Links(latency_s=0.01)))
    >>> sum(row.value for row in run.series("found"))
    8.0
    """

    def __init__(
        self, peer: Peer, settings: KademliaSettings | None = None, *,
        identity: Identity | None = None, key_of: KeyOf | None = None,
    ) -> None:  # fmt: skip
        if (identity is None) != (key_of is None):
            raise UsageError("Kademlia: identity and key_of go together (give both or none)")
        self.peer = peer
        self.settings = settings = settings or KademliaSettings()
        self._identity = identity
        self._key_of = key_of
        self._roster: tuple[PeerId, ...] = ()
        self._peers: frozenset[int] = frozenset()
        own = number_of(identity.public) if identity else number_of_peer(peer.id)
        self.table = RoutingTable(own, settings.k)
        self.held = Records(
            most_bytes=settings.store_bytes, sender_bytes=settings.sender_bytes,
            record_bytes=settings.record_bytes, signed=identity is not None,
        )  # fmt: skip
        self._group: TaskGroup | None = None
        self._upkeep: TaskHandle | None = None
        self._contacts: tuple[PeerId, ...] = ()
        self._checking: set[int] = set()
        self._checked_s: dict[int, float] = {}
        self._searched_s: dict[int, float] = {}
        self._own: dict[bytes, _Own] = {}
        self._version = 0
        self._refreshes = 0
        self._mean_s = self._deviation_s = -1.0

    # Life.

    def start(self, group: TaskGroup) -> None:
        """Answer other nodes, and keep table and records fresh until `stop`."""
        self._group = group
        self.peer.serve(Find, self._on_find)
        self.peer.serve(Store, self._on_store)
        self.peer.serve(Ping, self._on_ping)
        self._upkeep = group.start(self._keep())

    def stop(self) -> None:
        """End the upkeep, so that the group can end. Queries under way end by their timeout."""
        if self._upkeep is not None:
            self._upkeep.cancel()

    async def join(self, contacts: Sequence[PeerId], *, deadline: float) -> int:
        """Make oneself known and fill the table, from nodes that are known; how many contacts it
        has then, 0 when nobody answered. The contacts are asked again whenever nobody else is left.
        """
        self._contacts = tuple(contacts)
        await self._search(self.table.own, deadline, start=self._contacts)
        if len(self.table):
            nearest = min(self.table.buckets)
            far = [i for i in range(nearest + 1, BITS + 1) if not self._is_full(i)]
            await self._all([lambda i=i: self._refresh(i, deadline) for i in far])
        return len(self.table)

    def _is_full(self, index: int) -> bool:
        return len(self.table.buckets.get(index, ())) >= self.settings.k

    # What programs use.

    async def get(self, key: bytes, *, deadline: float, holders: int = 1) -> Values:
        """The values under a key, one per owner. Ends when `holders` nodes gave what they hold: one
        node may lack the newest. Empty when nothing was found by the deadline."""
        return await self._get(_place(b"value", key), deadline, holders)

    async def put(
        self, key: bytes, value: bytes, *, deadline: float, lifetime_s: float | None = None
    ) -> int:
        """Write this peer's value under a key, and keep it there until it expires; how many nodes
        hold it now. `lifetime_s` is at most that of the settings (the default)."""
        settings = self.settings
        lifetime_s = settings.lifetime_s if lifetime_s is None else lifetime_s
        if len(value) > settings.record_bytes:
            raise UsageError(
                f"put: a value of {len(value)} bytes; the limit is {settings.record_bytes} (put it "
                "into the content store, and its identifier here)"
            )
        if not 0 < lifetime_s <= settings.lifetime_s:
            raise UsageError(
                f"put: lifetime_s={lifetime_s}; need more than 0 and at most {settings.lifetime_s}"
            )
        return await self._publish(_place(b"value", key), value, lifetime_s, False, deadline)

    async def provide(self, key: bytes, *, deadline: float) -> int:
        """Say, until `withdraw`, that this peer has what `key` names; how many nodes know now."""
        place = _place(b"provider", key)
        return await self._publish(place, b"", self.settings.lifetime_s, True, deadline)

    async def providers(
        self, key: bytes, *, deadline: float, holders: int = 1
    ) -> tuple[PeerId, ...]:
        """Who has what `key` names, who said so last first. They may have died since."""
        found = await self._get(_place(b"provider", key), deadline, holders)
        return tuple(found.values)

    def withdraw(self, key: bytes) -> None:
        """Do not renew this peer's record under a key any more; it expires."""
        for kind in (b"value", b"provider"):
            self._own.pop(_place(kind, key), None)

    async def closest(self, number: int, *, deadline: float) -> list[PeerId]:
        """The k nodes closest to a number that answered, this one included, the closest first."""
        lookup = await self._search(number, deadline)
        numbers = {peer: self.number(peer) for peer in [*lookup.closest, self.peer.id]}
        known = [(each ^ number, peer) for peer, each in numbers.items() if each is not None]
        return [peer for _, peer in sorted(known)[: self.settings.k]]

    # Searches; the surface that `Lookup` needs.

    @property
    def group(self) -> TaskGroup:
        if self._group is None:
            raise ProgramError("Kademlia: used before start (call start(group) first)")
        return self._group

    @property
    def patience_s(self) -> float:
        settings = self.settings
        if self._mean_s < 0:
            return min(settings.patience_s, settings.query_timeout_s)
        usual_s = self._mean_s + max(4 * self._deviation_s, _LEAST_PATIENCE_S)
        # Some answers that came late once must not make all searches wait.
        longest_s = max(settings.patience_s, 2 * self._mean_s)
        return min(usual_s, longest_s, settings.query_timeout_s)

    def number(self, peer: PeerId) -> int | None:
        if self.peer.roster is not self._roster:
            self._roster = self.peer.roster
            self._peers = frozenset(self._roster)
        if peer not in self._peers:
            return None
        if self._key_of is None:
            return number_of_peer(peer)
        public = self._key_of(peer)
        return None if public is None else number_of(public)

    def accepts(self, key: bytes, copy: Copy) -> bool:
        record, longest_s = copy.record, self.settings.lifetime_s
        return (
            0 < copy.left_s <= record.lifetime_s <= longest_s
            and record.version / 1e9 + record.lifetime_s > self.peer.now() - longest_s
            and len(record.value) <= self.settings.record_bytes
            and is_intact(key, record, self._key_of)
        )

    async def ask(self, peer: PeerId, question: object) -> Any:
        began_s = self.peer.now()
        try:
            answer = await self.peer.request(
                peer, question, deadline=began_s + self.settings.query_timeout_s
            )
        except (DeadlineExceeded, PeerUnreachable):
            number = self.number(peer)
            if number is not None:
                self.table.silent(number)
                self._consider(self.table.index(number))
            return None
        except PeerError:
            # It refused, so it lives.
            answer = None
        else:
            self._measured(self.peer.now() - began_s)
        self._heard(peer)
        return answer

    def _measured(self, seconds: float) -> None:
        """Jacobson's estimate of round trips (RFC 6298, section 2), over all nodes."""
        if seconds < 0:
            return
        if self._mean_s < 0:
            self._mean_s, self._deviation_s = seconds, seconds / 2
            return
        self._deviation_s += (abs(seconds - self._mean_s) - self._deviation_s) / 4
        self._mean_s += (seconds - self._mean_s) / 8

    async def _search(
        self, number: int, deadline: float, holders: int = 0, start: tuple[PeerId, ...] = ()
    ) -> Lookup:
        settings = self.settings
        self._searched_s[self.table.index(number)] = self.peer.now()
        lookup = Lookup(
            self, number, k=settings.k, alpha=settings.alpha, deadline=deadline, holders=holders,
            start=start,
        )  # fmt: skip
        await lookup.run(self.group)
        return lookup

    async def _get(self, key: bytes, deadline: float, holders: int) -> Values:
        if holders < 1:
            raise UsageError(f"get: holders={holders}; need at least 1")
        found = {c.record.owner: c for c in self.held.under(key, now_s=self.peer.now())}
        hops = queries = 0
        if not found or holders > 1:
            wanted = holders - bool(found)
            lookup = await self._search(_number(key), deadline, wanted)
            queries = lookup.queries
            if not found:
                hops = lookup.hops
            for owner, copy in lookup.copies.items():
                if owner not in found or copy.record.version > found[owner].record.version:
                    found[owner] = copy
            if lookup.holders and (near := lookup.nearest_without) is not None:
                copies = tuple(lookup.copies.values())[:_AT_ONCE]
                self.group.start(self.ask(near, Store(key, copies, True)), isolate=True)
        newest = sorted(found.values(), key=lambda c: (-c.record.version, c.record.owner))
        return Values(
            {PeerId(c.record.owner): c.record.value for c in newest}, hops, queries,
            {PeerId(c.record.owner): c.record.lifetime_s - c.left_s for c in newest},
        )  # fmt: skip

    # Publishing.

    async def _publish(
        self, key: bytes, value: bytes, lifetime_s: float, renewed: bool, deadline: float
    ) -> int:
        now_s = self.peer.now()
        self._version = max(self._version + 1, to_ns(now_s))
        record = sealed(key, self.peer.id, self._version, lifetime_s, value, self._identity)
        self._own[key] = _Own(
            record, renewed, now_s + self.settings.republish_s, now_s + lifetime_s
        )  # fmt: skip
        return await self._store(key, Copy(record, lifetime_s), deadline)

    async def _store(self, key: bytes, copy: Copy, deadline: float) -> int:
        """Store at the k closest nodes; how many keep it."""
        targets = await self.closest(_number(key), deadline=deadline)
        store = Store(key, (copy,), False)
        kept = 0

        async def at(target: PeerId) -> None:
            nonlocal kept
            if target == self.peer.id:
                kept += self._keep_record(key, copy, target, cached=False)
            else:
                answer = await self.ask(target, store)
                kept += isinstance(answer, Stored) and answer.records == 1

        await self._all([lambda target=target: at(target) for target in targets])
        return kept

    async def _all(self, jobs: Sequence[Callable[[], Awaitable[object]]]) -> None:
        """Do all of them, some at a time."""

        async def lane(first: int) -> None:
            for job in jobs[first::_AT_ONCE]:
                await job()

        async with self.peer.tasks() as group:
            for first in range(min(_AT_ONCE, len(jobs))):
                group.start(lane(first))

    def _keep_record(self, key: bytes, copy: Copy, source: PeerId, *, cached: bool) -> bool:
        cached_s = self.settings.cache_s if cached else None
        return self.held.add(key, copy, source, now_s=self.peer.now(), cached_s=cached_s)

    # Answers to other nodes.

    async def _on_find(self, envelope: Envelope[Find]) -> Found:
        question, source = envelope.message, envelope.source
        if len(question.number) != KEY_BYTES:
            raise DecodeError(f"find: a number of {len(question.number)} bytes; need {KEY_BYTES}")
        self._heard(source)
        closest = self.table.closest(_number(question.number), self.settings.k + 1)
        copies: list[Copy] = []
        if question.wants:
            copies = self.held.under(
                question.number, now_s=self.peer.now(), most_bytes=_ANSWER_BYTES
            )
        peers = tuple([peer for peer in closest if peer != source][: self.settings.k])
        return Found(peers, tuple(copies))

    async def _on_store(self, envelope: Envelope[Store]) -> Stored:
        store, source = envelope.message, envelope.source
        if len(store.key) != KEY_BYTES:
            raise DecodeError(f"store: a key of {len(store.key)} bytes; need {KEY_BYTES}")
        self._heard(source)
        kept = 0
        for copy in store.copies[:_AT_ONCE]:
            if self.accepts(store.key, copy):
                kept += self._keep_record(store.key, copy, source, cached=store.cached)
        return Stored(kept)

    async def _on_ping(self, envelope: Envelope[Ping]) -> Pong:
        self._heard(envelope.source)
        return Pong()

    # The table.

    def _heard(self, peer: PeerId) -> None:
        number = self.number(peer)
        if number is not None and self.table.heard(number, peer) is not None:
            self._consider(self.table.index(number))

    def _consider(self, index: int) -> None:
        """Ping the weakest contact of a full bucket for which others wait, not too often."""
        weakest = self.table.weakest(index)
        if weakest is None or index in self._checking:
            return
        now_s = self.peer.now()
        if not self.table.is_suspect(weakest) and now_s < self._checked_s.get(index, now_s):
            return
        self._checked_s[index] = now_s + _CHECK_S
        self._checking.add(index)
        self.group.start(self._check(index, weakest), isolate=True)

    async def _check(self, index: int, number: int) -> None:
        try:
            answer = await self.ask(self.table.buckets[index][number], Ping())
        finally:
            self._checking.discard(index)
        if answer is None:
            self.table.evict(number)

    async def _refresh(self, index: int, deadline: float) -> None:
        """Search a number at a random place of a bucket's range."""
        self._refreshes += 1
        draw = repr(self.peer.uniform("refresh", self._refreshes)).encode()
        low = number_of(draw) & ((1 << (index - 1)) - 1)
        await self._search(self.table.own ^ (1 << (index - 1)) ^ low, deadline)

    async def _keep(self) -> None:
        """Refresh buckets, renew own records, store again what nobody stored for long."""
        peer, settings = self.peer, self.settings
        step_s = min(settings.refresh_s, settings.republish_s) / 4
        turn = 0
        while True:
            turn += 1
            # Not all at once, though all may have begun at once.
            pause_s = step_s * (0.5 + peer.uniform("upkeep", turn))
            await peer.sleep_until(peer.now() + pause_s)
            now_s = peer.now()
            self.held.sweep(now_s)
            limit_s = now_s + _UPKEEP_TIMEOUTS * settings.query_timeout_s
            if not len(self.table):
                if self._contacts:
                    await self.join(self._contacts, deadline=limit_s)
                continue
            await self._all([*self._buckets_due(now_s, limit_s), *self._records_due(now_s)])

    def _buckets_due(self, now_s: float, limit_s: float) -> list[Callable[[], Awaitable[object]]]:
        due: list[Callable[[], Awaitable[object]]] = [
            lambda index=index: self._refresh(index, limit_s)
            for index in self.table.buckets
            if self._searched_s.get(index, -math.inf) <= now_s - self.settings.refresh_s
        ]
        if due:
            silent = self.table.suspects(self.table.own, self.settings.k)
            due += [lambda each=each: self.ask(each, Ping()) for each in silent]
        return due

    def _records_due(self, now_s: float) -> list[Callable[[], Awaitable[object]]]:
        settings = self.settings
        timeout_s = _UPKEEP_TIMEOUTS * settings.query_timeout_s

        async def again(key: bytes, copy: Copy) -> None:
            await self._store(key, copy, self.peer.now() + timeout_s)

        async def renew(key: bytes) -> None:
            deadline = self.peer.now() + timeout_s
            await self._publish(key, b"", settings.lifetime_s, True, deadline)

        due: list[Callable[[], Awaitable[object]]] = []
        for key, own in list(self._own.items()):
            if not own.renewed and own.ends_s <= now_s:
                del self._own[key]
            elif own.again_s <= now_s:
                own.again_s = now_s + settings.republish_s
                copy = Copy(own.record, min(own.ends_s - now_s, own.record.lifetime_s))
                due.append(
                    (lambda key=key: renew(key))
                    if own.renewed
                    else (lambda key=key, copy=copy: again(key, copy))
                )
        # Its owner stores it twice in this time; if not, the owner is gone.
        neglected = self.held.neglected(now_s, now_s - 2 * settings.republish_s)
        due += [lambda key=key, copy=copy: again(key, copy) for key, copy in neglected]
        return due


def _place(kind: bytes, key: bytes) -> bytes:
    """Where a key lies: values and providers do not meet."""
    return hashlib.sha256(kind + b" " + key).digest()


def _number(key: bytes) -> int:
    return int.from_bytes(key, "big")
