"""A checksum of values as messages have them: a short name for what somebody holds or asks for.

Against damage on the way messages are declared with `checked=True` (`shoal.wire.message`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

from shoal.wire.message import Packed

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
