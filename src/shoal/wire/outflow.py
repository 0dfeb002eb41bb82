"""The sending side of a link, without sockets: what is unsent for one peer, and in which order.

Records go first, then small frames in the order in which they were sent, and after each batch of
these one chunk of a large frame, large frames of different kinds by turns. Messages of one kind
keep the order in which they were sent, whatever their size, and so do small ones of all kinds. A
large frame may be overtaken by messages of other kinds.

An `Outflow` outlives connections; a `Lane` is one connection of it. Large frames are kept until
their receiver has them, so that after a broken connection only what is missing is sent again. Small
frames are kept until they are written; those that were on the way then are lost.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import accumulate

from shoal.base.errors import DecodeError
from shoal.base.limits import Limits
from shoal.wire.codec import PREFIX, Buffer, read_prefix
from shoal.wire.inflow import CHECKED
from shoal.wire.mux import (
    CHUNK_BYTES,
    NOTHING,
    SMALL_BYTES,
    Cutter,
    Kind,
    Record,
    chunk_bytes,
    chunks_of,
)

# What is handed to a connection at once: all of it goes before a later record or small frame.
_BATCH_BYTES = CHUNK_BYTES
# Linux takes at most 1,024 buffers in one gathering write; far fewer already hide the call's cost.
_MOST_BUFFERS = 128
_CODE = slice(4, 8)


class _Large:
    """A frame that travels in chunks."""

    __slots__ = (
        "_ends", "after", "again", "back", "body", "code", "lanes", "next", "number", "parts",
        "size", "taking_turns",
    )  # fmt: skip

    def __init__(
        self, number: int, code: int, parts: list[memoryview], size: int, after: int
    ) -> None:
        self.number = number
        self.code = code
        self.size = size
        self.back = 0
        self.after = after
        """how many small frames were pushed before it"""
        self.body = size - read_prefix(parts[0]).body_bytes
        self.next = 0
        self.again: list[int] = []
        self.lanes = bytearray(chunks_of(size))
        """for each chunk the lane that took it, plus one; 0 of those that none took"""
        self.taking_turns = False
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    @property
    def unsent(self) -> bool:
        return bool(self.again) or self.next < len(self.lanes)

    def may_go(self, lane: int, smalls: int) -> bool:
        """Whether its next chunk may take this lane, with so many small frames on their way.

        Its first chunk follows earlier small frames on their connection, so that it is not complete
        before they are there.
        """
        first = (self.again[-1] if self.again else self.next) == 0
        return not first or (lane == 0 and smalls >= self.after)

    def take(self, lane: int) -> int:
        """The next chunk that this lane may send."""
        if self.again:
            index = self.again.pop()
        else:
            index = self.next
            self.next += 1
        self.lanes[index] = lane + 1
        return index

    def chunk(self, index: int) -> list[memoryview]:
        """Slices of the frame's own buffers."""
        at = index * CHUNK_BYTES
        left = chunk_bytes(self.size, index)
        part = bisect_right(self._ends, at)
        found = []
        while left:
            buffer = self.parts[part]
            start = at - (self._ends[part] - len(buffer))
            piece = buffer[start : start + left]
            found.append(piece)
            at += len(piece)
            left -= len(piece)
            part += 1
        return found


class Outflow:
    """Frames for one peer, by reference, and the turns in which they go."""

    def __init__(self, limits: Limits, checksums: bool = False) -> None:
        self.limits = limits
        self.checksums = checksums
        self.waiting_bytes = 0
        """of frames, not yet written"""
        self.life: int | None = None
        """the receiver's, once it is known"""
        self.received = 0
        """large frames that are with their receiver"""
        self.forgotten = 0
        """frames that were meant for an earlier life of the receiver"""
        self._broken = (0, 0)
        self.small: deque[tuple[list[memoryview], int]] = deque()
        self._smalls = 0
        self._larges = 0
        self.smalls_gone = 0
        """small frames that are written"""
        self._large: dict[int, _Large] = {}
        self._queues: dict[int, deque[_Large]] = {}
        self._idle: deque[int] = deque()
        self._turns: deque[_Large] = deque()
        self._latest: dict[int, int] = {}
        self._begun: dict[int, int] = {}
        self._open = 0
        self._open_bytes = 0

    def push(self, frame: Iterable[Buffer]) -> None:
        """Append the buffers of one frame; they stay borrowed until it is settled."""
        parts: list[memoryview] = []
        size = 0
        for buffer in frame:
            if length := len(buffer):
                parts.append(memoryview(buffer))
                size += length
        self.waiting_bytes += size
        if size <= SMALL_BYTES and not self._latest:
            self._smalls += 1
            self.small.append((parts, size))
            return
        head = parts[0] if len(parts[0]) >= PREFIX.size else memoryview(b"".join(parts))
        code = int.from_bytes(head[_CODE], "little")
        if size <= SMALL_BYTES and code not in self._latest:
            self._smalls += 1
            self.small.append((parts, size))
            return
        if head is not parts[0]:
            parts = [head]
        self._larges += 1
        large = _Large(self._larges, code, parts, size, self._smalls)
        self._large[large.number] = large
        self._latest[code] = large.number
        queue = self._queues.get(code)
        if queue is None:
            queue = self._queues[code] = deque()
            self._idle.append(code)
        queue.append(large)

    @property
    def pushed(self) -> tuple[int, int]:
        """A mark for `settled`."""
        return self._smalls, self._larges

    def settled(self, mark: tuple[int, int]) -> bool:
        """Whether all frames pushed before the mark are written (small) or received (large)."""
        return self.smalls_gone >= mark[0] and next(iter(self._large), mark[1] + 1) > mark[1]

    @property
    def offers(self) -> bool:
        """Whether a lane with credit might find something to send."""
        return bool(self.small or self._turns or self._idle)

    @property
    def busy(self) -> bool:
        """Whether a frame is not settled."""
        return not self.settled(self.pushed)

    def clear(self) -> int:
        """Forget everything; how many frames were not settled."""
        lost = self._smalls - self.smalls_gone + len(self._large)
        self.small.clear()
        self.smalls_gone = self._smalls
        for each in (self._large, self._queues, self._idle, self._turns, self._latest,
                     self._begun):  # fmt: skip
            each.clear()
        self._open = self._open_bytes = self.waiting_bytes = 0
        return lost

    def met(self, life: int) -> None:
        """The receiver's life is known; of another one than before, it gets nothing that was
        pushed before the last connection broke."""
        if self.life is not None and life != self.life:
            smalls = list(self.small)[max(0, len(self.small) - (self._smalls - self._broken[0])) :]
            larges = [each for n, each in self._large.items() if n > self._broken[1]]
            self.forgotten += self.clear() - len(smalls) - len(larges)
            for parts in [*(parts for parts, _ in smalls), *(each.parts for each in larges)]:
                self.push(parts)
        self.life = life

    def broke(self) -> None:
        """A connection broke."""
        self._broken = self.pushed

    # What lanes do.

    def large(self, lane: int) -> _Large | None:
        """The large frame whose turn it is on this lane."""
        while self._idle and self._may_open(self._queues[self._idle[0]][0]):
            self._begin(self._idle.popleft())
        turns, smalls = self._turns, self._smalls - len(self.small)
        for _ in range(len(turns)):
            turns.rotate(-1)
            if turns[-1].may_go(lane, smalls):
                return turns[-1]
        return None

    def _may_open(self, large: _Large) -> bool:
        limits = self.limits
        return not self._open or (
            self._open < limits.open_frames
            and self._open_bytes + large.size <= limits.partial_bytes
        )

    def _begin(self, code: int) -> None:
        large = self._queues[code].popleft()
        earlier = self._begun.get(code)
        if earlier in self._large:
            large.back = large.number - earlier
        self._begun[code] = large.number
        self._open += 1
        self._open_bytes += large.size
        self._turn(large)

    def _turn(self, large: _Large) -> None:
        if not large.taking_turns:
            large.taking_turns = True
            self._turns.append(large)

    def took(self, large: _Large) -> None:
        """A chunk of it is on its way; its kind's next frame begins after its last one."""
        if large.unsent:
            return
        large.taking_turns = False
        self._turns.remove(large)
        queue = self._queues.get(large.code)
        if queue is None:
            return
        if not queue:
            del self._queues[large.code]
        elif large.code not in self._idle:
            self._idle.append(large.code)

    def done(self, number: int) -> None:
        """The receiver has it."""
        large = self._large.pop(number, None)
        if large is None:
            return
        if large.taking_turns or large.unsent:
            raise DecodeError(f"connection: frame {number} was received before it was sent")
        self.received += 1
        for newest in (self._latest, self._begun):
            if newest.get(large.code) == number:
                del newest[large.code]
        self._open -= 1
        self._open_bytes -= large.size

    def missing(self, lane: int, have: dict[int, memoryview]) -> None:
        """A lane is connected again: send again what it took and the receiver does not have."""
        mark = lane + 1
        for number, large in self._large.items():
            here = have.get(number)
            if here is not None and len(here) != len(large.lanes):
                raise DecodeError(f"connection: {len(here)} chunks of frame {number}")
            for index, by in enumerate(large.lanes):
                if by == mark and not (here is not None and here[index]):
                    large.lanes[index] = 0
                    large.again.append(index)
                    self.waiting_bytes += chunk_bytes(large.size, index)
            if large.again:
                # From the front, so that the prefix comes early.
                large.again.sort(reverse=True)
                self._turn(large)


class Lane:
    """One connection's sending end: `head` and `advance` write, `cutter` takes the answers.

    number, lanes: which of how many connections of the flow this is; the first has the small
    frames. Nothing but the greeting is sent before the called peer says READY.
    """

    def __init__(self, flow: Outflow, number: int, lanes: int, life: int) -> None:
        self.flow = flow
        self.cutter = Cutter(flow.limits, self)
        self.ready = False
        self.life: int | None = None
        """the called peer's, once it is known"""
        self.pong = -1
        """number of the last ping that was answered"""
        self.sent_bytes = 0
        self.ripe = ()
        self.closing = False
        """whether nothing more goes here"""
        self.unwanted = False
        """whether the called peer asked to close the connection"""
        self._number = number
        self._urgent: list[bytes] = [
            Record(Kind.HELLO, number=number, part=lanes, total=life).pack()
        ]
        self._units: deque[tuple[list[memoryview], int, int]] = deque()
        self._written = 0
        self._granted = 0
        self._spent = 0
        self._have: dict[int, memoryview] = {}

    # Writing.

    def ping(self, number: int) -> None:
        self._urgent.append(Record(Kind.PING, number=number).pack())

    def bye(self) -> None:
        """Say the last word; the flow must have nothing on its way here."""
        self.closing = True
        self._urgent.append(Record(Kind.BYE).pack())

    def head(self) -> list[memoryview]:
        """What to hand to the next gathering write; empty when there is nothing to send."""
        if not self.wants:
            return []
        parts: list[memoryview] = []
        skip = self._written
        for buffers, _, _ in self._units:
            if not skip:
                parts += buffers
            else:
                for buffer in buffers:
                    if skip < len(buffer):
                        parts.append(buffer[skip:])
                        skip = 0
                    else:
                        skip -= len(buffer)
            if len(parts) >= _MOST_BUFFERS:
                break
        return parts[:_MOST_BUFFERS]

    @property
    def wants(self) -> bool:
        """Whether something could be written now."""
        if not self._units and (self._urgent or self.flow.offers):
            self._fill()
        return bool(self._units)

    def _fill(self) -> None:
        """The next batch: records, small frames, and a chunk."""
        units, flow = self._units, self.flow
        if self._urgent:
            for record in self._urgent:
                units.append(([memoryview(record)], len(record), _CONTROL))
            self._urgent.clear()
        if not self.ready or self.closing:
            return
        room = min(_BATCH_BYTES, self._granted - self._spent)
        if not self._number:
            small = flow.small
            while small and small[0][1] <= room and len(units) < _MOST_BUFFERS:
                parts, size = small.popleft()
                units.append((parts, size, _SMALL))
                room -= size
                self._spent += size
        room = self._granted - self._spent
        if room < CHUNK_BYTES + PREFIX.size:
            return
        large = flow.large(self._number)
        if large is None:
            return
        index = large.take(self._number)
        parts = large.chunk(index)
        size = chunk_bytes(large.size, index)
        self._spent += PREFIX.size + size
        flags, check = large.body % 64, 0
        if flow.checksums:
            flags |= CHECKED
            for part in parts:
                check = zlib.crc32(part, check)
        record = Record(
            Kind.CHUNK, flags, check, large.number, index, large.back, large.size
        ).pack()
        units.append(([memoryview(record), *parts], PREFIX.size + size, _CHUNK))
        flow.took(large)

    def advance(self, count: int) -> None:
        """That many bytes of the head are written."""
        self.sent_bytes += count
        self._written += count
        units, flow = self._units, self.flow
        while units and self._written >= units[0][1]:
            _, size, what = units.popleft()
            self._written -= size
            if what == _SMALL:
                flow.smalls_gone += 1
                flow.waiting_bytes -= size
            elif what == _CHUNK:
                flow.waiting_bytes -= size - PREFIX.size

    def drop(self) -> None:
        """The connection is gone: give back the small frames that were not written whole."""
        flow = self.flow
        for parts, size, what in reversed(self._units):
            if what == _SMALL:
                flow.small.appendleft((parts, size))
            elif what == _CHUNK:
                # It is waiting; `missing` counts it again when the connection is back.
                flow.waiting_bytes -= size - PREFIX.size
        self._units.clear()
        self._written = 0

    # What the called peer says: handler of the cutter.

    def heard(self) -> None:
        """Take what was received; DecodeError for what no called peer says."""
        if self.cutter.next() is not None:
            raise DecodeError("connection: frames on a connection that only listens")

    def place(self, record: Record) -> memoryview:
        kind = record.kind
        if kind in (Kind.CHUNK, Kind.PING, Kind.BYE) or (self.life is None) != (kind is Kind.HELLO):
            raise DecodeError(f"connection: unexpected {kind.name}")
        if self.ready and kind in (Kind.HAVE, Kind.READY):
            raise DecodeError(f"connection: {kind.name} after READY")
        if kind is not Kind.HAVE:
            return NOTHING
        if record.total > chunks_of(self.flow.limits.frame_bytes):
            raise DecodeError(f"connection: {record.total} chunks of one frame")
        return memoryview(bytearray(record.total))

    def take(self, record: Record, payload: memoryview) -> None:
        match record.kind:
            case Kind.HELLO:
                self.life = record.total
                self.flow.met(record.total)
            case Kind.HAVE:
                self._take_have(record.number, payload)
            case Kind.READY:
                self.ready = True
                self.flow.missing(self._number, self._have)
                self._have.clear()
            case Kind.DONE:
                self.flow.done(record.number)
            case Kind.CREDIT:
                self._granted = max(self._granted, record.total)
            case Kind.LEAVE:
                self.unwanted = True
            case _:
                self.pong = max(self.pong, record.number)

    def _take_have(self, number: int, here: memoryview) -> None:
        if len(self._have) >= self.flow.limits.open_frames:
            raise DecodeError("connection: more frames than can be open")
        self._have[number] = here

    def pop(self) -> memoryview:
        raise AssertionError("a called peer sends no frames")


_CONTROL, _SMALL, _CHUNK = range(3)
