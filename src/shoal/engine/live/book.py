"""The address book of a run that nobody launches: who is which peer, and where it listens.

Every peer signs a record of itself and counts its version up with every change, so that records can
pass through any hands: the newest one of each peer wins, in whatever order they come. An id belongs
to the key that was seen with it first; a peer that restarts needs its key to be itself again.

What this rests on: with a list of allowed names, that their holders do not lie about themselves;
with none (an open run) anybody may take an id that is still free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.engine.live.control import Address
from shoal.wire import codec
from shoal.wire.identity import KEY_BYTES, Identity, peer_name, verify
from shoal.wire.message import message

RUN_BYTES = 16
PEERS_MAX = 4096
"""Most peers of a run with an address book: every exchange carries the whole of it."""
_HOST_MAX = 255
_STATES = ("here", "done", "left")


@message
class Record:
    """What a peer says of itself.

    version: nanoseconds of its clock when it said so, but always more than the version before.
    incarnation: the version with which its process began. state: "here"; "done", when its program
    has ended; "left", when it was told to stop. signature: 64 bytes over all else and the run.
    """

    peer: int
    host: str
    port: int
    public: bytes
    version: int
    incarnation: int
    state: str
    signature: bytes

    @property
    def address(self) -> Address:
        return self.host, self.port


def signed(record: Record, run: bytes, identity: Identity) -> Record:
    """The record with its owner's signature, valid in one run.

    >>> own = Identity.from_seed(bytes(32))
    >>> record = Record(3, "127.0.0.1", 7000, own.public, 1, 1, "here", b"")
    >>> Book(bytes(16), 4).take([signed(record, bytes(16), own)])
    [3]
    """
    return _with_signature(record, identity.sign(_text(record, run)))


def _with_signature(record: Record, signature: bytes) -> Record:
    return Record(
        record.peer, record.host, record.port, record.public, record.version, record.incarnation,
        record.state, signature,
    )  # fmt: skip


def _text(record: Record, run: bytes) -> bytes:
    return b"shoal address" + run + b"".join(codec.encode(_with_signature(record, b"")))


@dataclass(frozen=True)
class Conflict:
    """A record that claims an id which another key holds."""

    peer: int


class Book:
    """The records that one peer knows. `take` is the only way in, and checks everything.

    run: 16 bytes that all peers of a run share; allow: the names (`peer_name`) of the keys that may
    take part, None = any. kept: ids below this one go only to those that ask for them by number.

    >>> book = Book(bytes(16), 2)
    >>> book.free(), book.addresses()
    (0, {})
    """

    def __init__(
        self, run: bytes, peers: int, allow: Collection[str] | None = None, kept: int = 0
    ) -> None:
        if not 1 <= peers <= PEERS_MAX:
            raise UsageError(
                f"address book: {peers} peers; need 1 to {PEERS_MAX} (run more of them in one "
                "process each with run_live)"
            )
        self.run = run
        self.peers = peers
        self.records: dict[int, Record] = {}
        self._kept = kept
        self._allow = None if allow is None else frozenset(allow)
        self._reserved: dict[bytes, int] = {}

    def allows(self, public: bytes) -> bool:
        """Whether the holder of this key may take part."""
        return len(public) == KEY_BYTES and (
            self._allow is None or peer_name(public) in self._allow
        )

    def take(self, records: Iterable[Record]) -> list[int]:
        """Keep what is newer than what is known; the peers whose records changed, ascending.

        Records that are malformed, of strangers, not signed by their key or of another run are left
        out, and so are those that claim another's id.
        """
        changed = set()
        for record in records:
            known = self.records.get(record.peer)
            if known is not None:
                if record.public != known.public or record.version <= known.version:
                    continue
            elif any(each.public == record.public for each in self.records.values()):
                continue  # One key, one peer.
            if not self._sound(record):
                continue
            self.records[record.peer] = record
            self._reserved.pop(record.public, None)
            changed.add(record.peer)
        return sorted(changed)

    def _sound(self, record: Record) -> bool:
        return (
            0 <= record.peer < self.peers
            and 0 < len(record.host) <= _HOST_MAX
            and 0 < record.port < 1 << 16
            and 0 < record.incarnation <= record.version < 1 << 63
            and record.state in _STATES
            and self.allows(record.public)
            and verify(record.public, _text(record, self.run), record.signature)
        )

    def seat(self, public: bytes, wish: int) -> int | Conflict | None:
        """The id for a key: its own, the one that it wishes for, or for wish -1 the first free one.

        None when all are taken. What is given out stays reserved for this key, so that two that
        come at once get different ones.
        """
        for record in self.records.values():
            if record.public == public:
                return record.peer if wish in (-1, record.peer) else Conflict(wish)
        if wish >= 0:
            if wish >= self.peers or wish in self.records:
                return Conflict(wish)
            return wish
        reserved = self._reserved.get(public)
        if reserved is not None and reserved not in self.records:
            return reserved
        found = self.free()
        if found is not None:
            self._reserved[public] = found
        return found

    def free(self) -> int | None:
        """The first id that nobody holds and that is neither kept nor reserved."""
        taken = {*self.records, *self._reserved.values()}
        return next((peer for peer in range(self._kept, self.peers) if peer not in taken), None)

    def addresses(self) -> dict[int, Address]:
        """Where each known peer listens."""
        return {peer: self.records[peer].address for peer in sorted(self.records)}
