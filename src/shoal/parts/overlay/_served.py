"""The called side: which calls run, which have run, and what they answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from shoal.base.errors import Cancelled, DecodeError, MessageTooLarge, ShoalError
from shoal.base.ids import PeerId
from shoal.kernel.tasks import TaskHandle
from shoal.parts.overlay._call_messages import (
    ANOTHER_LIFE,
    BUSY,
    CANCELLED,
    DONE,
    FAILED,
    REFUSED,
    RUNNING,
    TOO_LARGE,
    UNSERVED,
    Cancel,
    Open,
    Reply,
)
from shoal.parts.overlay._flow import Ack, Piece, Receiving, Sending, Way
from shoal.parts.overlay._payload import pack, unpack
from shoal.parts.overlay._signal import Signal
from shoal.wire.message import Packed

if TYPE_CHECKING:
    from shoal.parts.overlay.rpc import Rpc

_WATCH_S = 1.0
"""How late at most a handler notices a deadline that is shorter than those of all others."""
_TEXT = 500
_LIVES = 16


class Request:
    """A call as its handler sees it. source: who calls; deadline: on this peer's clock; payload:
    what it calls with. In a stream handler, `send` and `receive` carry the items."""

    def __init__(self, served: Served, payload: Any) -> None:
        self._served = served
        self.source: PeerId = served.source
        self.method: str = served.open.method
        self.deadline: float = served.deadline
        self.payload = payload

    async def send(self, item: Any) -> None:
        """Send an item to the caller; waits while the caller's window is full."""
        await self._served.put(item)

    async def receive(self) -> Any:
        """The caller's next item, None after its last one."""
        item = await self._served.receiving.item()
        return None if item is None else self._served.unpacked(*item)

    def __aiter__(self) -> Request:
        return self

    async def __anext__(self) -> Any:
        item = await self.receive()
        if item is None:
            raise StopAsyncIteration
        return item


class Served:
    """One call that runs or has run."""

    def __init__(self, rpc: Rpc, source: PeerId, opening: Open) -> None:
        peer, settings = rpc.peer, rpc.settings
        self.source, self.open = source, opening
        self.deadline = peer.now() + max(0.0, opening.left_s)
        self.reply: Reply | None = None
        self.handle: TaskHandle | None = None
        self._rpc = rpc
        self._why = "its peer stopped serving"
        signal = Signal(peer, rpc.group)
        # No end of their own: a handler is cancelled at its deadline.
        self.sending = Sending(
            peer, rpc.group, source, Way(opening.life, opening.call, True), signal, _nothing,
            until_s=float("inf"), piece_bytes=settings.piece_bytes,
            window_bytes=settings.window_bytes, timer_s=settings.retry_s,
        )  # fmt: skip
        self.receiving = Receiving(
            peer, source, Way(opening.life, opening.call, False), signal, _nothing,
            until_s=float("inf"), window_bytes=settings.window_bytes,
            most_bytes=settings.payload_bytes, poke_s=settings.retry_most_s,
        )  # fmt: skip

    def ended(self, status: str, error: str = "", text: str = "") -> Reply:
        """The reply that ends the call; the first one counts."""
        opening = self.open
        if self.reply is None:
            self.reply = Reply(
                self._rpc.life, opening.life, opening.call, status, error=error, text=text[:_TEXT]
            )
        return self.reply

    def cancel(self, why: str) -> None:
        """Stop the handler."""
        self._why = why
        if self.handle is not None:
            self.handle.cancel()

    async def run(self, handler: Callable[[Request], Awaitable[Any]]) -> None:
        try:
            await self._run(handler)
        except Cancelled:
            had = self.reply is not None
            reply = self.ended(CANCELLED, text=self._why)
            if not had:
                await self._rpc.peer.send(self.source, reply)
            raise
        except MessageTooLarge as error:
            await self._rpc.peer.send(self.source, self.ended(TOO_LARGE, text=str(error)))
        except Exception as error:
            reply = self.ended(FAILED, type(error).__name__, str(error))
            await self._rpc.peer.send(self.source, reply)
        finally:
            self.sending.close()

    async def _run(self, handler: Callable[[Request], Awaitable[Any]]) -> None:
        opening = self.open
        try:
            form, data = opening.form, opening.body.content
            if not opening.whole:
                item = await self.receiving.item()
                form, data = item or ("", b"")
            payload = self.unpacked(form, data)
        except (ShoalError, DecodeError) as error:
            status = TOO_LARGE if isinstance(error, MessageTooLarge) else REFUSED
            await self._rpc.peer.send(self.source, self.ended(status, text=str(error)))
            return
        result = await handler(Request(self, payload))
        if opening.stream:
            await self.sending.end()
            await self._rpc.peer.send(self.source, self.ended(DONE))
        else:
            await self._answer(result)

    async def _answer(self, result: Any) -> None:
        rpc, opening = self._rpc, self.open
        parcel, limit = self._packed(result), rpc.settings.payload_bytes
        if parcel.size_bytes > limit:
            raise MessageTooLarge(f"an answer of {parcel.size_bytes} bytes; limit {limit}")
        whole = parcel.size_bytes <= rpc.settings.inline_bytes
        self.reply = Reply(
            rpc.life, opening.life, opening.call, DONE, form=parcel.form, size=parcel.size_bytes,
            whole=whole, body=Packed(parcel.whole() if whole else b""),
        )  # fmt: skip
        await rpc.peer.send(self.source, self.reply)
        if not whole:
            await self.sending.put(parcel)
            await self.sending.end()

    async def put(self, item: Any) -> None:
        parcel, limit = self._packed(item), self._rpc.settings.payload_bytes
        if parcel.size_bytes > limit:
            raise MessageTooLarge(f"an item of {parcel.size_bytes} bytes; limit {limit}")
        await self.sending.put(parcel)

    def _packed(self, item: Any) -> Any:
        return pack(item, self.open.compression)

    def unpacked(self, form: str, data: Any) -> Any:
        return unpack(form, data, self._rpc.settings.payload_bytes)


def _nothing() -> None:
    """A handler is cancelled when its call ends, so its flows need not look."""


class _Caller:
    """What is remembered of one caller's present life.

    awaited: what it waits for. A smaller number than `top` that is not among these was settled or
    given up before, and its messages were long on the way.
    """

    def __init__(self, life: int) -> None:
        self.life = life
        self.turn = self.top = 0
        self.awaited: set[int] = set()
        self.calls: dict[int, Served] = {}

    def told(self, opening: Open) -> None:
        """Take its newest word about what it waits for, and forget all else."""
        if opening.turn > self.turn:
            self.turn = opening.turn
            self.awaited = set(opening.awaited)
            self.top = max(self.top, opening.call, *opening.awaited)
            self.forget([number for number in self.calls if number not in self.awaited])
        elif opening.call > self.top:
            self.top = opening.call
            self.awaited.add(opening.call)

    def given_up(self, call: int) -> None:
        """It waits for this one no longer, and if it is still to come, it comes too late."""
        self.top = max(self.top, call)
        self.awaited.discard(call)
        if call in self.calls:
            self.forget([call])

    def forget(self, calls: list[int]) -> None:
        """A handler that still runs is not wanted any more."""
        for number in calls:
            self.calls.pop(number).cancel("its caller gave it up")


class Callers:
    """All calls from elsewhere."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._callers: dict[PeerId, _Caller] = {}
        self._past: dict[PeerId, list[int]] = {}
        self._watch: TaskHandle | None = None

    def opened(self, source: PeerId, opening: Open) -> None:
        """A call, or one that was sent again."""
        rpc = self._rpc
        if opening.callee != rpc.life:
            self._tell(source, opening, ANOTHER_LIFE, refused=opening.callee)
            return
        caller = self._caller(source, opening.life)
        if caller is None:
            return
        caller.told(opening)
        served = caller.calls.get(opening.call)
        if served is not None:
            if served.reply is None:
                self._tell(source, opening, RUNNING)
            else:
                rpc.tell(source, served.reply)
            return
        if opening.call not in caller.awaited:
            return
        if len(caller.calls) >= rpc.settings.calls:
            self._tell(source, opening, BUSY)
            return
        handler = rpc.handlers.get(opening.method)
        if handler is None or handler[1] != opening.stream:
            self._tell(source, opening, UNSERVED)
            return
        if opening.size > rpc.settings.payload_bytes:
            limit = rpc.settings.payload_bytes
            text = f"a payload of {opening.size} bytes; limit there {limit} (send less at once)"
            self._tell(source, opening, TOO_LARGE, text=text)
            return
        served = caller.calls[opening.call] = Served(rpc, source, opening)
        served.handle = rpc.group.start(served.run(handler[0]), isolate=True)
        if opening.stream or not opening.whole:
            self._tell(source, opening, RUNNING)
        if self._watch is None or self._watch.done:
            self._watch = rpc.group.start(self._keep_deadlines(), isolate=True)

    def cancelled(self, source: PeerId, cancel: Cancel) -> None:
        """A caller gave up."""
        caller = self._callers.get(source)
        if caller is not None and caller.life == cancel.life:
            caller.given_up(cancel.call)

    def came(self, source: PeerId, piece: Piece) -> None:
        served = self._find(source, piece.life, piece.call)
        if served is not None:
            self._rpc.tell(source, served.receiving.arrived(piece))
            return
        # Perhaps of a call that an earlier life of this peer took.
        reply = Reply(self._rpc.life, piece.life, piece.call, ANOTHER_LIFE, refused=-1)
        self._rpc.tell(source, reply)

    def acked(self, source: PeerId, ack: Ack) -> None:
        served = self._find(source, ack.life, ack.call)
        if served is not None:
            served.sending.acked(ack)

    def stop(self) -> None:
        """Cancel what runs."""
        for caller in self._callers.values():
            for served in caller.calls.values():
                served.cancel("its peer stopped serving")
        if self._watch is not None:
            self._watch.cancel()

    def _find(self, source: PeerId, life: int, call: int) -> Served | None:
        caller = self._callers.get(source)
        return caller.calls.get(call) if caller is not None and caller.life == life else None

    def _caller(self, source: PeerId, life: int) -> _Caller | None:
        """The caller in this life; None when that life is over: its messages were long on the way.

        Lives have no order, since a clock may have been set back between them.
        """
        caller = self._callers.get(source)
        if caller is not None and caller.life == life:
            return caller
        past = self._past.setdefault(source, [])
        if life in past:
            return None
        if caller is not None:
            caller.forget(list(caller.calls))
            past.append(caller.life)
            del past[:-_LIVES]
        caller = self._callers[source] = _Caller(life)
        return caller

    async def _keep_deadlines(self) -> None:
        peer = self._rpc.peer
        while True:
            now_s = peer.now()
            running = [
                served
                for caller in self._callers.values()
                for served in caller.calls.values()
                if served.handle is not None and not served.handle.done
            ]
            for served in running:
                if served.deadline <= now_s:
                    served.cancel("its deadline passed")
            left = [served.deadline for served in running if served.deadline > now_s]
            if not left:
                return
            # A clock of nanoseconds may show slightly less than the moment slept for.
            await peer.sleep_until(min(*left, now_s + _WATCH_S) + 1e-8)

    def _tell(self, source: PeerId, opening: Open, status: str, **more: Any) -> None:
        self._rpc.tell(source, Reply(self._rpc.life, opening.life, opening.call, status, **more))
