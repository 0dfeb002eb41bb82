"""What the nodes of a hash table keep for others: sealed records, bounded per sender.

Under one key every peer has a record of its own (a subkey, as in Hivemind's DHT), so that writers
never overwrite each other. A record is sealed over its key: with its owner's signature if there are
identities, otherwise with a digest, which shows damage but no forgery.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.wire.identity import Identity, verify
from shoal.wire.message import message

KEY_BYTES = 32
_DIGEST_BYTES = 16
_HEAD = struct.Struct("<qqd")
_OVERHEAD_BYTES = 128
KeyOf = Callable[[PeerId], bytes | None]
"""The public key of a peer, None when it is unknown."""


@message
class Record:
    """One peer's value under a key. version: nanoseconds on the owner's clock, the larger one wins;
    lifetime_s: how long it lasts from then on."""

    owner: int
    version: int
    lifetime_s: float
    value: bytes
    seal: bytes


@message
class Copy:
    """A record on its way. left_s: of its lifetime, as the sender counts; nobody's clock is needed,
    and the way itself is not counted."""

    record: Record
    left_s: float


def sealed(
    key: bytes, owner: int, version: int, lifetime_s: float, value: bytes,
    identity: Identity | None = None,
) -> Record:  # fmt: skip
    """A record for a key of 32 bytes, signed if there is an identity.

    >>> record = sealed(bytes(32), 3, 1, 60.0, b"here")
    >>> is_intact(bytes(32), record), is_intact(b"1" * 32, record)
    (True, False)
    """
    text = _text(key, owner, version, lifetime_s, value)
    return Record(
        owner, version, lifetime_s, value, identity.sign(text) if identity else _sum(text)
    )


def is_intact(key: bytes, record: Record, key_of: KeyOf | None = None) -> bool:
    """Whether the record is as its owner sealed it for this key.

    key_of: the owners' public keys; a record of an owner without one is not accepted. Without
    `key_of` this shows damage only: anybody can seal in anybody's name.
    """
    if not (_fits(record.owner) and _fits(record.version) and math.isfinite(record.lifetime_s)):
        return False
    text = _text(key, record.owner, record.version, record.lifetime_s, record.value)
    if key_of is None:
        return record.seal == _sum(text)
    public = key_of(PeerId(record.owner))
    return public is not None and verify(public, text, record.seal)


def _fits(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


def _text(key: bytes, owner: int, version: int, lifetime_s: float, value: bytes) -> bytes:
    return b"shoal record" + key + _HEAD.pack(owner, version, lifetime_s) + value


def _sum(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:_DIGEST_BYTES]


def size_of(record: Record) -> int:
    """What a record counts for in the limits, in bytes."""
    return len(record.value) + _OVERHEAD_BYTES


@dataclass(slots=True)
class _Held:
    record: Record
    ends_s: float
    last_s: float
    until_s: float
    source: PeerId
    cached: bool
    stored_s: float


class Records:
    """The records that one node holds, by key and owner.

    most_bytes: of all; sender_bytes: of what one peer sent; record_bytes: of one value. When it is
    full, the sender that holds most gives way, so that a flood displaces itself. A record with a
    larger version replaces an older one of its owner. signed: says that seals are signatures;
    without them a record that another peer passed on never replaces what the owner sent itself.

    >>> held = Records(most_bytes=1000, sender_bytes=500, record_bytes=64)
    >>> record = sealed(bytes(32), 3, 1, 60.0, b"here")
    >>> held.add(bytes(32), Copy(record, 60.0), PeerId(3)), len(held.under(bytes(32), now_s=0.0))
    (True, 1)
    >>> held.under(bytes(32), now_s=61.0)
    []
    """

    def __init__(
        self, *, most_bytes: int, sender_bytes: int, record_bytes: int, signed: bool = False
    ) -> None:
        if min(most_bytes, sender_bytes, record_bytes) < 1:
            raise UsageError(
                f"Records: most_bytes={most_bytes}, sender_bytes={sender_bytes}, "
                f"record_bytes={record_bytes}; need positive numbers of bytes"
            )
        self._most_bytes = most_bytes
        self._sender_bytes = sender_bytes
        self._record_bytes = record_bytes
        self._signed = signed
        self._held: dict[bytes, dict[int, _Held]] = {}
        self._by_sender: dict[PeerId, dict[tuple[bytes, int], int]] = {}
        self._bytes_of: dict[PeerId, int] = {}
        self.held_bytes = 0

    def add(
        self, key: bytes, copy: Copy, source: PeerId, *, now_s: float = 0.0,
        cached_s: float | None = None,
    ) -> bool:  # fmt: skip
        """Keep an intact record for what is left of it; False when it is refused.

        Whoever stores it again may say that more is left, but from when it first came it is kept
        for its lifetime at most. cached_s: for how long at most, of a copy on the path of lookups,
        which gives way to records that belong here.
        """
        record, cached = copy.record, cached_s is not None
        ends_s = now_s + min(copy.left_s, record.lifetime_s)
        until_s = ends_s if cached_s is None else min(ends_s, now_s + cached_s)
        size = size_of(record)
        if len(record.value) > self._record_bytes:
            return False
        known = self._held.get(key, {}).get(record.owner)
        if known is not None:
            if record.version < known.record.version:
                return False
            if record.version == known.record.version and record != known.record:
                return False
            relayed = source != record.owner and known.source == known.record.owner
            if relayed and not self._signed and record.version > known.record.version:
                return False
            if cached and not known.cached:
                return True
            if record.version == known.record.version:
                known.ends_s = min(max(known.ends_s, ends_s), known.last_s)
                known.until_s = min(max(known.until_s, until_s), known.ends_s)
                known.cached = known.cached and cached
                known.stored_s = now_s
                return True
        freed = size_of(known.record) if known is not None and known.source == source else 0
        if self._bytes_of.get(source, 0) - freed + size > self._sender_bytes:
            return False
        if known is not None:
            self._drop(key, record.owner)
        if not self._make_room(size, source):
            return False
        last_s = now_s + record.lifetime_s
        held = _Held(record, ends_s, last_s, until_s, source, cached, now_s)
        self._held.setdefault(key, {})[record.owner] = held
        self._by_sender.setdefault(source, {})[key, record.owner] = size
        self._bytes_of[source] = self._bytes_of.get(source, 0) + size
        self.held_bytes += size
        return True

    def _make_room(self, size: int, source: PeerId) -> bool:
        while self.held_bytes + size > self._most_bytes:
            heaviest = max(self._bytes_of, key=lambda sender: self._bytes_of[sender], default=None)
            if heaviest is None or self._bytes_of[heaviest] < self._bytes_of.get(source, 0) + size:
                return False
            self._drop(*next(iter(self._by_sender[heaviest])))
        return True

    def _drop(self, key: bytes, owner: int) -> None:
        owners = self._held[key]
        held = owners.pop(owner)
        if not owners:
            del self._held[key]
        sender = self._by_sender[held.source]
        size = sender.pop((key, owner))
        self.held_bytes -= size
        self._bytes_of[held.source] -= size
        if not sender:
            del self._by_sender[held.source], self._bytes_of[held.source]

    def under(self, key: bytes, *, now_s: float, most_bytes: float = math.inf) -> list[Copy]:
        """The records under a key that have not expired, the newest first, as many as fit."""
        owners = self._held.get(key)
        if not owners:
            return []
        live = [
            Copy(held.record, held.ends_s - now_s)
            for held in owners.values()
            if held.until_s > now_s
        ]
        live.sort(key=lambda copy: (-copy.record.version, copy.record.owner))
        total = 0
        for place, copy in enumerate(live):
            total += size_of(copy.record)
            if total > most_bytes:
                return live[:place]
        return live

    def sweep(self, now_s: float) -> None:
        """Forget what has expired."""
        gone = [
            (key, owner)
            for key, owners in self._held.items()
            for owner, held in owners.items()
            if held.until_s <= now_s
        ]
        for key, owner in gone:
            self._drop(key, owner)

    def neglected(self, now_s: float, since_s: float) -> list[tuple[bytes, Copy]]:
        """The records that belong here, live, and were stored by nobody after `since_s`."""
        return [
            (key, Copy(held.record, held.ends_s - now_s))
            for key, owners in self._held.items()
            for held in owners.values()
            if held.until_s > now_s and held.stored_s <= since_s and not held.cached
        ]
