"""Deadlines are absolute, and a wait that has ended wakes nobody."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_programs import LATE_S, Answer, Ask, Note, event, idle

from shoal.base.errors import DeadlineExceeded, LimitReached, Stalled, UsageError
from shoal.engine.event.simulation import EventSettings
from shoal.world.faults import Skew
from shoal.world.links import Links


def sender(*moments: float, tags: tuple[int, ...] | None = None) -> Any:
    """Sends a note to peer 0 at each of these moments."""

    async def run(peer: Any) -> None:
        for number, moment in enumerate(moments):
            await peer.sleep_until(moment)
            await peer.send(0, Note(tags[number] if tags else number))

    return run


def test_a_receive_in_a_loop_ends_at_its_absolute_deadline() -> None:
    ends: list[tuple[float, int]] = []

    async def listens(peer: Any) -> None:
        heard = 0
        while await peer.recv(Note, deadline=1.0) is not None:
            heard += 1
        ends.append((peer.now(), heard))

    event(listens, sender(0.3, 0.6, 0.9, 1.2))
    assert ends == [(1.0, 3)]


def test_a_gather_keeps_its_deadline_whatever_arrives() -> None:
    found: list[Any] = []

    async def gathers(peer: Any) -> None:
        heard = await peer.gather(Note, tag=(7,), expect=(1, 2, 3), deadline=1.0)
        found.append((peer.now(), list(heard)))

    event(gathers, sender(0.4, tags=(7,)), sender(0.9, tags=(7,)), sender(1.1, tags=(7,)))
    assert found == [(1.0, [1, 2])]


def test_a_gather_returns_when_all_or_enough_came_and_orders_by_sender() -> None:
    found: list[Any] = []

    async def gathers(peer: Any) -> None:
        every = await peer.gather(Note, tag=(0,), expect=(1, 2), deadline=LATE_S)
        found.append((peer.now(), list(every)))
        two = await peer.gather(Note, tag=(1,), count=1, deadline=LATE_S)
        found.append((peer.now(), list(two)))

    event(gathers, sender(0.8, 2.0, tags=(0, 1)), sender(0.2, 1.0, tags=(0, 1)))
    assert found == [(0.8, [1, 2]), (1.0, [2])]


def test_a_gather_without_any_end_is_refused() -> None:
    async def gathers(peer: Any) -> None:
        await peer.gather(Note, tag=(0,), deadline=float("inf"))

    with pytest.raises(UsageError, match="never end"):
        event(gathers)


def test_a_request_fails_at_its_absolute_deadline_and_its_late_answer_reaches_nobody() -> None:
    ends: list[Any] = []

    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> Answer:
            await peer.sleep_until((3.0, peer.now(), 4.0)[envelope.message.number])
            return Answer(envelope.message.number)

        peer.serve(Ask, handle)
        await peer.sleep_until(5.0)

    async def asks(peer: Any) -> None:
        await peer.sleep_until(0.5)
        with pytest.raises(DeadlineExceeded, match="Ask sent to peer 0"):
            await peer.request(0, Ask(0), deadline=2.0)
        ends.append(peer.now())
        with pytest.raises(DeadlineExceeded):
            await peer.request(0, Ask(0), deadline=1.0)
        ends.append(peer.now())
        # This request is open when the answer to the first one arrives.
        ends.append((await peer.request(0, Ask(2), deadline=5.0)).number)
        ends.append(peer.now())
        ends.append((await peer.request(0, Ask(1), deadline=5.0)).number)

    run = event(serves, asks)
    assert ends == [2.0, 2.0, 2, 4.0, 1]
    assert run.dropped == {"late answer": 1}


def test_the_timer_of_a_receive_that_was_served_does_not_end_a_later_sleep() -> None:
    ends: list[float] = []

    async def listens(peer: Any) -> None:
        assert await peer.recv(Note, deadline=1.0) is not None
        await peer.sleep_until(3.0)
        ends.append(peer.now())

    event(listens, sender(0.5))
    assert ends == [3.0]


def test_a_message_for_a_receive_that_timed_out_waits_in_the_mailbox() -> None:
    ends: list[float] = []

    async def listens(peer: Any) -> None:
        assert await peer.recv(Note, deadline=1.0) is None
        await peer.sleep_until(3.0)
        ends.append(peer.now())
        envelope = await peer.recv(Note, deadline=3.5)
        assert envelope is not None
        assert envelope.source == 1
        ends.append(peer.now())

    event(listens, sender(2.0))
    assert ends == [3.0, 3.0]


def test_a_cancelled_receive_swallows_no_message() -> None:
    got: list[Any] = []

    async def listens(peer: Any) -> None:
        async def waits() -> None:
            await peer.recv(Note, deadline=LATE_S)

        async with peer.tasks() as group:
            handle = group.start(waits())
            await peer.sleep_until(1.0)
            handle.cancel()
        got.append((await peer.recv(Note, deadline=5.0)).tag)
        got.append(peer.now())

    event(listens, sender(2.0))
    assert got == [(0,), 2.0]


moments = st.integers(1, 400)


@settings(max_examples=60)
@given(
    arrivals=st.lists(moments, max_size=8),
    waits=st.lists(st.tuples(st.sampled_from(["recv", "sleep"]), moments), max_size=10),
)
def test_any_sequence_of_waits_agrees_with_a_model_of_it(
    arrivals: list[int], waits: list[tuple[str, int]]
) -> None:
    """Arrivals lie between the whole milliseconds of the deadlines, so there are no ties."""
    arrivals = sorted(arrivals)
    seen: list[tuple[float, int | None]] = []

    async def listens(peer: Any) -> None:
        for kind, moment in waits:
            if kind == "sleep":
                await peer.sleep_until(moment / 1000)
                seen.append((peer.now(), None))
            else:
                envelope = await peer.recv(Note, deadline=moment / 1000)
                seen.append((peer.now(), None if envelope is None else envelope.message.round))

    event(listens, sender(*[(a + 0.5) / 1000 for a in arrivals]))
    now, box, expected = 0.0, list(enumerate(arrivals)), []
    for kind, moment in waits:
        end = max(now, moment / 1000)
        number = None
        if kind == "recv" and box and (box[0][1] + 0.5) / 1000 < end:
            number, arrival = box.pop(0)
            end = max(now, (arrival + 0.5) / 1000)
        now = end
        expected.append((pytest.approx(now), number))
    assert seen == expected


def test_a_skewed_clock_moves_deadlines_and_what_now_shows() -> None:
    seen: list[float] = []
    arrivals: list[float] = []

    async def skewed(peer: Any) -> None:
        seen.append(peer.now())
        await peer.sleep_until(7.2)
        await peer.send(1, Note(0))
        seen.append(peer.now())

    async def true(peer: Any) -> None:
        await peer.recv(Note, deadline=LATE_S)
        arrivals.append(peer.now())

    fault = Skew(who=(0,), at=0.0, offset_s=5.0, drift=0.1)
    event(skewed, true, faults=(fault,))
    assert seen == pytest.approx([5.0, 7.2])
    # 2.2 s on a clock that runs a tenth fast.
    assert arrivals == pytest.approx([2.0])


def test_a_skew_moves_timers_that_are_pending() -> None:
    ends: list[float] = []

    async def waits(peer: Any) -> None:
        assert await peer.recv(Note, deadline=3.0) is None
        await peer.send(1, Note(0))

    async def hears(peer: Any) -> None:
        await peer.recv(Note, deadline=LATE_S)
        ends.append(peer.now())

    event(waits, hears, faults=(Skew(who=(0,), at=1.0, offset_s=1.5),))
    assert ends == [1.5]


def test_a_wait_that_nothing_can_end_is_reported_with_the_peer() -> None:
    async def waits(peer: Any) -> None:
        await peer.recv(Note, deadline=float("inf"))

    with pytest.raises(Stalled, match=r"peers \[0\] wait at virtual time 2.000 s"):
        event(waits, sleeper)


async def sleeper(peer: Any) -> None:
    await peer.sleep_until(2.0)


def test_too_many_events_end_the_run() -> None:
    async def ticks(peer: Any) -> None:
        while True:
            await peer.sleep_until(peer.now() + 0.001)

    with pytest.raises(LimitReached, match="the limit is 500"):
        event(ticks, settings=EventSettings(events=500))


def test_a_loop_that_never_waits_is_found() -> None:
    async def spins(peer: Any) -> None:
        while await peer.recv(Note, deadline=0.0) is None:
            pass

    with pytest.raises(LimitReached, match="deadlines in the past"):
        event(spins, idle)


def test_the_horizon_ends_the_run_without_an_error() -> None:
    async def ticks(peer: Any) -> None:
        while True:
            await peer.sleep_until(peer.now() + 1.0)

    run = event(ticks, settings=EventSettings(horizon_s=10.5))
    assert not run.finished
    assert run.virtual_s == 10.5


def test_timers_of_ended_waits_do_not_pile_up() -> None:
    """300,000 deliveries, each with a deadline ten seconds away that it makes void."""
    peers, laps = 100, 3000
    sizes: list[int] = []

    async def passes(peer: Any) -> None:
        right = (peer.id + 1) % peers
        note = Note(0)
        for lap in range(laps):
            await peer.send(right, note)
            await peer.recv(Note, deadline=peer.now() + 10.0)
            if not lap % 100:
                sizes.append(len(peer.host.heap))

    run = event(*[passes] * peers, links=Links(latency_s=1e-4))
    assert run.messages_delivered == peers * laps
    # Every peer has one live wait at most, and one message on its way.
    assert max(sizes) <= 2 * peers + 1000 + peers
    assert run.virtual_s < 10.0
