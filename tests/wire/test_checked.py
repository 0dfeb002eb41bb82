"""Checked messages: they arrive as they were sent, or not at all."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import DecodeError, WireError
from shoal.wire import codec
from shoal.wire.message import Packed, message

CHECK = slice(16, 20)


@message(tag=("number",), checked=True)
class Load:
    """Every type that a field may have."""

    number: int
    share: float
    name: str
    few: tuple[int, ...]
    vector: Tensor
    extra: dict[str, Tensor]
    payload: Packed


@message
class Bare:
    """As `Load`, without a checksum."""

    number: int
    share: float
    name: str
    few: tuple[int, ...]
    vector: Tensor
    extra: dict[str, Tensor]
    payload: Packed


@message(checked=True)
class Twin:
    number: int


def made(kind: Any, number: int = 7, share: float = 0.5) -> Any:
    extra = {"b": torch.arange(2), "a": torch.ones(3)}
    return kind(number, share, "x", (1, 2), torch.arange(6.0).view(2, 3), extra, Packed(b"abc"))


def joined(what: Any, request: int = 0) -> bytearray:
    return bytearray(b"".join(codec.encode(what, request)))


def test_the_declaration_says_so_and_costs_no_bytes() -> None:
    assert Load.checked  # type: ignore[attr-defined]
    assert not Bare.checked  # type: ignore[attr-defined]
    assert made(Load).tag == (7,)
    assert codec.size_of(made(Load)) == codec.size_of(made(Bare)) == len(joined(made(Load)))


@given(st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.integers(0, 2**60))
def test_what_was_sent_arrives(number: int, share: float, request: int) -> None:
    found, asked = codec.decode(joined(made(Load, number, share), request))
    assert (found.number, found.share, asked) == (number, share, request)  # type: ignore[attr-defined]


def test_the_checksum_is_that_of_all_other_bytes() -> None:
    frame = joined(made(Load), request=3)
    without = frame.copy()
    without[CHECK] = bytes(4)
    assert struct.unpack("<I", frame[CHECK]) == (crc32(without),)
    assert joined(made(Bare))[CHECK] == bytes(4)


@given(st.data())
def test_no_flipped_bit_passes(data: st.DataObject) -> None:
    frame = joined(made(Load))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        codec.decode(frame)


@given(st.data(), st.integers(1, 32))
def test_no_damage_in_a_row_of_32_bits_passes(data: st.DataObject, length: int) -> None:
    frame = joined(made(Load))
    whole = int.from_bytes(frame, "little")
    first = data.draw(st.integers(0, 8 * len(frame) - length))
    pattern = data.draw(st.integers(1, (1 << length) - 1))
    damaged = (whole ^ (pattern << first)).to_bytes(len(frame), "little")
    with pytest.raises(WireError):
        codec.decode(damaged)


def test_a_checksum_where_none_belongs_or_of_another_kind_is_refused() -> None:
    frame = joined(made(Bare))
    frame[CHECK] = b"\1\0\0\0"
    with pytest.raises(DecodeError, match="does not have"):
        codec.decode(frame)
    frame = joined(made(Load))
    frame[4:8] = struct.pack("<I", Bare.code)  # type: ignore[attr-defined]
    with pytest.raises(DecodeError, match="does not have"):
        codec.decode(frame)
    frame = joined(made(Bare))
    frame[4:8] = struct.pack("<I", Load.code)  # type: ignore[attr-defined]
    with pytest.raises(DecodeError, match="checksum 0x00000000 on 0x"):
        codec.decode(frame)


def test_a_message_without_tensors_is_checked_too() -> None:
    frame = joined(Twin(5))
    assert codec.decode(frame)[0] == Twin(5)
    frame[33] ^= 1
    with pytest.raises(DecodeError, match="checksum"):
        codec.decode(frame)
