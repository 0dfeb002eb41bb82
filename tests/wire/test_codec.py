"""Messages as bytes and back: every type, every shape, and what strangers may send instead."""

from __future__ import annotations

import resource
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from wire_messages import Everything, Inner, Plain, Segmented, everythings, messages, plains, same

from shoal.base.errors import (
    DecodeError,
    MessageTooLarge,
    UndeclaredMessage,
    UsageError,
    WireError,
)
from shoal.base.limits import Limits
from shoal.wire import codec
from shoal.wire.message import Packed, declared_kinds, kind_of, message


@message
class Anything:
    value: Any


@message
class Numbers:
    values: tuple[int, ...]


@message
class Table:
    values: dict[str, int]


@message
class Doubtful:
    value: int

    def __post_init__(self) -> None:
        if self.value < 0:
            raise KeyError(self.value)


def joined(what: Any, request: int = 0) -> bytes:
    return b"".join(codec.encode(what, request))


def framed(kind: type, header: bytes, body: bytes = b"") -> bytes:
    """A frame with a header of the caller's choice."""
    prefix = codec.PREFIX.pack(b"Sh", codec.VERSION, 0, kind.code, 0, 0, len(header), len(body))
    return prefix + header + bytes(-len(header) % 8) + body


@settings(max_examples=150, deadline=None)
@given(messages, st.integers(-(1 << 63), (1 << 63) - 1))
def test_round_trip_and_size(what: Any, request: int) -> None:
    frame = joined(what, request)
    assert codec.size_of(what) == len(frame)
    assert len(frame) % 8 == 0
    for data in (frame, bytearray(frame), memoryview(frame)):
        back, number = codec.decode(data)
        assert number == request
        assert same(what, back)


@settings(max_examples=60, deadline=None)
@given(everythings)
def test_received_tensors_are_aligned_and_own_their_memory(what: Everything) -> None:
    frame = bytearray(joined(what))
    back: Any = codec.decode(frame)[0]
    leaves = [back.inner.delta, *back.many, *back.named.values()]
    for leaf in leaves:
        assert leaf.numel() == 0 or leaf.data_ptr() % codec.ALIGNMENT == 0
        leaf.zero_()  # a receiver may write to what it received
    assert codec.size_of(back) == len(frame)


def test_alignment_keeps_dot_products_bit_equal() -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    for length in range(1, 9):
        what = Everything(
            Inner(0, "", torch.zeros(length)), (weight,), {}, (0, 0.0), Packed(b""), None,
            Plain(0, 0.0, False, "", b""),
        )  # fmt: skip
        for shift in range(0, 64, 8):
            memory = bytearray(shift) + joined(what)
            received = codec.decode(memoryview(memory)[shift:])[0].many[0]  # type: ignore[attr-defined]
            assert torch.equal(torch.dot(received, received), torch.dot(weight, weight))


@settings(max_examples=120, deadline=None)
@given(messages, st.data())
def test_damaged_frames_only_raise_wire_errors(what: Any, data: st.DataObject) -> None:
    frame = bytearray(joined(what))
    for _ in range(data.draw(st.integers(1, 4))):
        bit = data.draw(st.integers(0, 8 * len(frame) - 1))
        frame[bit // 8] ^= 1 << (bit % 8)
    try:
        back, _ = codec.decode(frame)
    except WireError:
        return
    # A flip inside of content is not seen here, but what comes out is still a proper message.
    assert codec.size_of(back) > 0


@settings(max_examples=80, deadline=None)
@given(messages, st.data())
def test_truncated_and_extended_frames_are_refused(what: Any, data: st.DataObject) -> None:
    frame = joined(what)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(DecodeError):
        codec.decode(frame[:cut])
    with pytest.raises(DecodeError):
        codec.decode(frame + b"\0" * data.draw(st.integers(1, 16)))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([Plain, Inner, Everything, Anything, Table]), st.binary(max_size=200),
       st.binary(max_size=64))  # fmt: skip
def test_random_headers_only_raise_wire_errors(kind: type, header: bytes, body: bytes) -> None:
    try:
        codec.decode(framed(kind, header, body))
    except WireError:
        return


HOSTILE = {
    "array of 4 billion": (Numbers, b"\x91\xdd\xff\xff\xff\xff"),
    "map of 4 billion": (Table, b"\x91\xdf\xff\xff\xff\xff"),
    "text of 4 GB": (Plain, b"\x95\x00\xca\0\0\0\0\xc2\xdb\xff\xff\xff\xff"),
    "extension of 4 GB": (Anything, b"\x91\xc9\xff\xff\xff\xff\x01"),
    "nested 100,000 deep": (Anything, b"\x91" * 100_000 + b"\xc0"),
    "map with a map for a key": (Anything, b"\x91\x81\x81\x01\x01\x01"),
    "extension of an unknown type": (Anything, b"\x91\xd4\x07\x00"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_claim_too_much(name: str) -> None:
    kind, header = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError):
        codec.decode(framed(kind, header))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def tensor_extension(index: int, length: int, dtype: int, *shape: int) -> bytes:
    data = struct.pack("<IQB", index, length, dtype) + struct.pack(f"<{len(shape)}Q", *shape)
    return b"\x91\xc7" + bytes((len(data), 1)) + data


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (tensor_extension(0, 8, 0, 2), b""),  # runs over the end
        (tensor_extension(1, 8, 0, 2), bytes(8)),  # segments out of order
        (tensor_extension(0, 8, 0, 3), bytes(8)),  # shape and length disagree
        (tensor_extension(0, 8, 99, 1), bytes(8)),  # no such type
        (tensor_extension(0, 0, 0, 0, 1 << 62, 1 << 62), b""),  # strides would overflow
        (tensor_extension(0, 0, 0, 0, 1 << 40, 1 << 40), b""),
        (tensor_extension(0, 0, 0, *(0,) * 9), b""),  # more axes than allowed
        (tensor_extension(0, 8, 9, 8), b"\1\0\1\0\2\0\1\0"),  # a truth value of 2
        (tensor_extension(0, 8, 0, 2), bytes(16)),  # left over
        (b"\x91\xc0", bytes(8)),
    ],
)
def test_segments_that_do_not_fit(header: bytes, body: bytes) -> None:
    with pytest.raises(DecodeError):
        codec.decode(framed(Anything, header, body))


def test_a_tensor_in_place_of_another_type_is_refused() -> None:
    frame = bytearray(joined(Anything(torch.ones(2))))
    frame[4:8] = struct.pack("<I", Plain.code)
    with pytest.raises(DecodeError):
        codec.decode(frame)
    with pytest.raises(DecodeError, match="Expected `int`"):
        codec.decode(joined(Numbers((torch.ones(1),))))  # type: ignore[arg-type]


def test_unknown_kinds_and_other_versions() -> None:
    frame = bytearray(joined(Plain(1, 2.0, True, "x", b"y")))
    assert kind_of(0xDEADBEEF) is None
    frame[4:8] = struct.pack("<I", 0xDEADBEEF)
    with pytest.raises(DecodeError, match="not declared here"):
        codec.decode(frame)
    frame[2] = 9
    with pytest.raises(DecodeError, match="version 9"):
        codec.decode(frame)
    frame[:2] = b"HT"
    with pytest.raises(DecodeError, match="no Shoal peer"):
        codec.decode(frame)


def test_limits_hold_before_memory_is_taken() -> None:
    frame = joined(Anything(torch.zeros(1000)))
    with pytest.raises(MessageTooLarge):
        codec.decode(frame, Limits(frame_bytes=2000))
    with pytest.raises(MessageTooLarge):
        codec.decode(joined(Anything(b"x" * 100)), Limits(header_bytes=50))
    huge = codec.PREFIX.pack(b"Sh", codec.VERSION, 0, Anything.code, 0, 0, 10, 1 << 60)
    with pytest.raises(MessageTooLarge):
        codec.read_prefix(huge)


def test_a_check_of_the_message_itself_counts_as_malformed() -> None:
    frame = bytearray(joined(Doubtful(5)))
    frame[codec.PREFIX.size + 1] = 0xFF  # msgpack's -1
    with pytest.raises(DecodeError, match="Doubtful: KeyError"):
        codec.decode(frame)


@pytest.mark.parametrize(
    "value",
    [
        object(), torch.eye(2).to_sparse(), torch.ones(2, device="meta"), 1 << 64, "\ud800",
        torch.zeros((1,) * 9), nn.Linear(1, 1),
    ],
    ids=["object", "sparse", "meta", "65 bits", "surrogate", "9 axes", "module"],
)  # fmt: skip
def test_what_cannot_be_sent(value: Any) -> None:
    with pytest.raises(UndeclaredMessage):
        codec.encode(Anything(value))
    with pytest.raises(UndeclaredMessage):
        codec.size_of(Anything(value))


def test_only_declared_messages_are_encoded() -> None:
    for value in (3, torch.ones(1), object()):
        with pytest.raises(UndeclaredMessage):
            codec.encode(value)  # type: ignore[arg-type]


def test_a_segment_that_lies_about_its_length() -> None:
    class Liar(Segmented):
        def byte_count(self) -> int:
            return 3

    with pytest.raises(UndeclaredMessage, match="announced 3 bytes and packed 2"):
        codec.encode(Anything(Packed(Liar(b"ab"))))


def test_views_that_only_look_like_other_numbers() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (number.conj(), number.conj().imag, number.real, nn.Parameter(torch.ones(3))):
        back: Any = codec.decode(joined(Anything(tensor)))[0]
        assert torch.equal(back.value, tensor.detach())
        assert not back.value.requires_grad


def test_tensor_segments_are_not_copied() -> None:
    tensor = torch.zeros(4096)
    buffers = codec.encode(Anything(tensor))
    tensor.fill_(1.0)
    assert torch.frombuffer(bytearray(b"".join(buffers))[-16:], dtype=torch.float32).eq(1.0).all()


@given(plains)
@settings(max_examples=30, deadline=None)
def test_a_receiver_may_change_what_it_got(what: Plain) -> None:
    shared = torch.zeros(8)
    frame = bytearray(joined(Anything((shared, what))))
    received: Tensor = codec.decode(frame)[0].value[0]  # type: ignore[attr-defined]
    received.fill_(7.0)
    assert shared.eq(0.0).all()


def test_declared_kinds_are_listed_by_name() -> None:
    names = [kind.kind for kind in declared_kinds()]
    assert names == sorted(names)
    assert Plain.kind in names


def test_a_tag_must_name_a_field() -> None:
    with pytest.raises(UsageError, match="tag names 'turn'"):

        @message(tag=("turn",))
        class Wrong:
            round: int
