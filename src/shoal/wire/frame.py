"""What comes before frames: the greeting of a connection, and memory for what is received.

A connection begins with a greeting and its answer, and then carries what `shoal.wire.mux` says.
Everything here works on bytes in memory, so that any stream can carry it and the tests need none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from shoal.base.errors import DecodeError
from shoal.wire.codec import ALIGNMENT, Buffer
from shoal.wire.message import Message
from shoal.wire.recycled import LEAST_BYTES, Recycled

_GREETING = struct.Struct("<4sIqq16s")
_ANSWER = struct.Struct("<4sI56s")
_MAGIC = b"ShHi"
_VERSION = 1
_recycled = Recycled()
GREETING_BYTES = _GREETING.size
ANSWER_BYTES = _ANSWER.size


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


def place(total: int, body: int) -> memoryview:
    """Memory for a frame, with any content, so that its byte `body` lies at a multiple of 64.

    Pages that were never touched take no memory until bytes arrive for them, so a prefix that
    claims a gigabyte costs its sender a gigabyte too.
    """
    if total < LEAST_BYTES:
        import numpy as np  # a process that only looks after others need not load it

        raw = np.empty(total + ALIGNMENT, dtype=np.uint8)
    else:
        raw = _recycled.take(total + ALIGNMENT)
    shift = -(raw.__array_interface__["data"][0] + body) % ALIGNMENT
    return raw.data[shift : shift + total]
