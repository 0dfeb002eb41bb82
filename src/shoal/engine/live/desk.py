"""How peers tell each other who is there: one question and one answer over a short connection.

Both carry all records that their sender knows, so two peers know the same after an exchange. The
answer is signed and repeats the question's nonce: it says which run this is, which id the asker has
and how long ago the run began, so no two clocks need to agree. Addresses are not secret and go in
the clear; what peers send each other in the run does not pass here.

A peer has one port for both: a caller that begins with `MAGIC` wants the desk, all others are the
transport's. Sizes and times are bounded for strangers, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from time import monotonic_ns
from typing import Any, Protocol

from shoal.base.errors import DecodeError, UsageError, WireError
from shoal.base.limits import Limits
from shoal.engine.live.book import PEERS_MAX, RUN_BYTES, Book, Conflict, Record
from shoal.engine.live.control import Address
from shoal.wire import codec
from shoal.wire.identity import Identity, verify
from shoal.wire.message import message

MAGIC = b"ShBk"
EXCHANGE_S = 3.0
"""How long an exchange may take, name lookup and connection included."""
_LIMITS = Limits(frame_bytes=1 << 21, header_bytes=1 << 21)
_MOST_GUESTS = 128
_NONCE_BYTES = 16
_LOOK_AGAIN_S = 0.02


@message
class Hello:
    """The question. program: 16 bytes of what the peers run; run: b"" when not known yet; wish: the
    id that the asker wants, -1 = any; round: the highest that it has heard of."""

    program: bytes
    run: bytes
    nonce: bytes
    public: bytes
    wish: int
    round: int
    records: tuple[Record, ...]


@message
class Welcome:
    """The answer. peer: the asker's id; begun: whether elapsed_ns counts from the run's start,
    which may lie ahead (negative). refusal: why not, and then nothing else counts."""

    run: bytes
    public: bytes
    nonce: bytes
    peer: int
    begun: bool
    elapsed_ns: int
    round: int
    records: tuple[Record, ...]
    refusal: str
    signature: bytes


class Refusal(UsageError):
    """The other side, or this one, wants no exchange. public: the key of the other side."""

    def __init__(self, public: bytes, why: str) -> None:
        super().__init__(why)
        self.public = public


class Clerk(Protocol):
    """What a desk knows of the run and tells about it."""

    book: Book
    identity: Identity
    program: bytes
    round: int

    def elapsed_ns(self) -> int | None:
        """Since the run's start, negative before it; None while nobody announced one."""
        ...

    def learnt(self, peers: list[int], round: int) -> None:
        """Records of these peers are new, and this is the highest round heard of."""
        ...

    def reached(self, host: str) -> None:
        """Somebody reached this peer at that address of this machine."""
        ...


def _unsigned(welcome: Welcome) -> bytes:
    fields: dict[str, Any] = {name: getattr(welcome, name) for name in welcome.__struct_fields__}
    return b"shoal welcome" + b"".join(codec.encode(Welcome(**{**fields, "signature": b""})))


class Desk:
    """The answering side at a peer's listening socket. `hand_on` takes connections for the
    transport; they are kept waiting until `open`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clerk: Clerk,
                 hand_on: Callable[[socket.socket], None], patience_s: float) -> None:  # fmt: skip
        self._loop = loop
        self._clerk = clerk
        self._hand_on = hand_on
        self._patience_s = patience_s
        self._door: dict[socket.socket, asyncio.TimerHandle] = {}
        self._waiting: list[socket.socket] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._open = self._closed = False

    def take(self, connection: socket.socket) -> None:
        """A caller, of whom nothing is known yet."""
        guests = len(self._door) + len(self._serving) + len(self._waiting)
        if self._closed or guests >= _MOST_GUESTS:
            connection.close()
            return
        connection.setblocking(False)
        self._door[connection] = self._loop.call_later(self._patience_s, self._drop, connection)
        self._loop.add_reader(connection, self._look, connection)

    def open(self) -> None:
        """The run begins: let the callers in that waited for it."""
        self._open = True
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            self._hand_on(connection)

    def close(self) -> None:
        self._closed = True
        for connection in list(self._door):
            self._drop(connection)
        for task in self._serving:
            task.cancel()
        for connection in self._waiting:
            connection.close()
        self._waiting.clear()

    def _drop(self, connection: socket.socket) -> None:
        self._release(connection)
        connection.close()

    def _release(self, connection: socket.socket) -> None:
        self._door.pop(connection).cancel()
        self._loop.remove_reader(connection)

    def _look(self, connection: socket.socket) -> None:
        try:
            begin = connection.recv(len(MAGIC), socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            begin = b""
        if not begin:
            self._drop(connection)
        elif begin == MAGIC:
            self._release(connection)
            task = self._loop.create_task(self._serve(connection))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
            # Also when it is cancelled before its first step.
            task.add_done_callback(lambda _: connection.close())
        elif MAGIC.startswith(begin):
            # Some bytes are there and stay there, so the loop would call again at once.
            self._loop.remove_reader(connection)
            self._loop.call_later(_LOOK_AGAIN_S, self._look_again, connection)
        else:
            self._release(connection)
            if self._open:
                self._hand_on(connection)
            else:
                self._waiting.append(connection)

    def _look_again(self, connection: socket.socket) -> None:
        if connection in self._door:
            self._loop.add_reader(connection, self._look, connection)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(EXCHANGE_S):
                hello = await _receive(self._loop, connection, Hello)
                self._clerk.reached(connection.getsockname()[0])
                await _send(self._loop, connection, self._answer(hello))
        except (OSError, TimeoutError, WireError):
            return  # A stranger, or a peer that died: there is nobody to tell.

    def _answer(self, hello: Hello) -> Welcome:
        clerk, book = self._clerk, self._clerk.book
        peer, refusal = -1, _objection(clerk, hello)
        if not refusal:
            seat = book.seat(hello.public, hello.wish)
            if isinstance(seat, Conflict):
                refusal = (
                    f"there is no peer {seat.peer} among {book.peers}, or it has another key (use "
                    "that key, or another id)"
                )
            elif seat is None:
                refusal = f"all {book.peers} peers are there already (raise peers in all of them)"
            else:
                peer = seat
        if refusal:
            return self._signed(hello, -1, refusal)
        changed = book.take(hello.records)
        if changed or hello.round > clerk.round:
            clerk.learnt(changed, hello.round)
        return self._signed(hello, peer, "")

    def _signed(self, hello: Hello, peer: int, refusal: str) -> Welcome:
        clerk = self._clerk
        elapsed = None if refusal else clerk.elapsed_ns()
        records = () if refusal else tuple(clerk.book.records.values())
        welcome = Welcome(
            clerk.book.run, clerk.identity.public, hello.nonce, peer, elapsed is not None,
            elapsed or 0, clerk.round, records, refusal, b"",
        )  # fmt: skip
        fields = {name: getattr(welcome, name) for name in welcome.__struct_fields__}
        return Welcome(**{**fields, "signature": clerk.identity.sign(_unsigned(welcome))})


def _objection(clerk: Clerk, hello: Hello) -> str:
    if len(hello.nonce) != _NONCE_BYTES or len(hello.records) > PEERS_MAX:
        return "a malformed question"
    if not clerk.book.allows(hello.public):
        return "this key is not allowed here (add it to the file given with --allow)"
    if hello.program != clerk.program:
        return "another scenario, seed or version of Shoal (start all peers with the same)"
    if hello.run not in (b"", clerk.book.run):
        return "another run (its store is of an earlier one: use an empty folder)"
    return ""


async def ask(
    loop: asyncio.AbstractEventLoop, address: Address, question: Hello, book: Book | None,
    allows: Callable[[bytes], bool],
) -> tuple[Welcome, int, str]:  # fmt: skip
    """Exchange records with the peer at an address.

    Returns the answer, the moment on this machine's monotonic clock (nanoseconds) for which its
    elapsed_ns holds, and the local address that reached it. Raises OSError or TimeoutError when
    nobody answers there, WireError for nonsense, Refusal
    when either side refuses the other, with the reason.
    """
    async with asyncio.timeout(EXCHANGE_S):
        family, resolved = await resolve(loop, address)
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, resolved)
            local = connection.getsockname()[0]
            before = monotonic_ns()
            await _send(loop, connection, question)
            welcome: Welcome = await _receive(loop, connection, Welcome)
            moment = (before + monotonic_ns()) // 2
    if welcome.nonce != question.nonce or not verify(
        welcome.public, _unsigned(welcome), welcome.signature
    ):
        raise DecodeError(f"the answer from {address} is not signed, or not to this question")
    if not allows(welcome.public):
        raise Refusal(
            welcome.public,
            f"the peer at {_shown(address)} has a key that is not allowed here (add it to the file "
            "given with --allow, or name another bootstrap peer)",
        )
    if welcome.refusal:
        why = f"the peer at {_shown(address)} refused: {welcome.refusal[:300]}"
        raise Refusal(welcome.public, why)
    if len(welcome.run) != RUN_BYTES or (book is not None and welcome.run != book.run):
        raise Refusal(welcome.public, f"the peer at {_shown(address)} is in another run")
    return welcome, moment, local


def hello(clerk_program: bytes, identity: Identity, run: bytes, wish: int, round: int = -1,
          records: tuple[Record, ...] = ()) -> Hello:  # fmt: skip
    """A question with a fresh nonce."""
    return Hello(
        clerk_program, run, os.urandom(_NONCE_BYTES), identity.public, wish, round, records
    )


async def resolve(
    loop: asyncio.AbstractEventLoop, address: Address
) -> tuple[socket.AddressFamily, Address]:
    """The address with a number in place of a host's name; OSError for a name that is not known."""
    found = await loop.getaddrinfo(address[0], address[1], type=socket.SOCK_STREAM)
    family, *_, resolved = found[0]
    return socket.AddressFamily(family), (str(resolved[0]), int(resolved[1]))


def _shown(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


async def _send(loop: asyncio.AbstractEventLoop, connection: socket.socket, what: Any) -> None:
    await loop.sock_sendall(connection, MAGIC + b"".join(codec.encode(what)))


async def _receive(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, kind: type[Any]
) -> Any:
    head = await _exactly(loop, connection, len(MAGIC) + codec.PREFIX.size)
    if not head.startswith(MAGIC):
        raise DecodeError(f"an exchange begins with {bytes(head[:4])!r}, not {MAGIC!r}")
    prefix = head[len(MAGIC) :]
    rest = codec.read_prefix(prefix, _LIMITS).rest_bytes
    if rest > _LIMITS.frame_bytes:
        raise DecodeError(f"an exchange of {rest} bytes; limit {_LIMITS.frame_bytes}")
    found = codec.decode(prefix + await _exactly(loop, connection, rest), _LIMITS)[0]
    if not isinstance(found, kind):
        raise DecodeError(f"an exchange brought {type(found).__name__}, not {kind.__name__}")
    return found


async def _exactly(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, count: int
) -> bytearray:
    out = bytearray()
    while len(out) < count:
        # Memory is taken as bytes arrive, whatever the prefix claims.
        piece = await loop.sock_recv(connection, min(count - len(out), 1 << 16))
        if not piece:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            raise DecodeError(f"the connection ended after {len(out)} of {count} bytes")
        out += piece
    return out
