"""Greetings, cutting a stream into frames, and the queue of what is unsent: no sockets here."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_messages import Inner, Plain, messages, same

from shoal.base.errors import DecodeError, MessageTooLarge, WireError
from shoal.base.limits import DEFAULT, Limits
from shoal.wire import codec
from shoal.wire.frame import (
    ANSWER_BYTES,
    GREETING_BYTES,
    FrameReader,
    Greeting,
    Outbox,
    agreement,
    pack_answer,
    schema,
    unpack_answer,
)
from shoal.wire.message import message


def feed(reader: FrameReader, stream: bytes, pieces: list[int], scratch_bytes: int) -> list[Any]:
    """What comes out when a stream arrives in pieces of these sizes."""
    scratch = memoryview(bytearray(scratch_bytes))
    found, at, turn = [], 0, 0
    while at < len(stream):
        space = reader.space(scratch)
        assert len(space) > 0
        size = min(len(space), len(stream) - at, pieces[turn % len(pieces)])
        space[:size] = stream[at : at + size]
        at, turn = at + size, turn + 1
        # Decoded at once, as the contract of small frames demands.
        found += [codec.decode(frame) for frame in reader.received(size, scratch)]
    return found


@settings(max_examples=120, deadline=None)
@given(
    st.lists(messages, min_size=1, max_size=6),
    st.lists(st.integers(1, 300), min_size=1, max_size=10),
    st.integers(33, 600),
)
def test_any_cut_of_the_stream_gives_the_same_messages(
    sent: list[Any], pieces: list[int], scratch_bytes: int
) -> None:
    stream = b"".join(b"".join(codec.encode(each, n)) for n, each in enumerate(sent))
    reader = FrameReader()
    found = feed(reader, stream, pieces, scratch_bytes)
    assert [request for _, request in found] == list(range(len(sent)))
    assert all(same(a, b) for a, (b, _) in zip(sent, found, strict=True))
    assert not reader.partial


@settings(max_examples=60, deadline=None)
@given(messages, st.integers(1, 64))
def test_a_cut_stream_is_noticed(sent: Any, missing: int) -> None:
    stream = b"".join(codec.encode(sent))
    reader = FrameReader()
    found = feed(reader, stream[: max(1, len(stream) - missing)], [17], 128)
    assert found == []
    assert reader.partial


@settings(max_examples=150, deadline=None)
@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_a_damaged_stream_only_raises_wire_errors(sent: list[Any], data: st.DataObject) -> None:
    stream = bytearray(b"".join(b"".join(codec.encode(each)) for each in sent))
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, 8 * len(stream) - 1))
        stream[bit // 8] ^= 1 << (bit % 8)
    pieces = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    try:
        feed(FrameReader(Limits(frame_bytes=1 << 20)), bytes(stream), pieces, 256)
    except WireError:
        return


def test_a_frame_received_in_place_is_aligned_and_not_copied() -> None:
    tensor = torch.arange(100_000, dtype=torch.float32)
    stream = b"".join(codec.encode(Inner(1, "x", tensor)))
    reader, scratch = FrameReader(), memoryview(bytearray(1024))
    scratch[:] = stream[:1024]
    assert list(reader.received(1024, scratch)) == []
    rest = reader.space(scratch)
    assert len(rest) == len(stream) - 1024  # all of the rest in one place
    rest[:] = stream[1024:]
    (frame,) = reader.received(len(rest), scratch)
    received: Any = codec.decode(frame)[0]
    assert torch.equal(received.delta, tensor)
    assert received.delta.data_ptr() % codec.ALIGNMENT == 0
    before = torch.frombuffer(frame, dtype=torch.uint8).data_ptr()
    assert before <= received.delta.data_ptr() < before + len(frame)


def test_a_claim_of_a_gigabyte_takes_no_gigabyte() -> None:
    prefix = codec.PREFIX.pack(b"Sh", 1, 0, Plain.code, 0, 8, 1, (1 << 30) - 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readers = []
    for _ in range(8):
        reader, scratch = FrameReader(DEFAULT), memoryview(bytearray(64))
        scratch[: len(prefix)] = prefix
        assert list(reader.received(len(prefix), scratch)) == []
        readers.append(reader)
    assert all(reader.partial for reader in readers)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_frames_over_the_limit_are_refused_at_their_prefix() -> None:
    stream = b"".join(codec.encode(Inner(1, "x", torch.zeros(1000))))
    with pytest.raises(MessageTooLarge):
        feed(FrameReader(Limits(frame_bytes=1000)), stream[:32], [32], 64)
    with pytest.raises(DecodeError, match="no Shoal peer"):
        feed(FrameReader(), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", [64], 64)


@given(
    st.integers(0, (1 << 63) - 1),
    st.integers(0, (1 << 63) - 1),
    st.binary(min_size=16, max_size=16),
)
def test_greetings_round_trip(source: int, target: int, digest: bytes) -> None:
    packed = Greeting(source, target, digest).pack()
    assert len(packed) == GREETING_BYTES
    assert Greeting.unpack(packed) == (source, target, digest)


@given(st.binary(max_size=80))
def test_random_greetings_and_answers_only_raise_decode_errors(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Greeting.unpack(data)
    with pytest.raises(DecodeError):
        unpack_answer(data)


def test_greetings_of_other_versions_and_lengths() -> None:
    packed = bytearray(Greeting(1, 2, bytes(16)).pack())
    packed[4] = 7
    with pytest.raises(DecodeError, match="version 7"):
        Greeting.unpack(packed)
    with pytest.raises(DecodeError, match="39 bytes"):
        Greeting.unpack(bytes(packed[:39]))


@given(st.text(max_size=100))
def test_answers(text: str) -> None:
    packed = pack_answer(text)
    assert len(packed) == ANSWER_BYTES
    answer = unpack_answer(packed)
    assert bool(answer) == bool(text)
    if len(text.encode()) <= 56 and "\0" not in text:
        assert answer == text


def test_agreement_depends_on_run_names_and_fields() -> None:
    schemas = {kind.kind: schema(kind) for kind in (Plain, Inner)}
    turned = dict(reversed(schemas.items()))
    assert agreement(b"run", schemas) == agreement(b"run", turned)
    assert len(agreement(b"run", schemas)) == 16
    assert agreement(b"run", schemas) != agreement(b"nur", schemas)
    assert agreement(b"run", schemas) != agreement(b"run", {Plain.kind: schemas[Plain.kind]})
    assert agreement(b"run", schemas) != agreement(b"run", {**schemas, Plain.kind: "other"})


def test_schema_tells_nested_messages_by_name() -> None:
    @message
    class Outer:
        inner: Inner
        count: int

    assert schema(Outer).endswith(f"Outer(inner: {Inner.kind}, count: <class 'int'>)")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=4), max_size=30),
    st.lists(st.integers(0, 60), min_size=1, max_size=20),
)
def test_outbox_writes_every_byte_once_and_in_order(
    frames: list[list[bytes]], steps: list[int]
) -> None:
    outbox, written, turn = Outbox(), b"", 0
    for frame in frames:
        frame.insert(0, b"prefix")
        outbox.push(frame)
    everything = b"".join(b"".join(frame) for frame in frames)
    assert outbox.waiting_bytes == len(everything)
    while outbox.waiting_bytes:
        offered = b"".join(outbox.head())
        size = min(len(offered), max(1, steps[turn % len(steps)]))
        written += offered[:size]
        outbox.advance(size)
        turn += 1
        assert outbox.accepted_bytes - outbox.gone_bytes == len(everything) - len(written)
    assert written == everything
    assert outbox.clear() == 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.data())
def test_outbox_counts_frames_that_were_not_sent_whole(
    sizes: list[int], data: st.DataObject
) -> None:
    outbox = Outbox()
    for size in sizes:
        outbox.push([bytes(size)])
    sent = data.draw(st.integers(0, sum(sizes)))
    outbox.advance(sent)
    whole = sum(sum(sizes[: n + 1]) <= sent for n in range(len(sizes)))
    assert outbox.clear() == len(sizes) - whole
    assert outbox.waiting_bytes == 0
    assert outbox.head() == []


def test_outbox_keeps_tensors_by_reference() -> None:
    outbox, tensor = Outbox(), torch.zeros(1 << 16)
    outbox.push(codec.encode(Inner(1, "x", tensor)))
    tensor.fill_(2.0)
    assert torch.frombuffer(outbox.head()[1], dtype=torch.float32).eq(2.0).all()
