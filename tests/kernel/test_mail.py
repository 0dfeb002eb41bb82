"""Mailboxes, handlers and queues: matching, bounds, back-pressure, what the strict wire finds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_programs import LATE_S, Answer, Ask, Model, Note, event

from shoal.base.errors import (
    MessageTooLarge,
    MutatedAfterSend,
    PeerError,
    UndeclaredMessage,
    UsageError,
)
from shoal.base.ids import ANY
from shoal.base.limits import Limits
from shoal.engine.event.simulation import EventSettings
from shoal.kernel.mailbox import Mailbox
from shoal.wire import codec
from shoal.world.links import Links

STRICT = EventSettings(strict=True)


def arrive(mailbox: Mailbox, source: int, round: int, size: int = 1) -> None:
    mailbox.put(SimpleNamespace(message=Note(round), source=source, size_bytes=size))


taken = st.tuples(st.none() | st.integers(0, 2), st.none() | st.integers(0, 2))


@settings(max_examples=200)
@given(
    steps=st.lists(
        st.tuples(
            st.just("put"), st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 9))
        )
        | st.tuples(st.just("take"), taken)
        | st.tuples(st.just("close"), st.integers(0, 2))
        | st.tuples(st.just("discard"), st.integers(0, 2)),
        max_size=40,
    )
)
def test_a_mailbox_agrees_with_a_list_of_mail(steps: list[tuple[str, Any]]) -> None:
    """The oldest match is taken; each sender's bytes are bounded; closed tags stay closed."""
    limit = 20
    dropped: list[str] = []
    mailbox = Mailbox(Limits(mailbox_bytes=limit), dropped.append)
    kept: list[tuple[int, int, int]] = []
    closed: set[int] = set()
    floor, expected = 0, []
    for what, value in steps:
        if what == "put":
            source, round, size = value
            arrive(mailbox, source, round, size)
            if round in closed or round < floor:
                expected.append("closed")
            elif sum(s for p, _, s in kept if p == source) + size > limit:
                expected.append("mailbox")
            else:
                kept.append(value)
        elif what == "take":
            round, source = value
            found = mailbox.take(Note, ANY if round is None else (round,), source)
            match = [
                each for each in kept
                if (round is None or each[1] == round) and (source is None or each[0] == source)
            ]  # fmt: skip
            if not match:
                assert found is None
            else:
                kept.remove(match[0])
                assert (found.source, found.message.round, found.size_bytes) == match[0]
        else:
            gone = [e for e in kept if (e[1] == value if what == "close" else e[1] < value)]
            expected += ["closed"] * len(gone)
            kept = [each for each in kept if each not in gone]
            if what == "close":
                mailbox.close(Note, (value,))
                closed.add(value)
            else:
                mailbox.discard(Note, (value,))
                floor = max(floor, value)
    assert dropped == expected


def test_only_the_latest_closed_tags_are_remembered() -> None:
    dropped: list[str] = []
    mailbox = Mailbox(Limits(closed_tags=2), dropped.append)
    for round in range(3):
        mailbox.close(Note, (round,))
    for round in range(3):
        arrive(mailbox, 1, round)
    assert dropped == ["closed", "closed"]
    assert mailbox.take(Note, (0,), None) is not None


def test_mail_is_bounded_for_each_sender_and_reading_makes_room() -> None:
    size = codec.size_of(Note(0))
    got: list[Any] = []

    async def floods(peer: Any) -> None:
        for round in range(10):
            await peer.send(0, Note(round))
        await peer.sleep_until(2.0)
        await peer.send(0, Note(10))

    async def modest(peer: Any) -> None:
        await peer.sleep_until(0.5)
        await peer.send(0, Note(20))

    async def reads(peer: Any) -> None:
        await peer.sleep_until(1.0)
        while (envelope := await peer.recv(Note, deadline=3.0)) is not None:
            got.append(envelope.message.round)

    run = event(reads, floods, modest, limits=Limits(mailbox_bytes=3 * size))
    assert got == [0, 1, 2, 20, 10]
    assert run.dropped == {"mailbox": 7}


def test_a_gather_closes_its_tag() -> None:
    async def gathers(peer: Any) -> None:
        heard = await peer.gather(Note, tag=(0,), count=1, deadline=LATE_S)
        assert list(heard) == [1]
        await peer.sleep_until(3.0)
        assert await peer.recv(Note, tag=(0,), deadline=4.0) is None
        assert (await peer.recv(Note, tag=(1,), deadline=4.0)).source == 2

    async def early(peer: Any) -> None:
        await peer.send(0, Note(0))

    async def late(peer: Any) -> None:
        await peer.sleep_until(1.0)
        await peer.send(0, Note(0))
        await peer.send(0, Note(1))

    assert event(gathers, early, late).dropped == {"closed": 1}


def test_a_gather_takes_one_message_of_each_expected_sender() -> None:
    async def gathers(peer: Any) -> None:
        heard = await peer.gather(Model, tag=(0,), expect=(1, 3), deadline=LATE_S)
        assert {p: m.params.item() for p, m in heard.items()} == {1: 1.0, 3: 3.0}

    def sends(*moments: float) -> Any:
        async def run(peer: Any) -> None:
            for number, moment in enumerate(moments):
                await peer.sleep_until(moment)
                await peer.send(0, Model(0, torch.tensor(float(peer.id + 10 * number))))

        return run

    run = event(gathers, sends(0.1, 0.2), sends(0.1), sends(0.5))
    assert run.dropped == {"closed": 2}


def test_discard_drops_smaller_tags_now_and_later() -> None:
    async def reads(peer: Any) -> None:
        await peer.sleep_until(1.0)
        peer.discard(Note, before=(2,))
        await peer.sleep_until(3.0)
        rounds = []
        while (envelope := await peer.recv(Note, deadline=3.0)) is not None:
            rounds.append(envelope.message.round)
        assert rounds == [2, 5]

    async def sends(peer: Any) -> None:
        for round in (0, 2):
            await peer.send(0, Note(round))
        await peer.sleep_until(2.0)
        for round in (1, 5):
            await peer.send(0, Note(round))

    assert event(reads, sends).dropped == {"closed": 2}


def test_handlers_in_flight_are_bounded_and_the_refused_are_told() -> None:
    results: list[Any] = []

    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> Answer:
            await peer.sleep_until(1.0)
            return Answer(envelope.message.number)

        peer.serve(Ask, handle)
        await peer.sleep_until(3.0)

    async def asks(peer: Any) -> None:
        async def one(number: int) -> None:
            try:
                results.append((await peer.request(0, Ask(number), deadline=2.0)).number)
            except PeerError as error:
                results.append(str(error))

        async with peer.tasks() as group:
            for number in range(5):
                group.start(one(number))
        # Those in flight are done, so there is room again.
        results.append((await peer.request(0, Ask(9), deadline=2.0)).number)

    run = event(serves, asks, limits=Limits(in_flight=2))
    refusal = "peer 0: too many requests in flight"
    assert results == [refusal, refusal, refusal, 0, 1, 9]
    assert run.dropped == {"busy": 3}


def test_what_a_handler_raises_reaches_the_requester_only() -> None:
    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> Any:
            if envelope.message.number:
                raise KeyError("gone")
            return 17

        peer.serve(Ask, handle)
        await peer.sleep_until(1.0)

    async def asks(peer: Any) -> None:
        with pytest.raises(PeerError, match="peer 0: KeyError: 'gone'"):
            await peer.request(0, Ask(1), deadline=1.0)
        with pytest.raises(PeerError, match="answered int, no message"):
            await peer.request(0, Ask(0), deadline=1.0)

    assert event(serves, asks).finished


def test_a_handler_that_fails_on_a_plain_message_ends_the_run() -> None:
    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> None:
            raise KeyError("nobody else hears of it")

        peer.serve(Note, handle)
        await peer.sleep_until(1.0)

    async def sends(peer: Any) -> None:
        await peer.send(0, Note(0))

    with pytest.raises(KeyError, match="nobody else"):
        event(serves, sends)


def test_mail_that_came_before_serve_is_handled() -> None:
    handled: list[int] = []

    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> None:
            handled.append(envelope.message.round)

        await peer.sleep_until(1.0)
        peer.serve(Note, handle)
        await peer.sleep_until(2.0)

    async def sends(peer: Any) -> None:
        for round in range(3):
            await peer.send(0, Note(round))

    event(serves, sends)
    assert handled == [0, 1, 2]


def test_send_waits_while_more_than_the_queue_limit_is_unsent() -> None:
    size = codec.size_of(Note(0))
    rate = 10.0 * size
    ends: list[float] = []

    async def sends(peer: Any) -> None:
        for round in range(6):
            await peer.send(1, Note(round))
            ends.append(peer.now())

    async def reads(peer: Any) -> None:
        for _ in range(6):
            assert await peer.recv(Note, deadline=LATE_S) is not None

    event(
        sends, reads, links=Links(latency_s=0.0, uplink_bytes_per_s=rate),
        limits=Limits(queue_bytes=2 * size),
    )  # fmt: skip
    # Message k (from 1) ends at k / 10 s; two messages may be unsent.
    assert ends == pytest.approx([max(0.0, (k - 2) / 10) for k in range(1, 7)], abs=1e-6)


def test_flushed_returns_when_the_last_byte_has_arrived() -> None:
    size = codec.size_of(Note(0))
    ends: list[float] = []

    async def sends(peer: Any) -> None:
        await peer.flushed(1)
        ends.append(peer.now())
        await peer.send(1, Note(0))
        await peer.send(1, Note(1))
        await peer.flushed(1)
        ends.append(peer.now())
        await peer.flushed(1)
        ends.append(peer.now())

    async def reads(peer: Any) -> None:
        for _ in range(2):
            await peer.recv(Note, deadline=LATE_S)
        ends.append(peer.now())

    event(sends, reads, links=Links(latency_s=0.25, uplink_bytes_per_s=10.0 * size))
    assert ends == pytest.approx([0.0, 0.45, 0.45, 0.45], abs=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_flushed_on_plain_links_takes_one_latency_with_and_without_the_strict_wire(
    strict: bool,
) -> None:
    ends: list[float] = []

    async def sends(peer: Any) -> None:
        await peer.send(1, Model(0, torch.zeros(3)))
        await peer.flushed(1)
        ends.append(peer.now())

    async def reads(peer: Any) -> None:
        await peer.recv(Model, deadline=LATE_S)

    event(sends, reads, links=Links(latency_s=0.5), settings=EventSettings(strict=strict))
    assert ends == [0.5]


def writer(waits: bool) -> Any:
    async def run(peer: Any) -> None:
        params = torch.zeros(4)
        await peer.send(1, Model(0, params))
        if waits:
            await peer.flushed(1)
        params += 1.0
        await peer.sleep_until(2.0)

    return run


async def reader(peer: Any) -> None:
    envelope = await peer.recv(Model, deadline=LATE_S)
    assert envelope.message.params.tolist() == [0.0] * 4


def test_the_strict_wire_finds_a_tensor_written_after_send() -> None:
    links = Links(latency_s=0.5)
    with pytest.raises(MutatedAfterSend, match="Model from peer 0 changed") as caught:
        event(writer(waits=False), reader, links=links, settings=STRICT)
    assert "peer 0 at virtual time 0.5" in caught.value.__notes__[0]
    assert event(writer(waits=True), reader, links=links, settings=STRICT).finished


def test_on_the_strict_wire_the_receiver_owns_what_it_got() -> None:
    async def sends(peer: Any) -> None:
        params = torch.zeros(4)
        await peer.send(1, Model(0, params))
        await peer.sleep_until(2.0)
        assert params.tolist() == [0.0] * 4

    async def writes(peer: Any) -> None:
        (await peer.recv(Model, deadline=LATE_S)).message.params.add_(1.0)

    assert event(sends, writes, settings=STRICT).finished


class Heir(Note):
    """A subclass that was not declared: it would travel under its parent's name."""


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("thing", [{"round": 1}, "text", Heir(1)], ids=["dict", "str", "heir"])
def test_only_declared_messages_are_sent(thing: Any, strict: bool) -> None:
    async def sends(peer: Any) -> None:
        await peer.send(0, thing)

    with pytest.raises(UndeclaredMessage, match="declare the class with @message"):
        event(sends, settings=EventSettings(strict=strict))


def test_only_declared_kinds_are_waited_for_or_served() -> None:
    async def waits(peer: Any) -> None:
        with pytest.raises(UndeclaredMessage):
            await peer.recv(dict, deadline=1.0)
        with pytest.raises(UndeclaredMessage):
            await peer.recv(Heir, deadline=0.0)
        with pytest.raises(UndeclaredMessage):
            await peer.gather(Heir, tag=(1,), count=1, deadline=1.0)
        with pytest.raises(UndeclaredMessage):
            peer.serve(int, waits)

    assert event(waits).finished


def test_unknown_peers_and_frames_over_the_limit_are_refused() -> None:
    async def sends(peer: Any) -> None:
        with pytest.raises(UsageError, match=r"no peer 7; there are 0\.\.1"):
            await peer.send(7, Note(0))
        with pytest.raises(MessageTooLarge, match="limit 1000"):
            await peer.send(1, Model(0, torch.zeros(1000)))

    async def other(peer: Any) -> None:
        assert await peer.recv(Note, deadline=1.0) is None

    assert event(sends, other, limits=Limits(frame_bytes=1000)).messages_sent == 0
