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

_PLAIN = frozenset({int, float, bool, str, type(None), tuple})


def checksum(*fields: Any) -> int:
    """CRC-32 of numbers, strings, bytes, tensors, packed fields and mappings of them.

    Equal before sending and after arrival, for fields of the types that messages have. Finds any
    damage of up to 32 bits in a row, and all other damage but once in 2^32; no defence against
    anybody who means it.

    >>> checksum(1, {"a": 2.0, "b": "x"}) == checksum(1, {"b": "x", "a": 2.0})
    True
    >>> checksum(1, 2.0) == checksum(1, 3.0)
    False
    """
    plain: list[Any] = []
    code = 0
    for field in fields:
        kind = type(field)
        if kind in _PLAIN:
            plain.append(field)
        elif isinstance(field, Mapping):
            plain.extend((name, checksum(field[name])) for name in sorted(field))
        elif kind is Packed:
            code = crc32(field.pack(), code)
        elif isinstance(field, bytes | bytearray | memoryview):
            code = crc32(field, code)
        elif hasattr(field, "untyped_storage"):
            from shoal.wire.tensors import describe, raw

            plain.append(describe(field)[1])
            code = crc32(raw(field), code)
        else:
            plain.append(field)
    # One text of all that is short: a call for each costs more than the sum.
    return crc32(repr(plain).encode(), code)


def sealed(told: M) -> M:
    """The same message with the checksum of its kind and fields in `check`, its last field."""
    return replace(told, check=_sum(told))  # pyright: ignore[reportArgumentType]


def intact(told: Any) -> bool:
    """Whether a message is what its sender sealed; one that is not counts as lost."""
    return told.check == _sum(told)


def _sum(told: Any) -> int:
    # The kind too: a flipped bit may make a message one of another kind with the same fields.
    return checksum(type(told).__name__, *astuple(told)[:-1])
