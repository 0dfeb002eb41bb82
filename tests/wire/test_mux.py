"""Chunks, turns, credit and resumed transfers: both ends of a link in memory, without sockets."""

from __future__ import annotations

import resource
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_messages import Inner, Plain, messages, same

from shoal.base.errors import DecodeError, MessageTooLarge, WireError
from shoal.base.keyed import fold
from shoal.base.limits import DEFAULT, Limits
from shoal.wire import codec
from shoal.wire.inflow import Inflow, Receiver
from shoal.wire.message import message
from shoal.wire.mux import CHUNK_BYTES, SMALL_BYTES, Cutter, Kind, Record, chunks_of
from shoal.wire.outflow import Lane, Outflow


@message
class Left:
    number: int
    values: torch.Tensor


@message
class Right:
    number: int
    values: torch.Tensor


class Link:
    """Both ends of some connections; bytes move in pieces of any size."""

    def __init__(self, lanes: int = 1, limits: Limits = DEFAULT, checksums: bool = False) -> None:
        self.limits = limits
        self.count = lanes
        self.outflow = Outflow(limits, checksums)
        self.inflow = Inflow(limits)
        self.got: list[tuple[Any, int]] = []
        self.sent_bytes = 0
        self.scratch = memoryview(bytearray(1 << 12))
        self.lanes = {number: self.connect(number) for number in range(lanes)}

    def connect(self, number: int, life: int = 7) -> tuple[Lane, Receiver]:
        lane, receiver = Lane(self.outflow, number, self.count, 1), Receiver(self.limits)
        self._carry(lane, receiver, 1 << 30)
        assert receiver.hello is not None
        receiver.join(self.inflow, life)
        self.answer(lane, receiver)
        assert lane.ready
        return lane, receiver

    def send(self, sent: Any, request: int = 0) -> None:
        self.outflow.push(codec.encode(sent, request))

    def write(self, number: int, most: int) -> int:
        """One write of at most so many bytes; what came is decoded at once."""
        lane, receiver = self.lanes[number]
        count = self._carry(lane, receiver, most)
        self.sent_bytes += count
        self.answer(lane, receiver)
        return count

    def _carry(self, lane: Lane, receiver: Receiver, most: int) -> int:
        data = memoryview(b"".join(lane.head()))[:most]
        lane.advance(len(data))
        at = 0
        while at < len(data):
            spaces = receiver.cutter.space(self.scratch)
            count = 0
            for space in spaces:
                take = min(len(space), len(data) - at - count)
                space[:take] = data[at + count : at + count + take]
                count += take
            assert count
            at += count
            receiver.cutter.received(count, self.scratch)
            while (frame := receiver.next()) is not None:
                self.got.append(codec.decode(frame, self.limits))
        return len(data)

    def answer(self, lane: Lane, receiver: Receiver) -> None:
        lane.cutter.feed(memoryview(bytes(receiver.unsent)))
        receiver.unsent.clear()
        lane.heard()

    def reconnect(self, number: int, life: int = 7) -> None:
        lane, receiver = self.lanes[number]
        lane.drop()
        receiver.leave()
        self.outflow.broke()
        self.lanes[number] = self.connect(number, life)

    def run(self, most: int = 1 << 30) -> None:
        while sum(self.write(number, most) for number in self.lanes):
            pass


def vector(number: int, chunks: float) -> torch.Tensor:
    size = int(chunks * CHUNK_BYTES / 4)
    return (torch.arange(size, dtype=torch.int64) * (number + 3) % 251).float()


# Any order, any cut.


@settings(max_examples=120, deadline=None)
@given(
    st.lists(messages, min_size=1, max_size=6),
    st.lists(st.integers(1, 300), min_size=1, max_size=10),
)
def test_any_cut_of_the_stream_gives_the_same_messages(sent: list[Any], pieces: list[int]) -> None:
    link = Link()
    for number, each in enumerate(sent):
        link.send(each, number)
    turn = 0
    while link.write(0, pieces[turn % len(pieces)]):
        turn += 1
    assert [request for _, request in link.got] == list(range(len(sent)))
    assert all(same(a, b) for a, (b, _) in zip(sent, link.got, strict=True))
    assert not link.lanes[0][1].cutter.partial
    assert link.outflow.waiting_bytes == 0
    assert not link.outflow.busy


sizes = st.sampled_from((0.0, 0.0, 0.01, 0.24, 0.26, 1.0, 1.3, 2.0, 3.7))
schedules = st.tuples(
    st.lists(st.tuples(st.booleans(), sizes), min_size=1, max_size=12),
    st.integers(1, 3),
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from((40, 5000, 200_000, 1 << 30)),
            st.sampled_from((False, False, False, False, True)),
        ),
        max_size=40,
    ),
    st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(schedules)
def test_every_message_comes_once_and_kinds_keep_their_order(schedule: Any) -> None:
    """Over one to three connections that break at any byte, with small frames excepted from the
    promise only where a connection broke."""
    frames, lanes, steps, checksums = schedule
    link = Link(lanes, checksums=checksums)
    sent = defaultdict(list)
    for number, (left, chunks) in enumerate(frames):
        made = (Left if left else Right)(number, vector(number, chunks))
        sent[type(made)].append(number)
        link.send(made, number)
    for at, most, breaks in steps:
        if breaks:
            link.reconnect(at % lanes)
        link.write(at % lanes, most)
    link.run()
    got = defaultdict(list)
    for made, _ in link.got:
        got[type(made)].append(made.number)
        assert torch.equal(made.values, vector(made.number, frames[made.number][1]))
    assert got == sent
    assert link.inflow.partial == 0
    assert not link.outflow.busy
    assert link.outflow.waiting_bytes == 0


def test_a_small_frame_and_a_heartbeat_wait_for_one_batch_of_a_large_frame() -> None:
    link = Link()
    link.send(Left(0, vector(0, 64)))
    link.write(0, 1000)
    link.send(Right(1, torch.zeros(3)))
    link.lanes[0][0].ping(1)
    before = link.sent_bytes
    while not link.got:
        link.write(0, 1 << 16)
    assert type(link.got[0][0]) is Right
    assert link.lanes[0][0].pong == 1
    assert link.sent_bytes - before <= 2 * CHUNK_BYTES + SMALL_BYTES
    link.run()
    assert len(link.got) == 2


def test_large_frames_of_different_kinds_take_turns_and_small_ones_do_not_starve_them() -> None:
    link = Link()
    link.send(Left(0, vector(0, 8)))
    link.send(Right(1, vector(1, 8)))
    link.send(Right(2, vector(2, 1)))
    for number in range(3, 3000):
        link.send(Plain(number, 0.5, True, "x" * 1000, b""))
    link.run()
    larges = [at for at, (made, _) in enumerate(link.got) if not isinstance(made, Plain)]
    # Two chunks for every 128 small frames or fewer: none waits for all small ones.
    assert larges[1] - larges[0] < 300
    assert larges[2] < 2990
    assert [link.got[at][0].number for at in larges] == [0, 1, 2]


def test_a_frame_received_in_place_is_aligned_and_tensors_are_sent_by_reference() -> None:
    link = Link()
    tensor = vector(0, 2.5)
    link.send(Inner(1, "x", tensor))
    tensor.fill_(2.0)
    link.run()
    received: Any = link.got[0][0]
    assert received.delta.eq(2.0).all()
    assert received.delta.data_ptr() % codec.ALIGNMENT == 0


# Resuming.


def test_a_broken_transfer_goes_on_where_it_stopped() -> None:
    link = Link()
    link.send(Left(0, vector(0, 40)))
    while link.sent_bytes < 30.5 * CHUNK_BYTES:
        link.write(0, 100_000)
    link.reconnect(0)
    before = link.sent_bytes
    link.run()
    assert torch.equal(link.got[0][0].values, vector(0, 40))
    assert link.sent_bytes - before < 11.5 * CHUNK_BYTES


def test_a_receipt_that_was_lost_is_told_again() -> None:
    link = Link()
    link.send(Left(0, vector(0, 2)))
    lane, receiver = link.lanes[0]
    while not link.got:
        link._carry(lane, receiver, 1 << 30)
        receiver.unsent.clear()
    assert link.outflow.busy
    link.reconnect(0)
    assert not link.outflow.busy
    link.run()
    assert len(link.got) == 1


def test_another_life_gets_nothing_of_what_was_meant_for_the_one_before() -> None:
    link = Link()
    link.send(Left(0, vector(0, 4)))
    link.send(Right(1, torch.zeros(3)))
    link.write(0, 10)
    lane, receiver = link.lanes[0]
    lane.drop()
    receiver.leave()
    link.outflow.broke()
    link.inflow.clear()
    link.inflow = Inflow(DEFAULT)
    link.send(Left(2, vector(2, 2)))
    link.send(Right(3, torch.ones(3)))
    link.lanes[0] = link.connect(0, life=8)
    link.run()
    assert sorted(made.number for made, _ in link.got) == [2, 3]
    assert link.outflow.forgotten == 2
    assert link.outflow.waiting_bytes == 0


# Bounds.


def test_a_receiver_that_does_not_read_bounds_what_is_sent() -> None:
    limits = Limits(window_bytes=1 << 20)
    link = Link(limits=limits)
    link.send(Left(0, vector(0, 20)))
    lane, written = link.lanes[0][0], 0
    while head := lane.head():
        count = sum(map(len, head))
        lane.advance(count)
        written += count
    assert (1 << 20) - CHUNK_BYTES - 64 < written <= 1 << 20


def chunk(number: int, total: int, index: int = 0, back: int = 0) -> bytes:
    return Record(Kind.CHUNK, number=number, part=index, back=back, total=total).pack()


def prefix(body_bytes: int) -> bytes:
    """Of a frame with a header of 8 bytes."""
    return codec.PREFIX.pack(b"Sh", codec.VERSION, 0, 1, 0, 0, 8, body_bytes)


def take(limits: Limits, *records: bytes) -> Receiver:
    receiver = Receiver(limits)
    receiver.join(Inflow(limits), 7)
    for record in records:
        receiver.cutter.feed(memoryview(record))
        while receiver.next() is not None:
            pass
    return receiver


@pytest.mark.parametrize(
    ("records", "error", "text"),
    [
        ((chunk(1, 1 << 31),), MessageTooLarge, "limit"),
        ((chunk(1, 20),), DecodeError, "prefix"),
        ((chunk(0, 1 << 20),), DecodeError, "already"),
        ((chunk(1, 1 << 20, index=4),), DecodeError, "none"),
        ((Record(Kind.CREDIT).pack(),), DecodeError, "CREDIT"),
        ((Record(Kind.HAVE, total=8).pack(),), DecodeError, "HAVE"),
        ((b"Sm\x63" + bytes(29),), DecodeError, "kind 99"),
        ((b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",), DecodeError, "no Shoal peer"),
        ((chunk(1, 100) + bytes(100),), DecodeError, "no Shoal peer"),
        ((prefix(1 << 20),), MessageTooLarge, "in chunks"),
    ],
)
def test_what_no_caller_may_send_is_refused(records: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        take(DEFAULT, *records)


def test_frames_that_are_partly_here_are_bounded_in_number_and_bytes() -> None:
    payload = prefix((2 << 20) - 40) + bytes(CHUNK_BYTES - 32)
    few = Limits(open_frames=3)
    begun = [chunk(number, 2 << 20) + payload for number in range(1, 5)]
    assert take(few, *begun[:3])._flow.partial == 3  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(MessageTooLarge, match="open already"):
        take(few, *begun)
    with pytest.raises(MessageTooLarge, match="not whole"):
        take(Limits(partial_bytes=5 << 20), *begun)


def test_a_sender_keeps_to_the_bounds() -> None:
    limits = Limits(open_frames=2, partial_bytes=3 * CHUNK_BYTES)
    link = Link(2, limits=limits)
    for number in range(9):
        link.send((Left, Right)[number % 2](number, vector(number, 1.4)))
    for _ in range(3):
        for lane in (0, 1):
            link.write(lane, 300_000)
    link.run()
    assert len(link.got) == 9


def test_a_damaged_chunk_is_noticed_where_checksums_are_on() -> None:
    link = Link(checksums=True)
    link.send(Left(0, vector(0, 1.5)))
    data = bytearray(b"".join(link.lanes[0][0].head()))
    data[5000] ^= 1
    link.lanes[0][1].cutter.feed(memoryview(data))
    with pytest.raises(DecodeError, match="damaged"):
        link.lanes[0][1].next()


def test_a_claim_of_a_gigabyte_takes_no_gigabyte() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    receivers = [take(DEFAULT, chunk(1, 1 << 30)) for _ in range(8)]
    assert all(receiver.cutter.partial for receiver in receivers)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_asking_without_reading_is_refused() -> None:
    with pytest.raises(DecodeError, match="does not read"):
        take(DEFAULT, *[Record(Kind.PING, number=n).pack() for n in range(6000)])


def test_frames_before_the_greeting_are_refused() -> None:
    receiver = Receiver(DEFAULT)
    receiver.cutter.feed(memoryview(b"".join(codec.encode(Plain(1, 0.5, True, "x", b"")))))
    with pytest.raises(DecodeError, match="credit for 0"):
        receiver.next()


# Hostile streams.


def genuine() -> bytes:
    """What a caller says over some seconds: every kind of unit, with chunks of two frames."""
    outflow = Outflow(DEFAULT)
    lane, receiver = Lane(outflow, 0, 1, 1), Receiver(DEFAULT)
    receiver.join(Inflow(DEFAULT), 7)
    lane.cutter.feed(memoryview(bytes(receiver.unsent)))
    lane.heard()
    for number in range(6):
        outflow.push(codec.encode(Left(number, vector(number, 0.001))))
        outflow.push(codec.encode(Plain(number, 0.5, True, "text", b"bytes"), number))
    outflow.push(codec.encode(Left(9, vector(9, 1.01))))
    outflow.push(codec.encode(Right(10, vector(10, 0.3))))
    lane.ping(1)
    stream = b""
    while head := lane.head():
        data = b"".join(head)
        lane.advance(len(data))
        stream += data
    return stream


def mutated(stream: bytes, seed: int) -> bytes:
    """A few bits, bytes, lengths or places of the stream are changed; the same by every seed."""
    data = bytearray(stream)
    for step in range(1 + fold(seed, "steps") % 4):
        if not data:
            break
        # Heads are at the front of the stream, and worth more attempts than the middle of tensors.
        reach = len(data) if fold(seed, "far", step) % 3 == 0 else min(len(data), 1500)
        at = fold(seed, "at", step) % reach
        what = fold(seed, "what", step) % 5
        value = fold(seed, "value", step)
        if what == 0:
            data[at] ^= 1 << (value % 8)
        elif what == 1:
            data[at] = value % 256
        elif what == 2:
            data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
        elif what == 3:
            del data[at : at + value % 64]
        else:
            data[at:at] = data[value % reach : value % reach + 40]
    return bytes(data)


def test_streams_that_were_tampered_with_only_raise_wire_errors() -> None:
    stream = genuine()
    refused = 0
    for seed in range(300):
        try:
            take(DEFAULT, mutated(stream, seed))
        except WireError:
            refused += 1
    assert refused > 100


def test_a_called_peer_that_lies_is_refused() -> None:
    words = [
        Record(Kind.HELLO, total=7).pack(), Record(Kind.CREDIT, total=1 << 26).pack(),
        Record(Kind.HAVE, number=1, total=4).pack() + bytes((1, 0, 1, 0)),
        Record(Kind.READY).pack(), Record(Kind.DONE, number=1).pack(),
        Record(Kind.PONG, number=1).pack(),
    ]  # fmt: skip
    refused = 0
    for seed in range(600):
        outflow = Outflow(DEFAULT)
        outflow.push(codec.encode(Left(0, vector(0, 3))))
        lane = Lane(outflow, 0, 1, 1)
        try:
            for at, word in enumerate(words):
                lane.cutter.feed(memoryview(mutated(word, seed) if seed % 6 == at else word))
                lane.heard()
                lane.head()
        except WireError:
            refused += 1
    assert refused > 200


def test_a_cut_stream_is_noticed() -> None:
    for missing in (1, 31, 33, 5000):
        stream = genuine()
        receiver = take(DEFAULT, stream[: len(stream) - missing])
        assert receiver.cutter.partial or receiver._flow.partial  # pyright: ignore[reportOptionalMemberAccess]


@given(st.integers(1, 1 << 40))
def test_chunks_cover_a_frame(total: int) -> None:
    count = chunks_of(total)
    assert (count - 1) * CHUNK_BYTES < total <= count * CHUNK_BYTES


def test_a_cutter_borrows_until_it_holds() -> None:
    class Nobody:
        ripe = ()

        def place(self, record: Record) -> memoryview:
            raise AssertionError

        def take(self, record: Record, payload: memoryview) -> None:
            raise AssertionError

        def pop(self) -> memoryview:
            raise AssertionError

    cutter = Cutter(DEFAULT, Nobody())
    data = bytearray(b"".join(codec.encode(Plain(3, 0.5, True, "x", b""))) * 2)
    cutter.feed(memoryview(data))
    assert cutter.next() is not None
    assert cutter.fed
    cutter.hold()
    data[:] = bytes(len(data))
    frame = cutter.next()
    assert frame is not None
    decoded: Any = codec.decode(frame)[0]
    assert decoded.count == 3


def test_a_large_frame_does_not_overtake_many_small_ones_of_its_kind() -> None:
    for lanes in (1, 2):
        link = Link(lanes)
        for number in range(400):
            link.send(Left(number, torch.zeros(1)))
        link.send(Left(400, vector(400, 0.3)))
        for lane in reversed(range(lanes)):
            link.write(lane, 1 << 30)
        link.run()
        assert [made.number for made, _ in link.got] == list(range(401))


def test_what_is_pushed_after_the_last_word_waits_for_another_connection() -> None:
    link = Link()
    link.send(Left(0, vector(0, 1.4)))
    link.run()
    lane, receiver = link.lanes[0]
    assert not link.outflow.busy
    receiver.leave_please()
    link.answer(lane, receiver)
    assert lane.unwanted
    lane.bye()
    for number in (1, 2):
        link.send(Right(number, vector(number, 0.7 * number)))
    link.run()
    assert receiver.bye
    assert len(link.got) == 1
    link.reconnect(0)
    link.run()
    assert [each.number for each, _ in link.got] == [0, 1, 2]


def test_nothing_comes_after_the_last_word() -> None:
    bye, frame = Record(Kind.BYE).pack(), codec.encode(Plain(1, 0.5, True, "", b""))
    assert take(DEFAULT, bye).bye
    for more in (bye, Record(Kind.PING).pack(), b"".join(frame)):
        with pytest.raises(DecodeError, match="after BYE"):
            take(DEFAULT, bye + more)
