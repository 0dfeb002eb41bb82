"""What survives a peer's crash: a dictionary, and with a directory one file per peer.

The file is a log: a commit appends its items and forces them to the disk before it returns, so it
costs what it writes and not what is stored. Once most of the file is of the past, and at the first
commit, the whole store is written to a temporary file, forced to the disk and renamed.

    file     8 bytes magic, commits
    commit   bytes of its entries, their number, 16 bytes digest of them, 8 bytes digest of this
             head and of its place in the file; entries
    entry    length, frame of an `Entry`; the stored value is a frame of its own inside

A peer that is killed while it writes leaves at most one commit that is not whole, at the end, and
that one had not returned. Reading leaves it out and says so in the log ("shoal"). Damage anywhere
else is an error: what comes after it had been promised.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from shoal.base.errors import DecodeError, SimulationError, UsageError
from shoal.base.limits import Limits
from shoal.wire import codec
from shoal.wire.message import Message, Packed, message

_HEAD = struct.Struct("<QI4x16s")
_CHECK_BYTES = 8
_HEAD_BYTES = _HEAD.size + _CHECK_BYTES
_LENGTH = struct.Struct("<Q")
_MAGIC = b"ShoalSt2"
_PAST_BYTES = 1 << 20
# Own files: as large as a commit made them.
_LIMITS = Limits(frame_bytes=1 << 62, header_bytes=1 << 30)
_log = logging.getLogger("shoal")


@message
class Entry:
    """One key of a store: bytes as they are, anything else as a frame."""

    key: str
    form: str
    value: Packed


@message
class Array:
    """A stored tensor; `Any`, so that a store without tensors needs no torch."""

    value: Any


class DiskStore:
    """A peer's file. `load` comes first; `commit` and `clear` then belong to one thread.

    Assumes that one process at a time writes the file; a second one is told.
    """

    def __init__(self, directory: str, peer: int) -> None:
        self.path = Path(directory) / f"peer-{peer}.store"
        self.repaired = ""
        """what `load` had to leave out, and why"""
        self._durable: dict[str, Any] = {}
        self._live: dict[str, int] = {}
        self._size: int | None = None
        self._end = 0

    def load(self) -> dict[str, Any]:
        """All that was committed; empty when there is no file."""
        self._durable, self._live, self._size, self._end = {}, {}, None, 0
        try:
            data = memoryview(bytearray(self.path.read_bytes()))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageError(
                f"store {self.path}: cannot be read: {error.strerror} (let this user read and "
                "write it)"
            ) from None
        try:
            entries, self._end, self.repaired = _whole(data)
            self._durable = {key: _value(entry) for key, (entry, _) in entries.items()}
        except (DecodeError, struct.error, ValueError) as error:
            raise UsageError(
                f"store {self.path}: {error} (the file is damaged or of another program; remove "
                "it, and the peer starts without its store)"
            ) from None
        self._live = {key: size for key, (_, size) in entries.items()}
        self._size = len(data)
        if self.repaired:
            _log.warning(f"store {self.path}: {self.repaired}; going on from the commit before")
        return dict(self._durable)

    def commit(self, items: Mapping[str, Any]) -> None:
        """Put items into the file, all or none, durable on return."""
        packed = {key: _pack(key, value) for key, value in items.items()}
        merged = {**self._durable, **items}
        live = {**self._live, **{key: _size(pieces) for key, pieces in packed.items()}}
        try:
            if self._end and self._end < _PAST_BYTES + 2 * sum(live.values()):
                self._append(packed)
            else:
                self._rewrite({key: _pack(key, value) for key, value in merged.items()})
        except OSError as error:
            # Nobody knows what reached the disk, so the next commit begins a new file.
            self._size, self._end = self._stat_size(), 0
            raise SimulationError(
                f"store {self.path}: a commit of {_size_of_all(packed)} bytes failed: "
                f"{error.strerror} (free space or raise the limit; earlier commits are whole)"
            ) from error
        self._durable, self._live = merged, live

    def clear(self) -> None:
        """A crash that lost the disk."""
        self._durable, self._live, self._size, self._end = {}, {}, None, 0
        self.path.unlink(missing_ok=True)

    def _append(self, entries: Mapping[str, Sequence[codec.Buffer]]) -> None:
        try:
            with self.path.open("r+b") as file:
                self._lock(file)
                file.truncate(self._end)
                file.seek(self._end)
                end = _write(file, self._end, entries)
        except OSError:
            # The part that was written may be what fills the disk.
            with suppress(OSError):
                os.truncate(self.path, self._end)
            raise
        self._size = self._end = end

    def _rewrite(self, entries: Mapping[str, Sequence[codec.Buffer]]) -> None:
        folder = self.path.parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            _sync_directory(folder.parent)
        if self._stat_size() != self._size:
            raise self._shared("was changed")
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                self._lock(file, fresh=True)
                file.write(_MAGIC)
                end = _write(file, len(_MAGIC), entries)
                temporary.replace(self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        # The rename itself is durable only once the directory is.
        _sync_directory(folder)
        self._size = self._end = end

    def _lock(self, file: BinaryIO, fresh: bool = False) -> None:
        """Until the file is closed nobody else writes it, and nobody did since it was read."""
        import fcntl  # POSIX alone; the module itself can be read anywhere

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._shared("is being written") from None
        if not fresh and os.fstat(file.fileno()).st_size != self._size:
            raise self._shared("was changed")

    def _shared(self, what: str) -> SimulationError:
        return SimulationError(
            f"store {self.path}: {what} by another process (one peer at a time may use a store)"
        )

    def _stat_size(self) -> int | None:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return None


def _write(file: BinaryIO, at: int, entries: Mapping[str, Sequence[codec.Buffer]]) -> int:
    """Write one commit at byte `at`, durable on return; where it ends."""
    digest = hashlib.blake2b(digest_size=16)
    for pieces in entries.values():
        for piece in pieces:
            digest.update(piece)
    size = _size_of_all(entries)
    head = _HEAD.pack(size, len(entries), digest.digest())
    file.write(head + _check(head, at))
    for pieces in entries.values():
        file.writelines(pieces)
    file.flush()
    os.fsync(file.fileno())
    return at + _HEAD_BYTES + size


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check(head: bytes | memoryview, at: int) -> bytes:
    state = hashlib.blake2b(head, digest_size=_CHECK_BYTES)
    state.update(at.to_bytes(8, "little"))
    return state.digest()


def _size(pieces: Sequence[codec.Buffer]) -> int:
    return sum(map(len, pieces))


def _size_of_all(entries: Mapping[str, Sequence[codec.Buffer]]) -> int:
    return sum(map(_size, entries.values()))


def _pack(key: str, value: Any) -> list[codec.Buffer]:
    if isinstance(value, bytes):
        form, content = "bytes", value
    elif codec.is_tensor(value):
        form, content = "tensor", b"".join(codec.encode(Array(value)))
    elif isinstance(value, Message):
        form, content = "message", b"".join(codec.encode(value))
    else:
        raise UsageError(
            f"commit: {key!r} is a {type(value).__name__}; a store keeps bytes, Tensor and messages"
        )
    frame = codec.encode(Entry(key, form, Packed(content)))
    return [_LENGTH.pack(_size(frame)), *frame]


def _whole(data: memoryview) -> tuple[dict[str, tuple[Any, int]], int, str]:
    """(newest entry and its size by key, where the whole commits end, what comes after them)."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise DecodeError(f"starts with {bytes(data[: len(_MAGIC)])!r}, not {_MAGIC!r}")
    found: dict[str, tuple[Any, int]] = {}
    at, why = len(_MAGIC), ""
    while at < len(data) and not why:
        body, why = _body(data, at)
        if not why:
            found.update(_entries(*body))
            at += _HEAD_BYTES + len(body[0])
    if at == len(_MAGIC):
        raise DecodeError(f"holds no whole commit: {why or 'it ends before the first one'}")
    return found, at, why


def _body(data: memoryview, at: int) -> tuple[tuple[memoryview, int], str]:
    """A commit's entries and their number, or why it is not whole though it may be the last."""
    nothing, left = (data[:0], 0), len(data) - at
    if left < _HEAD_BYTES:
        return nothing, f"the last commit ends within its head, after {left} bytes"
    head, check = data[at : at + _HEAD.size], data[at + _HEAD.size : at + _HEAD_BYTES]
    if _check(head, at) != check:
        if not any(data[at:]):
            return nothing, f"the last {left} bytes are zeros: they never reached the disk"
        raise DecodeError(f"the head of the commit at byte {at} is damaged")
    size, entries, digest = _HEAD.unpack(head)
    if left < _HEAD_BYTES + size:
        return nothing, f"the last commit has {left - _HEAD_BYTES} of {size} bytes"
    body = data[at + _HEAD_BYTES : at + _HEAD_BYTES + size]
    if hashlib.blake2b(body, digest_size=16).digest() != digest:
        if left == _HEAD_BYTES + size:
            return nothing, f"the last commit, of {size} bytes, does not match its digest"
        raise DecodeError(f"the commit at byte {at} does not match its digest")
    return (body, entries), ""


def _entries(body: memoryview, count: int) -> dict[str, tuple[Any, int]]:
    out: dict[str, tuple[Any, int]] = {}
    at = 0
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        entry: Any = codec.decode(body[at : at + length], _LIMITS)[0]
        out[entry.key] = entry, _LENGTH.size + length
        at += length
    return out


def _value(entry: Any) -> Any:
    content = entry.value.content
    if entry.form == "bytes":
        return bytes(content)
    if entry.form == "tensor":
        import torch  # noqa: F401  or the codec would know no tensors

        stored: Any = codec.decode(content, _LIMITS)[0]
        # A copy: the view would keep the whole file in memory.
        return stored.value.clone()
    return codec.decode(content, _LIMITS)[0]
