"""Digests of what a run did, equal in every process whatever its hash seed."""

from __future__ import annotations

import hashlib
import struct

_ROW = struct.Struct("<qqqqq")


class TraceDigest:
    """Digest of deliveries in order: (time_ns, source, target, kind and tag, size).

    Rows are packed and hashed in blocks, since hashing each row alone costs more than the row.
    """

    __slots__ = ("_hash", "_pending", "add", "rows")

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending = bytearray()
        self.rows = 0
        pack, extend = _ROW.pack, self._pending.extend

        def add(time_ns: int, source: int, target: int, key: int, size: int) -> None:
            extend(pack(time_ns, source, target, key, size))

        self.add = add

    def flush(self) -> None:
        """Hash what is pending; called every few thousand rows."""
        self.rows += len(self._pending) // _ROW.size
        self._hash.update(self._pending)
        self._pending.clear()

    def hexdigest(self) -> str:
        self.flush()
        return self._hash.hexdigest()


def bytes_digest(*parts: bytes | memoryview) -> str:
    """BLAKE2b of the concatenation, 128 bits in hex."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()
