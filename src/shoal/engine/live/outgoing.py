"""All that is unsent for one other peer, and the connections that carry it."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

from shoal.engine.live.calling import Call
from shoal.kernel.waits import Wait
from shoal.wire import codec
from shoal.wire.outflow import Outflow

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport

# How often frames are taken to another connection before they count as lost: what makes a receiver
# close every connection would be sent to it for ever.
_MOST_RESUMES = 3
# A peer that did not answer is forgotten after so many of the longest pauses.
_FORGOTTEN_AFTER = 8


class Outgoing:
    """The frames for one other peer, over `settings.connections` connections.

    When a connection breaks, the peer is called again at once, and what it did not receive of large
    frames is sent again, unless it is another incarnation by then. If that call fails, everything
    is dropped, and the peer is left alone for a while.

    `retire` closes the connections when nothing is on its way: the last word goes out on each, and
    when the peer has closed them all, whatever was queued meanwhile is a reason to call again.
    """

    def __init__(self, transport: Transport, target: int) -> None:
        self.flow = Outflow(transport.limits, transport.settings.checksums)
        self.transport = transport
        self.target = target
        self.used_s = 0.0
        self.life = int.from_bytes(os.urandom(8), "little")
        """under which the peer knows this flow: one that was forgotten is not gone on with"""
        self._leaving = False
        self._loop = transport.loop
        self._calls: dict[int, Call] = {}
        self._pause_s = transport.settings.backoff_s
        self._retry_s = 0.0
        self._resumes = 0
        self._received = 0
        self._room: deque[Wait] = deque()
        self._flushed: deque[tuple[tuple[int, int], Wait]] = deque()

    def push(self, frame: list[codec.Buffer]) -> bool:
        """Queue a frame; False while the peer is given a rest after a failure."""
        if not self._calls and self._loop.time() < self._retry_s:
            return False
        self.flow.push(frame)
        self.transport.pool.touch(self)
        if not self._calls:
            self._call(0)
        for call in self._calls.values():
            if call.idle:
                self.transport.owner.dirty[self] = None
                break
        return True

    def room_wait(self) -> Wait | None:
        if self.flow.waiting_bytes <= self.transport.limits.queue_bytes:
            return None
        wait = Wait(self.transport.owner.ready)
        self._room.append(wait)
        return wait

    @property
    def busy(self) -> bool:
        """Whether a frame is not written, or a large one not received."""
        return self.flow.busy or self._sealed

    @property
    def _sealed(self) -> bool:
        return any(len(call.sealed) for call in self._calls.values())

    def flush_wait(self) -> Wait | None:
        mark = self.flow.pushed
        if self.flow.settled(mark) and not self._sealed:
            return None
        wait = Wait(self.transport.owner.ready)
        self._flushed.append((mark, wait))
        return wait

    def forgive(self) -> None:
        self._retry_s = 0.0
        self._pause_s = self.transport.settings.backoff_s

    def fail(self, reason: str, why: str = "") -> None:
        """Close, drop what is queued, and leave the peer alone for a while."""
        transport = self.transport
        self._close()
        self._retry_s = self._loop.time() + self._pause_s
        self._pause_s = min(2 * self._pause_s, transport.settings.backoff_most_s)
        if lost := self.flow.clear():
            transport.owner.lost(reason, lost)
        if why:
            transport.owner.closed(transport.peer, why)
        self._wake()

    def broken(self, call: Call) -> None:
        """A connection ended; call again if there is something that it owes."""
        if self._leaving:
            self._left(call)
            return
        if not call.lane.ready or self._resumes >= _MOST_RESUMES or not self.flow.busy:
            self.fail("dead")
            return
        self._resumes += 1
        self.flow.broke()
        call.close()
        self._call(call.number)

    def retire(self) -> bool:
        """Begin to close, with nothing lost; False while something is on its way."""
        if self._leaving:
            return True
        if not self._calls or self.busy or not all(c.lane.ready for c in self._calls.values()):
            return False
        self._leaving = True
        for call in self._calls.values():
            call.bye()
        self.transport.owner.dirty[self] = None
        # Whoever asks for it may be in another peer's turn.
        self._loop.call_soon(self.transport.owner.settle)
        return True

    def reroute(self) -> None:
        """Call anew where the peer is reached now, with nothing lost that was not on its way."""
        if any(call.lane.ready for call in self._calls.values()):
            self.retire()
        elif self._calls:
            self._close()
            if self.flow.busy:
                self._call(0)
        self.forgive()

    def _left(self, call: Call) -> None:
        del self._calls[call.number]
        call.close()
        if self._calls:
            return
        self._leaving = False
        if self.flow.busy:
            self._call(0)
        else:
            self.transport.forget(self)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to remember, not even that the peer did not answer."""
        rest_s = _FORGOTTEN_AFTER * self.transport.settings.backoff_most_s
        return not self._calls and not self.busy and self._loop.time() > self._retry_s + rest_s

    def opened(self) -> None:
        """A connection is ready for frames."""
        if forgotten := self.flow.forgotten:
            self.flow.forgotten = 0
            self.transport.owner.lost("dead", forgotten)
        self._pause_s = self.transport.settings.backoff_s
        # The peer lives: now the other connections are worth their calls.
        for number in range(self.transport.settings.connections):
            if number not in self._calls:
                self._call(number)

    def heard(self) -> None:
        """An answer may have given credit, or settled a frame."""
        if self.flow.received != self._received:
            self._received = self.flow.received
            self._resumes = 0
        if self._calls:
            self.transport.owner.dirty[self] = None

    def beat(self, now_s: float) -> None:
        """Heartbeats of all connections."""
        for call in list(self._calls.values()):
            if call.overdue:
                self._left(call)
            elif why := call.beat(now_s):
                self.fail("dead", f"lost peer {self.target}: {why}")
                return

    def write(self, only: Call | None = None) -> None:
        if only is not None:
            only.write()
        # What one connection took may have been what the others waited for.
        for call in list(self._calls.values()):
            if call is not only and (only is None or call.idle):
                call.write()
        self._wake()

    def _call(self, number: int) -> None:
        call = self._calls[number] = Call(self, number)
        call.begin()

    def _close(self) -> None:
        calls, self._calls = self._calls, {}
        self._leaving = False
        self.transport.pool.forget(self)
        for call in calls.values():
            call.close()

    def _wake(self) -> None:
        flow, limit = self.flow, self.transport.limits.queue_bytes
        while self._room and flow.waiting_bytes <= limit:
            self._room.popleft().resolve(None)
        while self._flushed and flow.settled(self._flushed[0][0]) and not self._sealed:
            self._flushed.popleft()[1].resolve(None)
