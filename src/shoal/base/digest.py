"""Digests of what a run did, equal in every process whatever its hash seed."""

from __future__ import annotations

import hashlib
import sys
from array import array

_ROW = 5


class TraceDigest:
    """Digest of deliveries in order: (time_ns, source, target, kind and tag, size).

    Rows are collected as numbers and hashed in blocks of little-endian 64-bit words, since hashing
    each row alone costs more than the row. `extend` takes the five numbers of one or more rows.
    """

    __slots__ = ("_hash", "_pending", "extend", "rows")

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending: list[int] = []
        self.extend = self._pending.extend
        self.rows = 0

    def add(self, time_ns: int, source: int, target: int, key: int, size: int) -> None:
        self.extend((time_ns, source, target, key, size))

    def flush(self) -> None:
        """Hash what is pending; called every few thousand rows."""
        pending = self._pending
        self.rows += len(pending) // _ROW
        words = array("q", pending)
        if sys.byteorder == "big":
            words.byteswap()
        self._hash.update(words)
        pending.clear()

    def hexdigest(self) -> str:
        """Of all rows so far; more may follow."""
        self.flush()
        return self._hash.hexdigest()


def bytes_digest(*parts: bytes | memoryview) -> str:
    """BLAKE2b of the concatenation, 128 bits in hex."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()
