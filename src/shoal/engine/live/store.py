"""What survives a peer's crash: a dictionary, and with a directory one file per peer.

A commit writes the peer's whole store to a temporary file, forces it to the disk and renames it
over the old one, so that a reader finds all of a commit or nothing of it. That suits stores of some
megabytes; the cost of a commit grows with all that is stored.

    file     8 bytes magic, number of entries, 16 bytes digest of the rest, entries
    entry    length, frame of an `Entry`; the stored value is a frame of its own inside
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.base.errors import DecodeError, UsageError
from shoal.base.limits import Limits
from shoal.wire import codec
from shoal.wire.message import Message, Packed, message

_HEAD = struct.Struct("<8sI4x16s")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"ShoalSt1"
# Own files: as large as a commit made them.
_LIMITS = Limits(frame_bytes=1 << 62, header_bytes=1 << 30)


@message
class Entry:
    """One key of a store: bytes as they are, anything else as a frame."""

    key: str
    form: str
    value: Packed


@message
class Array:
    """A stored tensor."""

    value: Tensor


class DiskStore:
    """A peer's file. `load` comes first; `commit` and `clear` then belong to one thread."""

    def __init__(self, directory: str, peer: int) -> None:
        self.path = Path(directory) / f"peer-{peer}.store"
        self._durable: dict[str, Any] = {}

    def load(self) -> dict[str, Any]:
        """All that was committed; empty when there is no file."""
        self._durable = self._read()
        return dict(self._durable)

    def commit(self, items: Mapping[str, Any]) -> None:
        """Put items into the file, all or none, durable on return."""
        merged = {**self._durable, **items}
        self._write(merged)
        self._durable = merged

    def clear(self) -> None:
        """A crash that lost the disk."""
        self._durable = {}
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            data = bytearray(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        try:
            return _unpack(data)
        except (DecodeError, struct.error, ValueError) as error:
            raise UsageError(
                f"store {self.path}: {error} (the file is damaged; remove it, and the peer starts "
                "without its store)"
            ) from None

    def _write(self, items: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        body = [piece for key, value in items.items() for piece in _pack(key, value)]
        digest = hashlib.blake2b(digest_size=16)
        for piece in body:
            digest.update(piece)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, len(items), digest.digest()))
            file.writelines(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._sync_directory()

    def _sync_directory(self) -> None:
        # The rename itself is durable only once the directory is.
        handle = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _pack(key: str, value: Any) -> list[codec.Buffer]:
    if isinstance(value, bytes):
        form, content = "bytes", value
    elif isinstance(value, Tensor):
        form, content = "tensor", b"".join(codec.encode(Array(value)))
    elif isinstance(value, Message):
        form, content = "message", b"".join(codec.encode(value))
    else:
        raise UsageError(
            f"commit: {key!r} is a {type(value).__name__}; a store keeps bytes, Tensor and messages"
        )
    frame = codec.encode(Entry(key, form, Packed(content)))
    return [_LENGTH.pack(sum(map(len, frame))), *frame]


def _unpack(data: bytearray) -> dict[str, Any]:
    magic, entries, digest = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise DecodeError(f"starts with {magic!r}, not {_MAGIC!r}")
    view = memoryview(data)
    if hashlib.blake2b(view[_HEAD.size :], digest_size=16).digest() != digest:
        raise DecodeError("its digest does not match its content")
    items: dict[str, Any] = {}
    at = _HEAD.size
    for _ in range(entries):
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        entry: Any = codec.decode(view[at : at + length], _LIMITS)[0]
        at += length
        content = entry.value.content
        if entry.form == "bytes":
            items[entry.key] = bytes(content)
        else:
            stored: Any = codec.decode(content, _LIMITS)[0]
            items[entry.key] = stored.value if entry.form == "tensor" else stored
    return items
