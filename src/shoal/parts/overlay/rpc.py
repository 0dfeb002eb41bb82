"""Remote calls: unary and streaming, with deadlines, cancellation and at most one execution.

    rpc = Rpc(peer)
    rpc.serve("model.version", version)               # async def version(call): return b"7"
    async with peer.tasks() as group:
        rpc.start(group)
        answer = await rpc.call(3, "model.version", deadline=peer.now() + 1)
        async with rpc.stream(3, "model.tokens", b"prompt", deadline=peer.now() + 60) as stream:
            async for token in stream: ...
        rpc.stop()

Calls are small messages of their own kind; larger payloads and streams travel as pieces with flow
control (`_flow.py`), which small messages overtake, so that a heartbeat waits for no tensor.

At most once. A call that is not answered is sent again under its number, and the other side runs a
number once, answering again what it answered before. How long answers are kept follows from the
caller: every call names all of those that it waits for. What a restart forgets is
settled by lives: a call names the life of the peer that it is for, another life refuses it, and
the caller sends it anew only if no earlier message of it can have run. Otherwise it fails with
`OutcomeUnknown`. So a call runs once or not at all, unless its error says that nobody knows.

Deadlines travel as the time that is left, so clocks may differ. Who cancels a call, or stops
waiting for it, cancels its handler; a handler that is cancelled ends its call.
Source: Birrell and Nelson 1984, Implementing remote procedure calls, section 3 (call identifiers,
what a caller's next call says of its last one); Yang et al. 2025, Lattica (arXiv 2510.00183).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from shoal.base.errors import MessageTooLarge, ProgramError, UsageError
from shoal.base.ids import PeerId
from shoal.base.limits import check_positive
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.overlay._call_messages import Cancel, Open, Reply
from shoal.parts.overlay._flow import Ack, Piece
from shoal.parts.overlay._outgoing import Outgoing, Stream
from shoal.parts.overlay._payload import pack
from shoal.parts.overlay._served import Callers, Request


@dataclass(frozen=True)
class RpcSettings:
    """inline_bytes: payloads up to this travel in the call or reply itself; piece_bytes: larger
    ones in pieces of that size; window_bytes: of pieces on the way, per call and direction;
    payload_bytes: largest payload or item; calls: of one caller that are served or remembered at
    once; retry_s: how long a call waits for an answer before it is sent again, doubled each time up
    to retry_most_s. On shared uplinks a small message waits for window_bytes at most.
    """

    inline_bytes: int = 1 << 15
    piece_bytes: int = 1 << 18
    window_bytes: int = 1 << 22
    payload_bytes: int = 1 << 30
    calls: int = 256
    retry_s: float = 0.5
    retry_most_s: float = 5.0

    def __post_init__(self) -> None:
        check_positive("RpcSettings", self, finite=True)
        if self.window_bytes < 4 * self.piece_bytes:
            raise UsageError(
                f"RpcSettings: window_bytes={self.window_bytes} is less than four pieces of "
                f"{self.piece_bytes} bytes (raise it)"
            )


class Rpc:
    """One peer's calls, both sides; a peer has at most one. `start` comes first.

    >>> from shoal.engine.event import simulate
    >>> from shoal.world.links import Links
    >>> from shoal.world.network import Network
    >>> @dataclass(frozen=True)
    ... class Doubling:
    ...     async def run(self, peer):
    ...         async def double(call):
    ...             return call.payload * 2
    ...         rpc = Rpc(peer)
    ...         rpc.serve("text.double", double)
    ...         async with peer.tasks() as group:
    ...             rpc.start(group)
    ...             other = (peer.id + 1) % 3
    ...             said = await rpc.call(other, "text.double", b"ho", deadline=2.0)
    ...             peer.record("right", said == b"hoho")
    ...             await peer.sleep_until(3.0)
    ...             rpc.stop()
    >>> run = simulate(Doubling(), Network(3, links=Links(latency_s=0.01, loss=0.1)))
    >>> [row.value for row in run.series("right")]
    [1.0, 1.0, 1.0]
    """

    def __init__(self, peer: Peer, settings: RpcSettings | None = None) -> None:
        self.peer = peer
        self.settings = settings or RpcSettings()
        # Never 0, which stands for "unknown"; a restart comes at another moment.
        self.life = 1 + abs(round(peer.now() * 1e9))
        self.lives: dict[PeerId, int] = {}
        """of other peers, as far as they were heard from"""
        self.handlers: dict[str, tuple[Callable[[Any], Awaitable[Any]], bool]] = {}
        self.outgoing: dict[int, Outgoing] = {}
        self._group: TaskGroup | None = None
        self._loops: list[TaskHandle] = []
        self._calls = self._turns = 0
        self._callers = Callers(self)

    # Life.

    def start(self, group: TaskGroup) -> None:
        """Serve and call from now on, until `stop`."""
        self._group = group
        for loop in (
            self._take(Open, self._callers.opened),
            self._take(Cancel, self._callers.cancelled),
            self._take(Reply, self._replied),
            self._take(Piece, self._came),
            self._take(Ack, self._acked),
        ):
            self._loops.append(group.start(loop))

    def stop(self) -> None:
        """Take no more calls and cancel those that are served; their callers are told."""
        for loop in self._loops:
            loop.cancel()
        self._loops.clear()
        self._callers.stop()

    @property
    def group(self) -> TaskGroup:
        if self._group is None:
            raise ProgramError("Rpc: used before start (call start(group) first)")
        return self._group

    async def _take(self, kind: type[Any], take: Callable[[PeerId, Any], None]) -> None:
        while (envelope := await self.peer.recv(kind, deadline=float("inf"))) is not None:
            take(envelope.source, envelope.message)

    # Serving.

    def serve(self, method: str, handler: Callable[[Request], Awaitable[Any]]) -> None:
        """`handler(request)` returns the answer: bytes, a Tensor or a message. What it raises is
        raised at the caller, as `HandlerFailed` with the name of its class."""
        self.handlers[method] = (handler, False)

    def serve_stream(self, method: str, handler: Callable[[Request], Awaitable[None]]) -> None:
        """`handler(request)` calls `request.send(item)` and `request.receive()`, in any order."""
        self.handlers[method] = (handler, True)

    # Calling.

    async def call(
        self, to: PeerId | int, method: str, payload: Any = b"", *, deadline: float,
        compression: str = "",
    ) -> Any:  # fmt: skip
        """The other peer's answer. `compression`: "", "zlib" or "zstd", in both directions.

        DeadlineExceeded, MessageTooLarge for a payload over the limit, or a `CallError`: also when
        what the other side answers cannot be read.
        """
        async with self._open(to, method, payload, deadline, compression, False) as call:
            return await call.answer()

    def stream(
        self, to: PeerId | int, method: str, payload: Any = b"", *, deadline: float,
        compression: str = "",
    ) -> Stream:  # fmt: skip
        """Items in both directions: `async with rpc.stream(...) as stream`, then `await
        stream.send(item)`, `await stream.end()`, `await stream.receive()` or `async for`.

        The payload must fit into `inline_bytes`; items may have `payload_bytes`. Leaving the block
        before the other side has ended cancels its handler.
        """
        return Stream(self._open(to, method, payload, deadline, compression, True))

    def _open(
        self, to: PeerId | int, method: str, payload: Any, deadline: float, compression: str,
        stream: bool,
    ) -> Outgoing:  # fmt: skip
        parcel, settings = pack(payload, compression), self.settings
        limit = settings.inline_bytes if stream else settings.payload_bytes
        if parcel.size_bytes > limit:
            raise MessageTooLarge(
                f"call {method!r}: a payload of {parcel.size_bytes} bytes; limit {limit} "
                "(send it in items of a stream, or put it into the content store)"
            )
        if not deadline < float("inf"):
            raise UsageError(f"call {method!r}: deadline={deadline}; need a finite time")
        self._calls += 1
        return Outgoing(
            self, self._calls, PeerId(to), method, parcel, deadline, compression, stream
        )

    def turn(self) -> int:
        """A number for each `Open`, so that the newest word about `awaited` counts."""
        self._turns += 1
        return self._turns

    def awaited(self, to: PeerId) -> tuple[int, ...]:
        """The calls of a peer that this one waits for."""
        return tuple([number for number, call in self.outgoing.items() if call.to == to])

    # What comes in.

    def tell(self, to: PeerId, message: object) -> None:
        """Send from where nobody can wait: one slow peer must not hold up the others' messages."""
        self.group.start(self.peer.send(to, message), isolate=True)

    def _replied(self, source: PeerId, reply: Reply) -> None:
        self.lives[source] = reply.life
        call = self.outgoing.get(reply.call)
        if call is not None and call.to == source and reply.caller == self.life:
            call.replied(reply)

    def _came(self, source: PeerId, piece: Piece) -> None:
        if not piece.answer:
            self._callers.came(source, piece)
            return
        call = self.outgoing.get(piece.call)
        if call is not None and call.to == source and piece.life == self.life:
            self.tell(source, call.came(piece))
        elif not piece.end:
            self.tell(source, Cancel(piece.life, piece.call))
        else:
            # All was read; only the last acknowledgement is missing.
            self.tell(source, Ack(piece.life, piece.call, True, piece.number + 1, (), 0))

    def _acked(self, source: PeerId, ack: Ack) -> None:
        if ack.answer:
            self._callers.acked(source, ack)
            return
        call = self.outgoing.get(ack.call)
        if call is not None and call.to == source and ack.life == self.life:
            call.sending.acked(ack)
