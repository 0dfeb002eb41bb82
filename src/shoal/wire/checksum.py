"""A checksum of a message's fields, for programs whose messages may be damaged and still decode.

Links of this package protect their bytes; a bit that flips elsewhere (memory, a proxy, the fault
`corrupt`) gives a message with another number in it. One field of a message may hold this sum of
the others, so that its receiver can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar
from zlib import crc32

from msgspec.structs import astuple, replace

from shoal.wire.message import Packed

M = TypeVar("M")


def checksum(*fields: Any) -> int:
    """CRC-32 of numbers, strings, bytes, tensors, packed fields and mappings of them, in order.

    Equal before sending and after arrival, for fields of the types that messages have. Finds any
    damage of up to 32 bits in a row, and all other damage but once in 2^32; no defence against
    anybody who means it.

    >>> checksum(1, {"a": 2.0, "b": "x"}) == checksum(1, {"b": "x", "a": 2.0})
    True
    >>> checksum(1, 2.0) == checksum(1, 3.0)
    False
    """
    code = 0
    for field in fields:
        if isinstance(field, Mapping):
            for name in sorted(field):
                code = crc32(checksum(name, field[name]).to_bytes(4, "little"), code)
        else:
            code = crc32(_bytes(field), code)
    return code


def _bytes(field: Any) -> bytes | memoryview:
    if isinstance(field, Packed):
        return field.pack()
    if isinstance(field, bytes | bytearray | memoryview):
        return bytes(field)
    if hasattr(field, "untyped_storage"):
        from shoal.wire.tensors import raw

        return raw(field)
    return repr(field).encode()


def sealed(told: M) -> M:
    """The same message with the checksum of its kind and fields in `check`, its last field."""
    return replace(told, check=_sum(told))  # pyright: ignore[reportArgumentType]


def intact(told: Any) -> bool:
    """Whether a message is what its sender sealed; one that is not counts as lost."""
    return told.check == _sum(told)


def _sum(told: Any) -> int:
    # The kind too: a flipped bit may make a message one of another kind with the same fields.
    return checksum(type(told).__name__, *astuple(told)[:-1])
