"""The receiving side of a link, without sockets: chunks put together, credit, answers.

An `Inflow` is what one peer has of another one's frames; it outlives connections, so that a
transfer goes on where it stopped. A `Receiver` is one connection of it.
"""

from __future__ import annotations

import zlib
from collections import deque

from shoal.base.errors import DecodeError, MessageTooLarge
from shoal.base.limits import Limits
from shoal.wire.codec import PREFIX, read_prefix
from shoal.wire.frame import place
from shoal.wire.mux import (
    CHUNK_BYTES,
    NOTHING,
    Cutter,
    Kind,
    Record,
    chunk_bytes,
    chunks_of,
)

CHECKED = 0x80
"""Flag of a chunk with a checksum; the other bits say where the frame's segments start."""
_ALIGN = 0x3F
_COMING, _HERE = 1, 2
# A caller that sends this much more control than it reads answers to is not served any longer.
_MOST_UNSENT = 1 << 16


class _Open:
    """A frame that is partly here."""

    __slots__ = ("after", "frame", "here", "left")

    def __init__(self, total: int, body: int, after: int) -> None:
        self.frame = place(total, body)
        self.here = bytearray(chunks_of(total))
        self.left = len(self.here)
        self.after = after


class Inflow:
    """Frames of one sender that come in chunks, over any number of connections.

    Bounded: `limits.open_frames` frames at once and `limits.partial_bytes` in all (one frame alone
    may be as long as `limits.frame_bytes`). Memory is taken as the bytes arrive.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ripe: deque[tuple[int, memoryview]] = deque()
        self._open: dict[int, _Open] = {}
        self._bytes = 0
        self._done: dict[int, None] = {}
        self._waiting: dict[int, list[int]] = {}

    @property
    def partial(self) -> int:
        """How many frames are partly here."""
        return len(self._open)

    def place(self, record: Record) -> memoryview:
        """Where the bytes of a chunk go; DecodeError or MessageTooLarge for what must not come."""
        opened = self._open.get(record.number)
        total, index = record.total, record.part
        if opened is None:
            opened = self._begin(record)
        elif total != len(opened.frame):
            raise DecodeError(f"chunk: frame {record.number} of {total} bytes was another one")
        if index >= len(opened.here) or opened.here[index]:
            raise DecodeError(f"chunk: {index} of frame {record.number} is none, or is here")
        opened.here[index] = _COMING
        start = index * CHUNK_BYTES
        return opened.frame[start : start + chunk_bytes(total, index)]

    def _begin(self, record: Record) -> _Open:
        limits, number, total = self.limits, record.number, record.total
        if number in self._done or not number:
            raise DecodeError(f"chunk: frame {number} was there already")
        if total > limits.frame_bytes:
            raise MessageTooLarge(f"chunk: frame of {total} bytes; limit {limits.frame_bytes}")
        if total < PREFIX.size:
            raise DecodeError(f"chunk: frame of {total} bytes; a prefix has {PREFIX.size}")
        if len(self._open) >= limits.open_frames:
            raise MessageTooLarge(f"chunk: {len(self._open)} frames are open already")
        if self._open and self._bytes + total > limits.partial_bytes:
            raise MessageTooLarge(
                f"chunk: {self._bytes + total} bytes in frames that are not whole"
            )
        before = number - record.back
        after = 0
        if record.back and before not in self._done:
            # What is older than all that is remembered was delivered long ago.
            oldest = next(iter(self._done), 0)
            if before in self._open or before >= oldest:
                after = before
                self._waiting.setdefault(before, []).append(number)
        opened = self._open[number] = _Open(total, record.flags & _ALIGN, after)
        self._bytes += total
        return opened

    def take(self, record: Record, payload: memoryview) -> None:
        """A chunk is in its place; complete frames go to `ripe` in the order of their kind."""
        if record.flags & CHECKED and zlib.crc32(payload) != record.checksum:
            raise DecodeError(f"chunk: {record.part} of frame {record.number} is damaged")
        number = record.number
        opened = self._open[number]
        if record.part == 0:
            prefix = read_prefix(payload, self.limits)
            if PREFIX.size + prefix.rest_bytes != record.total:
                raise DecodeError(f"chunk: frame of {record.total} bytes; its prefix says other")
        opened.here[record.part] = _HERE
        opened.left -= 1
        if not opened.left and not opened.after:
            self._deliver(number)

    def _deliver(self, number: int) -> None:
        numbers = [number]
        while numbers:
            number = numbers.pop()
            opened = self._open.pop(number)
            self._bytes -= len(opened.frame)
            self.ripe.append((number, opened.frame))
            self._done[number] = None
            if len(self._done) > 4 * self.limits.open_frames:
                del self._done[next(iter(self._done))]
            for next_number in self._waiting.pop(number, ()):
                follower = self._open[next_number]
                follower.after = 0
                if not follower.left:
                    numbers.append(next_number)

    def state(self) -> list[bytes]:
        """What to tell a caller that comes back: HAVE and DONE records."""
        told: list[bytes] = [Record(Kind.DONE, number=number).pack() for number in self._done]
        for number, opened in self._open.items():
            told.append(Record(Kind.HAVE, number=number, total=len(opened.here)).pack())
            told.append(bytes(state == _HERE for state in opened.here))
        return told

    def release(self, record: Record) -> None:
        """The connection that this chunk was coming on is closed: it may come on another one."""
        if opened := self._open.get(record.number):
            opened.here[record.part] = 0

    def clear(self) -> int:
        """Forget what is partly here; how many frames that was."""
        lost = len(self._open)
        self._open.clear()
        self._waiting.clear()
        self._bytes = 0
        return lost


class Receiver:
    """One connection's receiving end: `cutter` gives frames, `answers` are to be written back.

    It must be told the caller's `Inflow` before READY is sent (`join`), which the owner does when
    `hello` is there. A caller that sends more than it has credit for is refused.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cutter = Cutter(limits, self)
        self.hello: Record | None = None
        self.unsent = bytearray()
        self.heard_pings = 0
        self.ripe: deque[tuple[int, memoryview]] = deque()
        self.bye = False
        """whether the caller said that nothing more comes here"""
        self._granted = 0
        self._chunk_bytes = 0
        self._flow: Inflow | None = None

    @property
    def joined(self) -> bool:
        return self._flow is not None

    def join(self, flow: Inflow, life: int) -> None:
        """Welcome the caller: from here on its frames may come."""
        limits = self.limits
        self._flow = flow
        self.ripe = flow.ripe
        hello = Record(Kind.HELLO, number=limits.partial_bytes, part=limits.open_frames, total=life)
        self.unsent += hello.pack()
        for told in flow.state():
            self.unsent += told
        self.grant()
        self.unsent += Record(Kind.READY).pack()

    def leave(self) -> None:
        """The connection is closed: what it began may come on another one."""
        inside = self.cutter.inside
        if inside is not None and inside.kind is Kind.CHUNK and self._flow is not None:
            self._flow.release(inside)

    def grant(self) -> None:
        """Give credit for what was read since the last grant."""
        self._granted = self.spent + self.limits.window_bytes
        self.unsent += Record(Kind.CREDIT, total=self._granted).pack()

    def next(self) -> memoryview | None:
        """The next whole frame, or None when more bytes are needed."""
        frame = self.cutter.next()
        if frame is not None:
            if self.bye:
                raise DecodeError("connection: a frame after BYE")
            self._check()
        return frame

    def leave_please(self) -> None:
        """Ask the caller to close the connection."""
        self.unsent += Record(Kind.LEAVE).pack()

    @property
    def spent(self) -> int:
        """Bytes of frames and chunks that came, or of which the first came."""
        return self._chunk_bytes + self.cutter.small_bytes

    def _check(self) -> None:
        left = self._granted - self.spent
        if left < 0:
            raise DecodeError(f"connection: {self.spent} bytes; credit for {self._granted}")
        if left < self.limits.window_bytes * 3 // 4:
            self.grant()

    # Handler of the cutter.

    def place(self, record: Record) -> memoryview:
        if self.bye:
            raise DecodeError(f"connection: {record.kind.name} after BYE")
        if record.kind is Kind.CHUNK and self._flow is not None:
            return self._flow.place(record)
        if record.kind in (Kind.PING, Kind.BYE) and self._flow is not None:
            return NOTHING
        if record.kind is Kind.HELLO and self.hello is None:
            return NOTHING
        raise DecodeError(f"connection: unexpected {record.kind.name}")

    def take(self, record: Record, payload: memoryview) -> None:
        if record.kind is Kind.CHUNK:
            assert self._flow is not None
            self._chunk_bytes += PREFIX.size + len(payload)
            self._check()
            self._flow.take(record, payload)
        elif record.kind is Kind.PING:
            self.heard_pings += 1
            if len(self.unsent) > _MOST_UNSENT + self.limits.open_frames * 256:
                raise DecodeError("connection: asks and does not read")
            self.unsent += Record(Kind.PONG, number=record.number).pack()
        elif record.kind is Kind.BYE:
            self.bye = True
        else:
            self.hello = record

    def pop(self) -> memoryview:
        number, frame = self.ripe.popleft()
        self.unsent += Record(Kind.DONE, number=number).pack()
        return frame
