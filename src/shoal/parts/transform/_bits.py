"""Fixed-width integers and bit planes as bytes, least significant bit first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.base.errors import DecodeError

Bits = np.ndarray
"""uint8 array of zeros and ones, one entry per bit."""


def width_of(count: int) -> int:
    """Bits that tell `count` values apart: ceil(log2 count), 0 for a single value.

    >>> [width_of(n) for n in (1, 2, 3, 256, 257)]
    [0, 1, 2, 8, 9]
    """
    return max(count - 1, 0).bit_length()


def _unsigned(width: int) -> np.dtype:
    for size in (1, 2, 4, 8):
        if width <= 8 * size:
            return np.dtype(f"<u{size}")
    raise ValueError(f"width {width} is above 64 bits")


def to_bits(values: np.ndarray, width: int) -> Bits:
    """Non-negative integers [m] below 2**width as m * width bits.

    >>> to_bits(np.array([5, 2]), 3).tolist()
    [1, 0, 1, 0, 1, 0]
    """
    if width == 0:
        return np.empty(0, np.uint8)
    if width == 1:
        return values.astype(np.uint8, copy=False)
    kind = _unsigned(width)
    octets = values.astype(kind, copy=False).reshape(-1, 1).view(np.uint8)
    return np.unpackbits(octets, axis=1, bitorder="little", count=width).reshape(-1)


def from_bits(bits: Bits, width: int, count: int) -> np.ndarray:
    """Inverse of `to_bits`: int64 [count] (uint8 for widths up to 8)."""
    if width == 0:
        return np.zeros(count, np.uint8)
    if width == 1:
        return bits
    kind = _unsigned(width)
    rows = bits.reshape(count, width)
    if width % 8:
        full = np.zeros((count, 8 * kind.itemsize), np.uint8)
        full[:, :width] = rows
        rows = full
    octets = np.packbits(rows, axis=1, bitorder="little")
    if octets.shape[1] != kind.itemsize:
        octets = np.pad(octets, ((0, 0), (0, kind.itemsize - octets.shape[1])))
    values = np.ascontiguousarray(octets).view(kind).reshape(-1)
    return values if kind.itemsize == 1 else values.astype(np.int64)


def join(planes: Sequence[Bits]) -> bytes:
    """Planes one after the other as bytes; the last byte is filled with zeros."""
    bits = planes[0] if len(planes) == 1 else np.concatenate(planes)
    return np.packbits(bits, bitorder="little").tobytes()


class Reader:
    """Takes planes back out of bytes and refuses more bits than there are.

    >>> reader = Reader(np.frombuffer(join([to_bits(np.array([3, 1]), 2)]), np.uint8), "example")
    >>> from_bits(reader.take(4), 2, 2).tolist()
    [3, 1]
    >>> reader.finish()
    """

    def __init__(self, octets: np.ndarray, who: str) -> None:
        self._bits = np.unpackbits(octets, bitorder="little")
        self._at = 0
        self._who = who

    def take(self, count: int) -> Bits:
        """The next `count` bits."""
        end = self._at + count
        if end > len(self._bits):
            raise DecodeError(f"{self._who}: {end} bits wanted, {len(self._bits)} there")
        self._at, start = end, self._at
        return self._bits[start:end]

    def close(self) -> int:
        """Bytes used so far; the rest of the last one must be zeros: one vector, one encoding."""
        used = (self._at + 7) // 8
        if self._bits[self._at : 8 * used].any():
            raise DecodeError(f"{self._who}: padding that is not 0 (corrupted bytes)")
        return used

    def finish(self) -> None:
        """Refuse left-over bytes too."""
        if 8 * self.close() != len(self._bits):
            raise DecodeError(f"{self._who}: {len(self._bits) - self._at} bits left over")


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` integers of `width` bits, padding included."""
    return (count * width + 7) // 8


def pack_integers(values: np.ndarray, width: int) -> bytes:
    """Non-negative integers below 2**width as ceil(count * width / 8) bytes."""
    if width and width % 8 == 0:
        # Whole bytes need not be taken apart.
        kind = _unsigned(width)
        octets = np.ascontiguousarray(values, kind).view(np.uint8).reshape(-1, kind.itemsize)
        return octets[:, : width // 8].tobytes()
    return join([to_bits(values, width)])


def unpack_integers(octets: np.ndarray, width: int, count: int, who: str) -> np.ndarray:
    """Inverse of `pack_integers`."""
    if width and width % 8 == 0 and len(octets) == packed_bytes(count, width):
        kind = _unsigned(width)
        full = np.zeros((count, kind.itemsize), np.uint8)
        full[:, : width // 8] = octets.reshape(count, width // 8)
        values = full.view(kind).reshape(-1)
        return values if width == 8 else values.astype(np.int64)
    reader = Reader(octets, who)
    values = from_bits(reader.take(count * width), width, count)
    reader.finish()
    return values
