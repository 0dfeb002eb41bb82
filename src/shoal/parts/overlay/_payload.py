"""What calls carry: bytes, a tensor or a message, as runs of bytes, compressed if that is wanted.

A tensor's own memory is what is cut into pieces and sent, so that nothing is copied before the
wire; it stays borrowed until the call has ended.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shoal.base.errors import DecodeError, MessageTooLarge, UsageError
from shoal.base.limits import DEFAULT
from shoal.wire import codec
from shoal.wire.message import Message, message

COMPRESSIONS = ("", "zlib", "zstd")
_LEVEL = 1
"""Of zlib: links are what a fast level saves, and a slow one seldom earns its time back."""


@message
class _Array:
    value: Tensor


@dataclass(frozen=True)
class Parcel:
    """A payload as bytes. form: what it is, and how it was compressed; size_bytes: of the parts."""

    form: str
    size_bytes: int
    parts: tuple[codec.Buffer, ...]

    def pieces(self, piece_bytes: int) -> Iterator[codec.Buffer]:
        """All of it in runs of that many bytes, the last may be shorter; one at least."""
        held: list[codec.Buffer] = []
        room = piece_bytes
        for part in self.parts:
            view = memoryview(part)
            while len(view) >= room:
                held.append(view[:room])
                view = view[room:]
                yield held[0] if len(held) == 1 else b"".join(held)
                held, room = [], piece_bytes
            if len(view):
                held.append(view)
                room -= len(view)
        if held or not self.size_bytes:
            yield b"".join(held)

    def whole(self) -> bytes:
        """All of it as one run."""
        return b"".join(self.parts)


def pack(value: Any, compression: str = "") -> Parcel:
    """A payload as bytes; UsageError for what cannot be sent.

    >>> unpack(pack(b"abc" * 100, "zlib").form, pack(b"abc" * 100, "zlib").whole(), 300)[:6]
    b'abcabc'
    """
    if compression not in COMPRESSIONS:
        raise UsageError(f"compression={compression!r}; need one of {COMPRESSIONS}")
    if isinstance(value, (bytes, bytearray, memoryview)):
        form, parts = "bytes", [memoryview(value).cast("B")]
    elif isinstance(value, Tensor):
        form, parts = "tensor", codec.encode(_Array(value))  # type: ignore[arg-type]
    elif isinstance(value, Message):
        form, parts = "message", codec.encode(value)
    else:
        raise UsageError(
            f"a payload is a {type(value).__name__}; need bytes, a Tensor or a message"
        )
    if compression:
        parts = [_compressed(b"".join(parts), compression)]
        form = f"{form}+{compression}"
    return Parcel(form, sum(map(len, parts)), tuple(parts))


def unpack(form: str, data: codec.Buffer, most_bytes: int) -> Any:
    """Inverse of `pack`. DecodeError for anything else; MessageTooLarge for more than that."""
    what, _, compression = form.partition("+")
    if compression:
        data = _expanded(data, compression, most_bytes)
    if what == "bytes":
        return bytes(data)
    if what not in ("tensor", "message"):
        raise DecodeError(f"payload: form {form[:40]!r} is unknown here")
    read = codec.decode(data if isinstance(data, bytearray) else bytearray(data), DEFAULT)[0]
    if what == "message":
        return read
    if not isinstance(read, _Array):
        raise DecodeError(f"payload: a {type(read).__name__} in place of a tensor")
    return read.value


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UsageError(
            "compression='zstd' needs the package zstandard (pip install 'shoal[zstd]', or use "
            "'zlib')"
        ) from None
    return zstandard


def _compressed(data: bytes, compression: str) -> bytes:
    if compression == "zlib":
        return zlib.compress(data, _LEVEL)
    return _zstandard().ZstdCompressor().compress(data)


def _expanded(data: codec.Buffer, compression: str, most_bytes: int) -> bytes:
    """Never more than `most_bytes`, whatever the data claims: small ones can expand to anything."""
    if compression not in COMPRESSIONS:
        raise DecodeError(f"payload: compression {compression[:20]!r} is unknown here")
    if compression == "zstd":
        return _expanded_zstd(bytes(data), most_bytes)
    reader = zlib.decompressobj()
    try:
        out = reader.decompress(data, most_bytes + 1)
    except zlib.error as error:
        raise DecodeError(f"payload: {error}") from None
    if len(out) > most_bytes:
        raise MessageTooLarge(f"payload: more than {most_bytes} bytes once expanded")
    if not reader.eof:
        raise DecodeError("payload: its compressed form is cut short")
    return out


def _expanded_zstd(data: bytes, most_bytes: int) -> bytes:
    zstandard = _zstandard()
    try:
        size = zstandard.frame_content_size(data)
        if size > most_bytes:
            raise MessageTooLarge(f"payload: {size} bytes once expanded; limit {most_bytes}")
        # Into memory of the announced size, so that a frame which lies about it fails.
        return zstandard.ZstdDecompressor().decompress(data) if size > 0 else b""
    except zstandard.ZstdError as error:
        raise DecodeError(f"payload: {error}") from None
