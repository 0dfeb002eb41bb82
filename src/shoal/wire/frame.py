"""Frames on a byte stream, without sockets: greeting, cutting, and the queue of what is unsent.

A connection begins with a greeting and its answer, and then carries frames of `shoal.wire.codec`
one after the other. Everything here works on bytes in memory, so that any stream can carry it and
the tests need none.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np

from shoal.base.errors import DecodeError
from shoal.base.limits import DEFAULT, Limits
from shoal.wire.codec import ALIGNMENT, PREFIX, Buffer, Prefix, read_prefix
from shoal.wire.message import Message

_GREETING = struct.Struct("<4sIqq16s")
_ANSWER = struct.Struct("<4sI56s")
_MAGIC = b"ShHi"
_VERSION = 1
GREETING_BYTES = _GREETING.size
ANSWER_BYTES = _ANSWER.size
# Linux takes at most 1,024 buffers in one gathering write; far fewer already hide the call's cost.
_MOST_BUFFERS = 128


class Greeting(NamedTuple):
    """First bytes of a connection: who calls, whom, and what both must have in common.

    digest: 16 bytes that stand for the run and for the declared messages, see `agreement`.
    """

    source: int
    target: int
    digest: bytes

    def pack(self) -> bytes:
        return _GREETING.pack(_MAGIC, _VERSION, self.source, self.target, self.digest)

    @classmethod
    def unpack(cls, data: Buffer) -> Greeting:
        """Inverse of `pack`; DecodeError for anything else.

        >>> Greeting.unpack(Greeting(3, 4, bytes(16)).pack()).source
        3
        """
        if len(data) != _GREETING.size:
            raise DecodeError(f"greeting: {len(data)} bytes; it has {_GREETING.size}")
        magic, version, source, target, digest = _GREETING.unpack(data)
        if magic != _MAGIC:
            raise DecodeError(f"greeting: starts with {magic!r}, not {_MAGIC!r}: no Shoal peer")
        if version != _VERSION:
            raise DecodeError(f"greeting: version {version}; this build speaks {_VERSION}")
        return cls(source, target, digest)


def pack_answer(refusal: str = "") -> bytes:
    """What the called peer says to a greeting: nothing against it, or why not."""
    return _ANSWER.pack(_MAGIC, bool(refusal), refusal.encode()[:56])


def unpack_answer(data: Buffer) -> str:
    """Inverse of `pack_answer`: the refusal, or "" for a welcome.

    >>> unpack_answer(pack_answer("another run"))
    'another run'
    """
    if len(data) != _ANSWER.size:
        raise DecodeError(f"answer: {len(data)} bytes; it has {_ANSWER.size}")
    magic, refused, text = _ANSWER.unpack(data)
    if magic != _MAGIC or refused > 1:
        raise DecodeError("answer: not from a Shoal peer")
    return (text.rstrip(b"\0").decode(errors="replace") or "refused") if refused else ""


def schema(kind: type[Message]) -> str:
    """A message class as text: equal texts can read each other's frames.

    >>> from shoal.wire.message import message
    >>> @message
    ... class Ping:
    ...     round: int
    >>> schema(Ping).endswith("Ping(round: <class 'int'>)")
    True
    """
    fields = (f"{f.name}: {_text(f.type)}" for f in msgspec.structs.fields(kind))
    return f"{kind.kind}({', '.join(fields)})"


def _text(hint: Any) -> str:
    return hint.kind if isinstance(hint, type) and issubclass(hint, Message) else repr(hint)


def agreement(run: bytes, schemas: Mapping[str, str]) -> bytes:
    """16 bytes that two peers share only in the same run with the same messages."""
    state = hashlib.blake2b(run, digest_size=16)
    for name in sorted(schemas):
        text = schemas[name].encode()
        state.update(struct.pack("<I", len(text)) + text)
    return state.digest()


class FrameReader:
    """Cuts a stream of bytes into frames; memory for a frame is taken as its bytes arrive.

    Receive into `space(scratch)`, then call `received(count, scratch)`. Small frames come many at a
    time through the shared scratch; the rest of a large one is received in its final place.
    """

    __slots__ = ("_frame", "_have", "_limits", "_prefix")

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self._limits = limits
        self._prefix = memoryview(bytearray(PREFIX.size))
        self._frame: memoryview | None = None
        self._have = 0

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._have > 0

    def space(self, scratch: memoryview) -> memoryview:
        """Where the next bytes go."""
        if self._frame is not None:
            return self._frame[self._have :]
        # A cut prefix is completed where it is kept; it is followed by scratch again.
        return self._prefix[self._have :] if self._have else scratch

    def received(self, count: int, scratch: memoryview) -> Iterator[memoryview]:
        """The frames that are complete now. Raises DecodeError or MessageTooLarge and is then of
        no more use. A frame without segments may lie in the scratch: decode it at once."""
        if self._frame is not None:
            self._have += count
            if self._have == len(self._frame):
                frame, self._frame, self._have = self._frame, None, 0
                yield frame
            return
        if self._have:
            self._have += count
            if self._have == PREFIX.size:
                self._begin(read_prefix(self._prefix, self._limits), self._prefix)
                if self._frame is not None and self._have == len(self._frame):
                    frame, self._frame, self._have = self._frame, None, 0
                    yield frame
            return
        yield from self._cut(scratch[:count])

    def _cut(self, data: memoryview) -> Iterator[memoryview]:
        size = PREFIX.size
        while len(data) >= size:
            prefix = read_prefix(data, self._limits)
            total = size + prefix.rest_bytes
            if total > len(data):
                self._begin(prefix, data)
                return
            frame, data = data[:total], data[total:]
            if prefix.segments:
                own = _place(prefix)
                own[:] = frame
                frame = own
            yield frame
        self._prefix[: len(data)] = data
        self._have = len(data)

    def _begin(self, prefix: Prefix, data: memoryview) -> None:
        self._frame = _place(prefix)
        self._frame[: len(data)] = data
        self._have = len(data)


def _place(prefix: Prefix) -> memoryview:
    """Memory for a frame, not yet touched, with its first segment at a multiple of 64.

    Untouched pages take no memory until bytes arrive for them, so a prefix that claims a gigabyte
    costs its sender a gigabyte too.
    """
    total = PREFIX.size + prefix.rest_bytes
    raw = np.empty(total + ALIGNMENT, dtype=np.uint8)
    body = raw.__array_interface__["data"][0] + total - prefix.body_bytes
    shift = -body % ALIGNMENT
    return raw.data[shift : shift + total]


class Outbox:
    """Frames on their way into a socket, by reference; counts bytes that came and that are gone."""

    __slots__ = ("_ends", "_parts", "accepted_bytes", "gone_bytes")

    def __init__(self) -> None:
        self._parts: deque[memoryview] = deque()
        self._ends: deque[int] = deque()
        self.accepted_bytes = 0
        self.gone_bytes = 0

    @property
    def waiting_bytes(self) -> int:
        return self.accepted_bytes - self.gone_bytes

    def push(self, frame: Iterable[Buffer]) -> None:
        """Append the buffers of one frame; they stay borrowed until they are gone."""
        for buffer in frame:
            if len(buffer):
                self._parts.append(memoryview(buffer))
                self.accepted_bytes += len(buffer)
        self._ends.append(self.accepted_bytes)

    def head(self) -> list[memoryview]:
        """What to hand to the next gathering write."""
        return list(islice(self._parts, _MOST_BUFFERS))

    def advance(self, count: int) -> None:
        """That many bytes of the head are written."""
        self.gone_bytes += count
        parts, ends = self._parts, self._ends
        while count:
            first = parts[0]
            if count < len(first):
                parts[0] = first[count:]
                break
            count -= len(first)
            parts.popleft()
        while ends and ends[0] <= self.gone_bytes:
            ends.popleft()

    def clear(self) -> int:
        """Forget everything; how many frames were not written to their end."""
        lost = len(self._ends)
        self._parts.clear()
        self._ends.clear()
        self.gone_bytes = self.accepted_bytes
        return lost
