"""Items from one peer to another in order and whole, over messages that may be lost.

An item is cut into pieces. The receiver acknowledges what has come and says how far the sender may
go: as far as the reader has read, and a window more. So a slow reader holds up its writer and
nobody else, and what is on the way stays bounded. Pieces are a kind of their own, which small
messages overtake; on a shared uplink these wait for a window at most.

Lost pieces are sent again when an acknowledgement names them as gaps, or by a timer (Jacobson's
estimate, RFC 6298); connections of `live` lose nothing while they last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.base.errors import DecodeError, MessageTooLarge
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.overlay._payload import Parcel
from shoal.parts.overlay._signal import Signal
from shoal.wire.message import Packed, message

_OVERHEAD_BYTES = 64
_MOST_GAPS = 16
_LEAST_TIMER_S = 0.1
_MOST_TIMER_S = 5.0


@message(tag=("life", "call", "answer", "number"))
class Piece:
    """A part of an item. number: from 0 in each direction (-1: it only asks for an `Ack`); size:
    of the whole item, in its first piece; last: the item ends; end: no more items come; tries: how
    often it was sent before."""

    life: int
    call: int
    answer: bool
    number: int
    form: str
    size: int
    last: bool
    end: bool
    tries: int
    body: Packed


@message(tag=("life", "call", "answer", "next"))
class Ack:
    """All pieces before `next` are here, and none of `gaps`; `most`: bytes that may be sent in all,
    counted from the start; `echo`, `tries`: the piece that this answers, if any (-1)."""

    life: int
    call: int
    answer: bool
    next: int
    gaps: tuple[int, ...]
    most: int
    echo: int = -1
    tries: int = 0


@dataclass(frozen=True)
class Way:
    """Whose items these are: a call, and the direction."""

    life: int
    call: int
    answer: bool


def _weight(body_bytes: int) -> int:
    return body_bytes + _OVERHEAD_BYTES


@dataclass(slots=True)
class _Sent:
    piece: Piece
    times_s: list[float]


class Sending:
    """The side that writes. check: raises what ended the call, called at every step."""

    def __init__(
        self, peer: Peer, group: TaskGroup, to: PeerId, way: Way, signal: Signal,
        check: Callable[[], None], *, until_s: float, piece_bytes: int, window_bytes: int,
        timer_s: float,
    ) -> None:  # fmt: skip
        self._peer, self._group, self._to, self._way = peer, group, to, way
        self._signal, self._check = signal, check
        self._until_s = until_s
        self._piece_bytes = piece_bytes
        self._flying: dict[int, _Sent] = {}
        self._number = self._sent_bytes = 0
        self._most = window_bytes
        self._timer_s = self._usual_s = timer_s
        self._most_s = max(timer_s, _MOST_TIMER_S)
        self._mean_s = self._deviation_s = -1.0
        self._again: dict[int, None] = {}
        self._waiting = self._closed = False
        self._keeper: TaskHandle | None = None

    async def put(self, parcel: Parcel) -> None:
        """Send an item; returns when all of it is on its way."""
        left = size = parcel.size_bytes
        for body in parcel.pieces(self._piece_bytes):
            left -= len(body)
            await self._send(Packed(memoryview(body)), parcel.form, size, last=left == 0, end=False)

    async def end(self) -> None:
        """Say that no more comes, and wait until all of it is there."""
        await self._send(Packed(b""), "", 0, last=True, end=True)
        while self._flying:
            self._check()
            await self._signal.wait(self._until_s)

    def close(self) -> None:
        """The call is over: nothing is sent again."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()

    async def _send(self, body: Packed, form: str, size: int, *, last: bool, end: bool) -> None:
        weight = _weight(body.byte_count())
        while self._sent_bytes + weight > self._most:
            self._check()
            self._waiting = True
            self._keep()
            await self._signal.wait(self._until_s)
        self._waiting = False
        self._check()
        piece = self._piece(self._number, form, size, last, end, body)
        self._flying[self._number] = _Sent(piece, [self._peer.now()])
        self._number += 1
        self._sent_bytes += weight
        self._keep()
        await self._peer.send(self._to, piece)

    def _piece(
        self, number: int, form: str, size: int, last: bool, end: bool, body: Packed
    ) -> Piece:
        way = self._way
        return Piece(way.life, way.call, way.answer, number, form, size, last, end, 0, body)

    def _keep(self) -> None:
        if (self._keeper is None or self._keeper.done) and not self._closed:
            self._keeper = self._group.start(self._send_again(), isolate=True)

    async def _send_again(self) -> None:
        """While something is on its way, send what was lost; ask, when only the window is shut: an
        `Ack` that opened it may have been lost."""
        asked_s = self._peer.now()
        while self._flying or self._waiting:
            for number in list(self._again):
                sent = self._flying.get(number)
                if sent is not None and self._peer.now() - sent.times_s[-1] >= max(
                    self._mean_s, 0.0
                ):
                    await self._repeat(sent)
            self._again.clear()
            oldest = next(iter(self._flying.values()), None)
            due_s = (asked_s if oldest is None else oldest.times_s[-1]) + self._timer_s
            if self._peer.now() < due_s:
                await self._signal.wait(due_s)
                continue
            self._timer_s = min(2 * self._timer_s, self._most_s)
            asked_s = self._peer.now()
            if oldest is not None:
                await self._repeat(oldest)
            else:
                await self._peer.send(self._to, self._piece(-1, "", 0, False, False, Packed(b"")))

    async def _repeat(self, sent: _Sent) -> None:
        # Every try has a number of its own, so that its answer tells the time of that one: on a
        # busy line the timer would otherwise never learn that answers take longer than it waits.
        piece: Any = sent.piece
        sent.piece = msgspec.structs.replace(piece, tries=len(sent.times_s))
        sent.times_s.append(self._peer.now())
        await self._peer.send(self._to, sent.piece)

    def acked(self, ack: Ack) -> None:
        """The receiver said what it has."""
        self._most = max(self._most, ack.most)
        gaps = frozenset(ack.gaps)
        last = max(gaps, default=-1)
        # Between two gaps everything is there.
        # Only the piece that this answers tells a time; acknowledgements of others may be lost.
        echoed = self._flying.get(ack.echo)
        if echoed is not None and 0 <= ack.tries < len(echoed.times_s):
            self._measured(self._peer.now() - echoed.times_s[ack.tries])
        for number in [n for n in self._flying if n < ack.next or (n < last and n not in gaps)]:
            del self._flying[number]
            # What comes through ends the doubling: pieces are lost one by one here, not by jams.
            self._timer_s = self._usual_s
        for number in ack.gaps:
            self._again[number] = None
        self._signal.fire()

    def _measured(self, seconds: float) -> None:
        if seconds < 0:
            return
        if self._mean_s < 0:
            self._mean_s, self._deviation_s = seconds, seconds / 2
        else:
            self._deviation_s += (abs(seconds - self._mean_s) - self._deviation_s) / 4
            self._mean_s += (seconds - self._mean_s) / 8
        usual_s = self._mean_s + 4 * self._deviation_s
        self._usual_s = min(max(_LEAST_TIMER_S, usual_s), self._most_s)


class Receiving:
    """The side that reads. poke: called when nothing has come for a while."""

    def __init__(
        self, peer: Peer, source: PeerId, way: Way, signal: Signal, check: Callable[[], None],
        *, until_s: float, window_bytes: int, most_bytes: int, poke_s: float,
    ) -> None:  # fmt: skip
        self._peer, self._source, self._way = peer, source, way
        self._signal, self._check = signal, check
        self._window_bytes, self._most_bytes = window_bytes, most_bytes
        self._until_s, self._poke_s = until_s, poke_s
        self._here: dict[int, Piece] = {}
        self._next = self._read = 0
        self._last = -1
        self._held_bytes = self._read_bytes = self._told_bytes = 0
        self._ended = False

    def arrived(self, piece: Piece) -> Ack:
        """Keep a piece that is new; what to answer. What is beyond the window is not kept."""
        number, weight = piece.number, _weight(piece.body.byte_count())
        # The piece that the reader waits for fits always: it is read at once.
        fits = number == self._read or self._held_bytes + weight <= self._window_bytes
        if number >= self._read and number not in self._here and fits:
            self._here[number] = piece
            self._held_bytes += weight
            self._last = max(self._last, number)
        while self._next in self._here:
            self._next += 1
        self._signal.fire()
        return self._ack(number, piece.tries)

    def _ack(self, echo: int = -1, tries: int = 0) -> Ack:
        way, gaps = self._way, []
        for number in range(self._next, self._last):
            if number not in self._here:
                gaps.append(number)
                if len(gaps) == _MOST_GAPS:
                    break
        self._told_bytes = self._read_bytes
        most = self._read_bytes + self._window_bytes
        return Ack(way.life, way.call, way.answer, self._next, tuple(gaps), most, echo, tries)

    async def item(self, poke: Callable[[], object] | None = None) -> tuple[str, bytearray] | None:
        """The next item as (form, bytes); None after the last one."""
        if self._ended:
            return None
        data, form, size = bytearray(), "", -1
        while True:
            piece = await self._piece(poke)
            if piece.end:
                self._ended = True
                return None
            if size < 0:
                form, size = piece.form, piece.size
                if not 0 <= size <= self._most_bytes:
                    raise MessageTooLarge(f"item of {size} bytes; limit {self._most_bytes}")
            body = piece.body.content
            data += body if isinstance(body, (bytes, memoryview, bytearray)) else bytes(body)  # type: ignore[arg-type]
            if len(data) > size or (piece.last and len(data) != size):
                raise DecodeError(f"item of {size} bytes: its pieces have {len(data)}")
            if piece.last:
                return form, data

    async def _piece(self, poke: Callable[[], object] | None) -> Piece:
        heard_s = self._peer.now()
        while self._read not in self._here:
            self._check()
            await self._signal.wait(min(heard_s + self._poke_s, self._until_s))
            if self._peer.now() >= heard_s + self._poke_s:
                heard_s = self._peer.now()
                if poke is not None:
                    poke()
        self._check()
        piece = self._here.pop(self._read)
        weight = _weight(piece.body.byte_count())
        self._read += 1
        self._held_bytes -= weight
        self._read_bytes += weight
        if self._read_bytes - self._told_bytes >= self._window_bytes // 4:
            await self._peer.send(self._source, self._ack())
        return piece
