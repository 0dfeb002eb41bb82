"""Sealed messages: what arrives as it was sent, and what was damaged on its way."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import WireError
from shoal.base.limits import DEFAULT
from shoal.wire import codec
from shoal.wire.checksum import checksum, intact, sealed
from shoal.wire.message import Packed, message


@message
class Load:
    """Every type that a field may have."""

    number: int
    share: float
    name: str
    few: tuple[int, ...]
    vector: Tensor
    extra: dict[str, Tensor]
    payload: Packed
    check: int = 0


@message
class Other:
    """Another kind with the same fields as `Twin`."""

    number: int
    check: int = 0


@message
class Twin:
    """As `Other`."""

    number: int
    check: int = 0


def load(number: int = 7, share: float = 0.5) -> Load:
    extra = {"b": torch.arange(2), "a": torch.ones(3)}
    return Load(number, share, "x", (1, 2), torch.arange(6.0).view(2, 3), extra, Packed(b"abc"))


def carried(frame: bytes) -> Load:
    found, _ = codec.decode(frame, DEFAULT)
    assert isinstance(found, Load)
    return found


@given(st.integers(-(2**40), 2**40), st.floats(allow_nan=False))
def test_what_was_sealed_is_intact_on_both_ends(number: int, share: float) -> None:
    told = sealed(load(number, share))
    assert intact(told)
    assert intact(carried(b"".join(codec.encode(told))))


@given(st.data())
def test_no_flipped_bit_is_taken_for_what_was_sent(data: st.DataObject) -> None:
    frame = bytearray(b"".join(codec.encode(sealed(load()))))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    try:
        found, _ = codec.decode(bytes(frame), DEFAULT)
    except WireError:
        return
    if not isinstance(found, Load) or not intact(found):
        return
    # What is left is padding, which nobody reads.
    assert b"".join(codec.encode(found)) == b"".join(codec.encode(sealed(load())))


def test_kind_shape_and_names_count_and_the_order_of_names_does_not() -> None:
    assert sealed(Other(1)).check != sealed(Twin(1)).check
    flat, square = torch.arange(4.0), torch.arange(4.0).view(2, 2)
    assert checksum(flat) != checksum(square)
    assert checksum(flat) != checksum(flat.double())
    assert checksum({"a": flat, "b": square}) == checksum({"b": square, "a": flat})
    assert checksum({"a": flat}) != checksum({"b": flat})
    assert checksum(1) != checksum(1.0)
