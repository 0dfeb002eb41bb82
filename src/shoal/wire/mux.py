"""Records beside frames on a byte stream: chunks of large frames, credit, heartbeats.

Every unit of a stream begins with 32 bytes. "Sh" begins a whole small frame of
`shoal.wire.codec`; "Sm" begins a record:

    record    32 bytes: magic "Sm", kind, flags, checksum, number, part, back, total
    payload   of a chunk: its bytes of the frame; of a `HAVE`: one byte per chunk; else nothing

A frame of more than `SMALL_BYTES` travels as chunks of `CHUNK_BYTES` each (the last may be
shorter), so that a small frame or a heartbeat waits for one chunk and never for a tensor. Who cuts
frames into chunks is `shoal.wire.outflow`, who puts them together `shoal.wire.inflow`.
"""

from __future__ import annotations

import struct
from collections.abc import Sized
from enum import IntEnum
from typing import NamedTuple, Protocol

from shoal.base.errors import DecodeError, MessageTooLarge
from shoal.base.limits import Limits
from shoal.wire.codec import PREFIX, Buffer, Prefix, read_prefix
from shoal.wire.frame import place

CHUNK_BYTES = 1 << 18
SMALL_BYTES = 1 << 16
RECORD = struct.Struct("<2sBBIQIIQ")
MAGIC = b"Sm"
_MARK = MAGIC[1]
NOTHING = memoryview(b"")


class Kind(IntEnum):
    """What a record says. The caller of a connection sends frames, the called peer receives them.

    HELLO: first of both sides; number, part, total = the caller's lane, its count of lanes and its
    life, or the called peer's partial_bytes, open_frames and life. HAVE: of a frame that is partly
    here, the chunks that are. READY: no more HAVE and DONE of earlier connections; frames may come.
    CHUNK: bytes of frame `number` of `total` bytes, from `part * CHUNK_BYTES` on; it is delivered
    after frame `number - back` (0: after none). DONE: frame `number` is with its receiver. CREDIT:
    the caller may send `total` bytes of frames and chunks, counted from the connection's start.
    PING: answered by a PONG of the same number. BYE: the last word of a caller on this connection;
    all that it sent was received. LEAVE: the called peer would rather have the connection closed;
    the caller says BYE unless it needs it.
    """

    HELLO = 1
    HAVE = 2
    READY = 3
    CHUNK = 4
    DONE = 5
    CREDIT = 6
    PING = 7
    PONG = 8
    BYE = 9
    LEAVE = 10


class Record(NamedTuple):
    """The 32 bytes of a record; see `Kind` for what the fields mean.

    >>> Record.unpack(Record(Kind.PING, number=7).pack()).number
    7
    """

    kind: Kind
    flags: int = 0
    checksum: int = 0
    number: int = 0
    part: int = 0
    back: int = 0
    total: int = 0

    def pack(self) -> bytes:
        return RECORD.pack(MAGIC, *self)

    @classmethod
    def unpack(cls, data: Buffer) -> Record:
        """Inverse of `pack`; DecodeError for anything else."""
        magic, kind, *rest = RECORD.unpack_from(data)
        if magic != MAGIC or not 1 <= kind <= Kind.LEAVE:
            raise DecodeError(f"record: starts with {magic!r} and kind {kind}")
        return cls(Kind(kind), *rest)


def chunks_of(total: int) -> int:
    """How many chunks a frame of so many bytes has.

    >>> chunks_of(CHUNK_BYTES), chunks_of(CHUNK_BYTES + 1)
    (1, 2)
    """
    return -(-total // CHUNK_BYTES)


def chunk_bytes(total: int, index: int) -> int:
    """Bytes of a frame's chunk; not positive when it has no such chunk."""
    return min(CHUNK_BYTES, total - index * CHUNK_BYTES)


class Handler(Protocol):
    """What a `Cutter` does with records."""

    @property
    def ripe(self) -> Sized:
        """Frames that chunks completed."""
        ...

    def place(self, record: Record) -> memoryview:
        """Where the payload goes, `NOTHING` if there is none; raises for what must not come."""
        ...

    def take(self, record: Record, payload: memoryview) -> None:
        """The record and all of its payload are here."""
        ...

    def pop(self) -> memoryview:
        """The next of the ripe frames."""
        ...


class Cutter:
    """Cuts a stream of bytes into frames and records, in pieces of any size.

    Receive into `space(scratch)` with one scattering read and call `received(count, scratch)`; or
    give bytes that lie elsewhere to `feed(data)`. Then call `next` until it returns None. Chunks
    and the rest of a frame that is longer than the scratch are received in their final place.
    `received` and `feed` borrow the bytes until then; `hold` ends that early.
    """

    __slots__ = (
        "_borrowed", "_data", "_goal", "_handler", "_have", "_head", "_limits", "_record", "prefix",
        "small_bytes",
    )  # fmt: skip

    def __init__(self, limits: Limits, handler: Handler) -> None:
        self._limits = limits
        self._handler = handler
        self._head = memoryview(bytearray(PREFIX.size))
        self._goal: memoryview | None = None
        self._record: Record | None = None
        self._have = 0
        self._data = NOTHING
        self._borrowed = False
        self.prefix: Prefix | None = None
        """of the frame that `next` returned last, if it was looked at"""
        self.small_bytes = 0
        """bytes of frames in one piece that began so far"""

    @property
    def inside(self) -> Record | None:
        """The record whose payload is on its way."""
        return self._record if self._goal is not None else None

    @property
    def partial(self) -> bool:
        """Whether a unit has begun and not ended."""
        return self._have > 0 or self._goal is not None or len(self._data) > 0

    @property
    def fed(self) -> bool:
        """Whether `next` may have more without another byte."""
        return len(self._data) > 0

    def space(self, scratch: memoryview) -> list[memoryview]:
        """Where the next bytes go, in this order."""
        if self._goal is not None:
            return [self._goal[self._have :], self._behind(self._goal, scratch)]
        if self._have:
            return [self._head[self._have :], scratch]
        return [scratch]

    def _behind(self, goal: memoryview, scratch: memoryview) -> memoryview:
        """Where bytes behind the goal go. Behind a chunk comes another one, mostly: read its 32
        bytes and nothing that would have to be moved."""
        return self._head if self._record is not None and len(goal) > PREFIX.size else scratch

    def received(self, count: int, scratch: memoryview) -> None:
        """That many bytes are in what `space` returned."""
        goal = self._goal
        self._borrowed = True
        if goal is not None:
            behind = self._behind(goal, scratch)
            took = min(count, len(goal) - self._have)
            self._have += took
            self._data = behind[: count - took]
        elif self._have:
            took = min(count, PREFIX.size - self._have)
            self._have += took
            self._data = scratch[: count - took]
        else:
            self._data = scratch[:count]

    def feed(self, data: memoryview) -> None:
        """Bytes that were received elsewhere, such as those of an opened seal."""
        assert not self._data
        self._data = data
        self._borrowed = True

    def room(self, count: int) -> memoryview | None:
        """Where the next bytes lie in the end, if so many of them lie there side by side; say
        `filled` when they are there."""
        goal = self._goal
        if goal is None or self._data:
            return None
        end = self._have + count
        return goal[self._have : end] if end <= len(goal) else None

    def filled(self, count: int) -> None:
        """That many bytes are in what `room` returned."""
        self._have += count

    def hold(self) -> None:
        """Keep what is not cut yet in memory of its own."""
        if self._borrowed:
            self._data = memoryview(bytes(self._data))
            self._borrowed = False

    def next(self) -> memoryview | None:
        """The next whole frame, or None when more bytes are needed.

        Raises DecodeError or MessageTooLarge and is then of no more use. A small frame without
        segments may lie in the scratch: decode it at once.
        """
        while True:
            if self._goal is not None:
                if not self._filled(self._goal):
                    return None
                goal, record = self._goal, self._record
                self._goal, self._record, self._have = None, None, 0
                if record is None:
                    return goal
                self._handler.take(record, goal)
            if self._handler.ripe:
                self.prefix = None
                return self._handler.pop()
            data = self._data
            have = len(data)
            if self._have or have < PREFIX.size:
                if not have:
                    return None
                took = min(PREFIX.size - self._have, have)
                self._head[self._have : self._have + took] = data[:took]
                self._have += took
                self._data = data[took:]
                if self._have < PREFIX.size:
                    return None
                self._begin(self._head)
                self._have = 0 if self._record is not None else PREFIX.size
            elif data[1] == _MARK:
                self._data = data[PREFIX.size :]
                self._begin(data)
            else:
                total = self._small(data)
                prefix = self.prefix
                assert prefix is not None
                if total > have or prefix.body_bytes:
                    self._goal = place(total, total - prefix.body_bytes)
                else:
                    self._data = data[total:]
                    return data[:total]

    def _filled(self, goal: memoryview) -> bool:
        have, data = self._have, self._data
        took = min(len(goal) - have, len(data))
        if took:
            goal[have : have + took] = data[:took]
            self._have = have + took
            self._data = data[took:]
        return self._have == len(goal)

    def _begin(self, head: memoryview) -> None:
        """Start the unit that these 32 bytes begin."""
        if head[1] == _MARK:
            record = Record.unpack(head)
            self._goal = self._handler.place(record)
            self._record = record
            return
        total = self._small(head)
        assert self.prefix is not None
        self._goal = place(total, total - self.prefix.body_bytes)
        self._goal[: PREFIX.size] = head[: PREFIX.size]

    def _small(self, head: memoryview) -> int:
        """Read the prefix of a frame in one piece; how many bytes that has."""
        self.prefix = prefix = read_prefix(head, self._limits)
        total = PREFIX.size + prefix.rest_bytes
        if total > SMALL_BYTES:
            raise MessageTooLarge(
                f"frame: {total} bytes in one piece; above {SMALL_BYTES} it comes in chunks"
            )
        self.small_bytes += total
        return total
