"""Structured tasks: no orphans, failing children, cancellation, crashes and leaving."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_programs import LATE_S, Note, event, idle

from shoal.base.errors import Cancelled, Leaving, ProgramError
from shoal.base.limits import Limits
from shoal.wire import codec
from shoal.world.faults import Crash, Leave
from shoal.world.links import Links


async def sleeps(peer: Any, until_s: float, log: list[Any], name: str) -> str:
    try:
        await peer.sleep_until(until_s)
    except Cancelled:
        log.append((name, "cancelled", peer.now()))
        raise
    log.append((name, "done", peer.now()))
    return name


async def fails(peer: Any, at_s: float) -> None:
    await peer.sleep_until(at_s)
    raise ValueError("a child's own error")


def test_a_group_waits_for_all_of_its_children() -> None:
    log: list[Any] = []

    async def run(peer: Any) -> None:
        async with peer.tasks() as group:
            group.start(sleeps(peer, 2.0, log, "long"))
            first = group.start(sleeps(peer, 1.0, log, "short"))
            assert await first.join() == "short"
            assert peer.now() == 1.0
        assert peer.now() == 2.0
        assert first.done
        assert first.result() == "short"

    event(run)
    assert log == [("short", "done", 1.0), ("long", "done", 2.0)]


def test_a_failing_child_cancels_its_siblings_and_the_body() -> None:
    log: list[Any] = []

    async def run(peer: Any) -> None:
        async def group_of_three() -> None:
            async with peer.tasks() as group:
                group.start(sleeps(peer, 9.0, log, "sibling"))
                group.start(fails(peer, 1.0))
                await sleeps(peer, 8.0, log, "body")

        with pytest.raises(ValueError, match="own error"):
            await group_of_three()
        log.append(("after", peer.now(), len(peer.tasks_alive)))
        # The body's notice must not outlive the group.
        await peer.sleep_until(2.0)
        log.append(("later", peer.now()))

    event(run)
    assert sorted(log[:2]) == [("body", "cancelled", 1.0), ("sibling", "cancelled", 1.0)]
    assert log[2:] == [("after", 1.0, 1), ("later", 2.0)]


def test_an_isolated_child_fails_alone() -> None:
    log: list[Any] = []

    async def run(peer: Any) -> None:
        async with peer.tasks() as group:
            group.start(sleeps(peer, 3.0, log, "sibling"))
            alone = group.start(fails(peer, 1.0), isolate=True)
        assert alone.done
        with pytest.raises(ValueError, match="own error"):
            alone.result()

    event(run)
    assert log == [("sibling", "done", 3.0)]


def test_a_failing_body_cancels_the_children_and_waits_for_their_cleaning_up() -> None:
    log: list[Any] = []

    async def child(peer: Any) -> None:
        try:
            await peer.sleep_until(9.0)
        finally:
            await peer.sleep_until(2.0)
            log.append(("cleaned", peer.now()))

    async def run(peer: Any) -> None:
        async def failing_body() -> None:
            async with peer.tasks() as group:
                group.start(child(peer))
                await peer.sleep_until(1.0)
                raise KeyError("body")

        with pytest.raises(KeyError, match="body"):
            await failing_body()
        log.append(("after", peer.now(), len(peer.tasks_alive)))

    event(run)
    assert log == [("cleaned", 2.0), ("after", 2.0, 1)]


def test_a_cancelled_task_has_no_result_and_cancels_nobody_else() -> None:
    log: list[Any] = []

    async def run(peer: Any) -> None:
        async with peer.tasks() as group:
            handle = group.start(sleeps(peer, 9.0, log, "victim"))
            group.start(sleeps(peer, 2.0, log, "sibling"))
            await peer.sleep_until(1.0)
            handle.cancel()
            handle.cancel()
            assert await handle.join() is None
        assert peer.now() == 2.0

    event(run)
    assert log == [("victim", "cancelled", 1.0), ("sibling", "done", 2.0)]


def test_a_program_that_ends_leaves_no_handler_task_behind() -> None:
    closed: list[str] = []

    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> None:
            try:
                await peer.sleep_until(LATE_S)
            finally:
                closed.append("handler")

        peer.serve(Note, handle)
        await peer.sleep_until(1.0)

    async def sends(peer: Any) -> None:
        await peer.send(0, Note(0))

    run = event(serves, sends)
    assert closed == ["handler"]
    assert run.virtual_s == 1.0


def test_a_group_that_is_over_starts_nothing() -> None:
    async def run(peer: Any) -> None:
        async with peer.tasks() as group:
            pass
        with pytest.raises(ProgramError, match="outside"):
            group.start(peer.sleep_until(1.0))
        running = peer.tasks()
        async with running:
            handle = running.start(sleeps(peer, 1.0, [], "x"))
            with pytest.raises(ProgramError, match="still runs"):
                handle.result()

    event(run)


def test_awaiting_something_foreign_says_so() -> None:
    class Foreign:
        def __await__(self) -> Any:
            yield "something of another loop"

    async def run(peer: Any) -> None:
        await Foreign()

    with pytest.raises(ProgramError, match="awaited str, which is no effect"):
        event(run)


def test_errors_of_programs_carry_peer_time_and_seed() -> None:
    async def run(peer: Any) -> None:
        await peer.sleep_until(1.5)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as caught:
        event(idle, run, seed=4)
    assert caught.value.__notes__ == ["in the program of peer 1 at virtual time 1.500000 s, seed 4"]


def test_a_crash_closes_every_coroutine_and_a_restart_begins_anew() -> None:
    log: list[Any] = []

    async def run(peer: Any) -> None:
        log.append(("start", peer.now()))

        async def child() -> None:
            try:
                await peer.sleep_until(LATE_S if peer.now() < 1.0 else 3.0)
            finally:
                log.append(("child closed", peer.now()))

        try:
            async with peer.tasks() as group:
                group.start(child())
        finally:
            log.append(("body closed", peer.now()))

    event(run, faults=(Crash(who=(0,), at=1.0, until=2.0),))
    assert log == [
        ("start", 0.0),
        ("child closed", 1.0),
        ("body closed", 1.0),
        ("start", 2.0),
        ("child closed", 3.0),
        ("body closed", 3.0),
    ]


def test_what_a_closing_coroutine_still_asks_for_is_not_heard() -> None:
    heard: list[Any] = []
    reached: list[str] = []

    async def crashes(peer: Any) -> None:
        try:
            await peer.sleep_until(LATE_S)
        finally:
            await peer.send(1, Note(9))
            reached.append("behind the await")

    async def listens(peer: Any) -> None:
        heard.append(await peer.recv(Note, deadline=5.0))

    run = event(crashes, listens, faults=(Crash(who=(0,), at=1.0),))
    assert heard == [None]
    assert reached == []
    assert run.messages_sent == 0
    assert run.dropped == {"awaited in a crash": 1}


def test_messages_in_flight_from_and_to_a_crashed_peer_are_lost() -> None:
    heard: list[Any] = []

    async def crashes(peer: Any) -> None:
        if peer.now() == 0.0:
            await peer.send(1, Note(0))
        heard.append(("restarted", await peer.recv(Note, deadline=peer.now() + 1.0)))

    async def other(peer: Any) -> None:
        await peer.send(0, Note(1))
        heard.append(("other", await peer.recv(Note, deadline=3.0)))

    run = event(
        crashes, other, links=Links(latency_s=0.5), faults=(Crash(who=(0,), at=0.2, until=0.3),)
    )
    assert heard == [("restarted", None), ("other", None)]
    assert run.dropped == {"dead": 2}


@pytest.mark.parametrize(("grace_s", "said"), [(1.0, True), (0.2, False)])
def test_a_leaving_peer_may_await_for_its_grace(grace_s: float, said: bool) -> None:
    heard: list[Any] = []

    async def leaves(peer: Any) -> None:
        try:
            await peer.sleep_until(LATE_S)
        except Leaving:
            await peer.sleep_until(peer.now() + 0.5)
            await peer.send(1, Note(3))

    async def listens(peer: Any) -> None:
        envelope = await peer.recv(Note, deadline=5.0)
        heard.append(None if envelope is None else (envelope.tag, peer.now()))

    event(leaves, listens, faults=(Leave(who=(0,), at=1.0, grace_s=grace_s),))
    assert heard == ([((3,), 1.5)] if said else [None])


def test_a_failing_child_cancels_its_siblings_when_the_body_is_over() -> None:
    log: list[Any] = []

    async def run(peer: Any) -> None:
        async def group_of_two() -> None:
            async with peer.tasks() as group:
                group.start(sleeps(peer, 9.0, log, "sibling"))
                group.start(fails(peer, 1.0))

        with pytest.raises(ValueError, match="own error"):
            await group_of_two()
        log.append(("after", peer.now()))

    event(run)
    assert log == [("sibling", "cancelled", 1.0), ("after", 1.0)]


def test_a_notice_to_stop_does_not_outlive_its_group() -> None:
    """The body hears of the failure by `join`, and is out before the notice reaches it."""
    ends: list[float] = []

    async def run(peer: Any) -> None:
        async def joins() -> None:
            async with peer.tasks() as group:
                await group.start(fails(peer, 1.0)).join()

        with pytest.raises(ValueError, match="own error"):
            await joins()
        await peer.sleep_until(2.0)
        ends.append(peer.now())

    event(run)
    assert ends == [2.0]


def test_room_in_a_queue_does_not_wake_who_no_longer_waits_for_it() -> None:
    """A body is interrupted in `send`; the queue has room later, when it sleeps."""
    size = codec.size_of(Note(0))
    ends: list[float] = []

    async def run(peer: Any) -> None:
        async def sends() -> None:
            async with peer.tasks() as group:
                group.start(fails(peer, 1.0))
                for round in range(9):
                    await peer.send(1, Note(round))

        with pytest.raises(ValueError, match="own error"):
            await sends()
        ends.append(peer.now())
        await peer.sleep_until(50.0)
        ends.append(peer.now())

    event(
        run, idle, links=Links(latency_s=0.0, uplink_bytes_per_s=0.1 * size),
        limits=Limits(queue_bytes=size),
    )  # fmt: skip
    assert ends == [1.0, 50.0]
