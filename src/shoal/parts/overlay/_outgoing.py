"""The calling side of one remote call, from its first message to its end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from shoal.base.errors import (
    Cancelled,
    DeadlineExceeded,
    DecodeError,
    Leaving,
    MessageTooLarge,
    ProgramError,
    UsageError,
    WireError,
)
from shoal.base.ids import PeerId
from shoal.parts.overlay._call_errors import (
    AnswerUnreadable,
    CallCancelled,
    CallError,
    CallRefused,
    HandlerFailed,
    NoSuchMethod,
    OutcomeUnknown,
)
from shoal.parts.overlay._call_messages import (
    ANOTHER_LIFE,
    BUSY,
    CANCELLED,
    DONE,
    FAILED,
    RUNNING,
    TOO_LARGE,
    UNSERVED,
    Cancel,
    Open,
    Reply,
)
from shoal.parts.overlay._flow import Ack, Piece, Receiving, Sending, Way
from shoal.parts.overlay._payload import Parcel, pack, unpack
from shoal.parts.overlay._signal import Signal
from shoal.wire.message import Packed

if TYPE_CHECKING:
    from shoal.parts.overlay.rpc import Rpc


class Outgoing:
    """An async context: leaving it before the call has ended cancels the call."""

    def __init__(
        self, rpc: Rpc, number: int, to: PeerId, method: str, parcel: Parcel, deadline: float,
        compression: str, stream: bool,
    ) -> None:  # fmt: skip
        peer, settings = rpc.peer, rpc.settings
        self.to = to
        self.deadline = deadline
        self._rpc, self._number, self._method, self._parcel = rpc, number, method, parcel
        self._compression, self._stream = compression, stream
        self._what = f"call {method!r} of peer {to}"
        self._whole = parcel.size_bytes <= settings.inline_bytes
        self._reply: Reply | None = None
        self._error: Exception | None = None
        self._running = self._open_again = False
        self._sent_in: dict[int, int] = {}
        self._retry_s = settings.retry_s
        signal = self._signal = Signal(peer, rpc.group)
        self.sending = Sending(
            peer, rpc.group, to, Way(rpc.life, number, False), signal, self._check,
            until_s=deadline,
            piece_bytes=settings.piece_bytes, window_bytes=settings.window_bytes,
            timer_s=settings.retry_s,
        )  # fmt: skip
        self.receiving = Receiving(
            peer, to, Way(rpc.life, number, True), signal, self._check, until_s=deadline,
            window_bytes=settings.window_bytes, most_bytes=settings.payload_bytes,
            poke_s=settings.retry_most_s,
        )  # fmt: skip

    async def __aenter__(self) -> Outgoing:
        self._rpc.outgoing[self._number] = self
        await self._send_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._rpc.outgoing.pop(self._number, None)
        self.sending.close()
        # A crash closes the coroutine, and then nothing can be said any more.
        if self._reply is None and not isinstance(error, GeneratorExit):
            await self._rpc.peer.send(self.to, Cancel(self._rpc.life, self._number))

    # What the other side says.

    def replied(self, reply: Reply) -> None:
        """A `Reply` for this call came."""
        if self._reply is not None:
            return
        if reply.status == ANOTHER_LIFE:
            self._refused(reply)
        elif reply.status == BUSY:
            self._sent_in[reply.life] = self._sent_in.get(reply.life, 1) - 1
        elif reply.status == RUNNING:
            self._running = True
        else:
            self._reply = reply
        self._signal.fire()

    def came(self, piece: Piece) -> Ack:
        """A piece of the answer came: if the `Reply` before it was lost, it is not needed."""
        if self._reply is None and not self._stream:
            self._reply = Reply(0, self._rpc.life, self._number, DONE, whole=False)
        return self.receiving.arrived(piece)

    def _refused(self, reply: Reply) -> None:
        """It is for another life. The refused message did not run; did an earlier one?"""
        if reply.refused in self._sent_in:
            self._sent_in[reply.refused] -= 1
        if any(count > 0 for life, count in self._sent_in.items() if life != reply.life):
            self._error = OutcomeUnknown(
                f"{self._what}: it restarted between two attempts (ask it what it has, or make "
                "the method repeatable)"
            )
        elif reply.refused >= 0:
            self._open_again = True

    def _check(self) -> None:
        """Raise what ended the call."""
        if self._error is not None:
            raise self._error
        reply = self._reply
        if reply is not None and reply.status != DONE:
            raise self._failure(reply)
        if self._rpc.peer.now() >= self.deadline:
            heard = "it runs there" if self._running else "no word from there"
            raise DeadlineExceeded(f"{self._what}: no answer by {self.deadline:.3f} s; {heard}")

    def _failure(self, reply: Reply) -> Exception:
        text = f"{self._what}: {reply.text}"
        if reply.status == FAILED:
            return HandlerFailed(text, reply.error)
        if reply.status == UNSERVED:
            return NoSuchMethod(f"{self._what}: nobody serves it there")
        if reply.status == TOO_LARGE:
            return MessageTooLarge(text)
        return CallCancelled(text) if reply.status == CANCELLED else CallRefused(text)

    # What this side does.

    async def _send_open(self) -> None:
        rpc, parcel = self._rpc, self._parcel
        callee = rpc.lives.get(self.to, 0)
        if callee:
            self._sent_in[callee] = self._sent_in.get(callee, 0) + 1
        body = parcel.whole() if self._whole and callee else b""
        await rpc.peer.send(
            self.to,
            Open(
                rpc.life, callee, self._number, rpc.turn(), rpc.awaited(self.to),
                self.deadline - rpc.peer.now(), self._method, self._stream, self._compression,
                parcel.form, parcel.size_bytes, self._whole, Packed(body),
            ),
        )  # fmt: skip

    async def _until(self, running: bool) -> None:
        """Send again and again until the call has ended (or, with `running`, has begun)."""
        peer, again_s = self._rpc.peer, self._rpc.peer.now() + self._retry_s
        while self._reply is None and not (running and self._running):
            self._check()
            if self._open_again:
                self._open_again = False
                await self._send_open()
                continue
            if peer.now() >= again_s:
                await self._send_open()
                self._retry_s = min(2 * self._retry_s, self._rpc.settings.retry_most_s)
                again_s = peer.now() + self._retry_s
            await self._signal.wait(min(again_s, self.deadline))
        self._check()

    def poke(self) -> None:
        """Nothing came for long: the other side may have restarted."""
        self._rpc.group.start(self._send_open(), isolate=True)

    async def begun(self) -> None:
        """Wait until the other side has taken the call."""
        await self._until(running=True)

    async def answer(self) -> Any:
        """The answer of a unary call."""
        if not self._whole:
            await self.begun()
            await self.sending.put(self._parcel)
        await self._until(running=False)
        reply = self._reply
        assert reply is not None
        form, data = reply.form, reply.body.content
        if not reply.whole:
            item = await self._next()
            if item is None:
                raise CallError(f"{self._what}: the answer ended before it began")
            form, data = item
        return self.unpacked(form, data)

    async def item(self) -> Any:
        """The next item of a stream, None after the last one."""
        item = await self._next()
        return None if item is None else self.unpacked(*item)

    async def _next(self) -> tuple[str, Any] | None:
        try:
            return await self.receiving.item(self.poke)
        except (DecodeError, MessageTooLarge) as error:
            if self._reply is not None and self._reply.status == TOO_LARGE:
                raise  # It is this side's payload that is meant.
            raise self._unreadable(error) from error

    def unpacked(self, form: str, data: Any) -> Any:
        try:
            return unpack(form, data, self._rpc.settings.payload_bytes)
        except (WireError, UsageError) as error:
            # Of no fault of this side, whose program must be able to go on with another peer.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> AnswerUnreadable:
        return AnswerUnreadable(f"{self._what}: {error}", type(error).__name__)

    def packed(self, item: Any) -> Parcel:
        parcel, limit = pack(item, self._compression), self._rpc.settings.payload_bytes
        if parcel.size_bytes > limit:
            raise MessageTooLarge(
                f"{self._what}: an item of {parcel.size_bytes} bytes; limit {limit} (split it)"
            )
        return parcel


class Stream:
    """A streaming call, as its caller sees it; made by `Rpc.stream`, entered with `async with`."""

    def __init__(self, call: Outgoing) -> None:
        self._call = call
        self._entered = False

    async def __aenter__(self) -> Stream:
        await self._call.__aenter__()
        self._entered = True
        try:
            await self._call.begun()
        except (Exception, Cancelled, Leaving) as error:
            await self._call.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        await self._call.__aexit__(kind, error, trace)

    async def send(self, item: Any) -> None:
        """Send an item; waits while the other side's window is full."""
        self._check()
        await self._call.sending.put(self._call.packed(item))

    async def end(self) -> None:
        """Say that no more items come, and wait until all are there."""
        self._check()
        await self._call.sending.end()

    async def receive(self) -> Any:
        """The next item, None after the last one; raises what the handler raised."""
        self._check()
        return await self._call.item()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        item = await self.receive()
        if item is None:
            raise StopAsyncIteration
        return item

    def _check(self) -> None:
        if not self._entered:
            raise ProgramError("stream: used outside of `async with rpc.stream(...)`")
