"""Who is at the other end of a line, before anything else is said on it.

    both sides      magic, a nonce
    the caller      what it wants, signed over both nonces
    the called      yes or no, signed over both nonces

A line is no session: what goes through it is sealed by the transports at both ends. This keeps
strangers from taking a peer's reservation, its calls or its place.
"""

from __future__ import annotations

import asyncio
import os
import struct
from typing import TYPE_CHECKING, Any

from shoal.base.errors import HandshakeError, WireError
from shoal.base.limits import Limits
from shoal.engine.live.line import Pipe
from shoal.wire import codec
from shoal.wire.identity import verify
from shoal.wire.message import message

if TYPE_CHECKING:
    from shoal.engine.live.transport import Transport

MAGIC = b"ShLn"
LINE, RESERVE, CALL, ANSWER, YES, NO = "line", "reserve", "call", "answer", "yes", "no"
_NONCE_BYTES = 16
_LENGTH = struct.Struct("<H")
_MOST_BYTES = 1024
_LIMITS = Limits(frame_bytes=_MOST_BYTES, header_bytes=_MOST_BYTES)


@message
class Intro:
    """What a side says. about: the peer that is called, or the number of the call answered."""

    what: str
    source: int
    target: int
    about: int
    public: bytes
    signature: bytes


@message
class Ring:
    """From a relay to a peer with a reservation: answer this call."""

    call: int
    caller: int


def greeting() -> bytes:
    """The first bytes of a side."""
    return MAGIC + os.urandom(_NONCE_BYTES)


async def call(
    transport: Transport, pipe: Pipe, target: int, what: str, about: int = 0
) -> None:  # fmt: skip
    """The caller's side. Raises HandshakeError when refused or when another one is there."""
    nonces = await _greet(pipe, b"")
    await _say(transport, pipe, nonces, what, target, about)
    answer = await _hear(transport, pipe, nonces)
    if answer.source != target:
        raise HandshakeError("peer", f"peer {answer.source} answered for peer {target}")
    if answer.what != YES:
        raise HandshakeError("refused", f"peer {target} wants no {what!r}")


class Called:
    """The called side: `intro` is what the caller wants; then `answer`."""

    def __init__(self, transport: Transport, pipe: Pipe, nonces: bytes, intro: Intro) -> None:
        self.pipe = pipe
        self.intro = intro
        self._transport = transport
        self._nonces = nonces

    async def answer(self, yes: bool) -> None:
        await _say(
            self._transport, self.pipe, self._nonces, YES if yes else NO, self.intro.source, 0
        )


async def called(transport: Transport, pipe: Pipe, begun: bytes = b"") -> Called:
    """Hear what a caller wants. begun: what was read of it already."""
    nonces = await _greet(pipe, begun)
    return Called(transport, pipe, nonces, await _hear(transport, pipe, nonces))


async def say(pipe: Pipe, what: Any) -> None:
    """A short message with its length before it."""
    data = b"".join(codec.encode(what))
    pipe[1].write(_LENGTH.pack(len(data)) + data)
    await pipe[1].drain()


async def hear(pipe: Pipe) -> object:
    """The next short message; raises WireError or OSError."""
    try:
        (size,) = _LENGTH.unpack(await pipe[0].readexactly(_LENGTH.size))
        if size > _MOST_BYTES:
            raise HandshakeError("malformed", f"an introduction of {size} bytes")
        return codec.decode(bytearray(await pipe[0].readexactly(size)), _LIMITS)[0]
    except asyncio.IncompleteReadError:
        raise HandshakeError("refused", "the connection ended") from None


async def _greet(pipe: Pipe, begun: bytes) -> bytes:
    """Exchange nonces; the two in the order of their bytes, which both sides know."""
    own = greeting()
    if len(begun) > len(own):
        raise HandshakeError("malformed", f"{len(begun)} bytes before an answer")
    pipe[1].write(own)
    try:
        theirs = begun + await pipe[0].readexactly(len(own) - len(begun))
    except asyncio.IncompleteReadError:
        raise HandshakeError("refused", "the connection ended") from None
    if not theirs.startswith(MAGIC):
        raise HandshakeError("malformed", f"starts with {theirs[:4]!r}, not {MAGIC!r}")
    return b"".join(sorted((own[4:], theirs[4:])))


def _text(transport: Transport, nonces: bytes, intro: Intro) -> bytes:
    bare: Any = Intro(intro.what, intro.source, intro.target, intro.about, intro.public, b"")
    return b"shoal line" + transport.digest + nonces + b"".join(codec.encode(bare))


async def _say(
    transport: Transport, pipe: Pipe, nonces: bytes, what: str, target: int, about: int
) -> None:
    own = transport.credentials
    public = b"" if own is None else own.identity.public
    intro = Intro(what, transport.peer, target, about, public, b"")
    if own is not None:
        signature = own.identity.sign(_text(transport, nonces, intro))
        intro = Intro(what, transport.peer, target, about, public, signature)
    await say(pipe, intro)


async def _hear(transport: Transport, pipe: Pipe, nonces: bytes) -> Intro:
    intro = await hear(pipe)
    if not isinstance(intro, Intro) or intro.target != transport.peer:
        raise HandshakeError("peer", f"not for peer {transport.peer}")
    if intro.source == transport.peer or intro.source not in transport.addresses:
        raise HandshakeError("peer", f"no peer {intro.source} here")
    if transport.credentials is not None:
        transport.trust.check(intro.source, intro.public)
        if not verify(intro.public, _text(transport, nonces, intro), intro.signature):
            raise HandshakeError("identity", f"peer {intro.source} did not sign this")
    return intro


ERRORS = (OSError, WireError, TimeoutError)
"""What may go wrong with a line without being a fault of this program."""
