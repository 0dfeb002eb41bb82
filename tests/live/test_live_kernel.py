"""What a program observes on real sockets: time, cancellation, errors, work in the thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from live_programs import LATE_S, Answer, Ask, Failing, Gossip, Model, Note
from torch import Tensor

from shoal.base.errors import (
    DeadlineExceeded,
    LimitReached,
    MessageTooLarge,
    PeerError,
    UndeclaredMessage,
    UsageError,
)
from shoal.base.limits import Limits
from shoal.engine.live import LiveSettings, run_live
from shoal.wire.message import Packed, message
from shoal.world.network import Network
from shoal.world.record import Row, Run

pytestmark = pytest.mark.live
SETTINGS = LiveSettings(horizon_s=50.0)


@message
class Sealed:
    content: Packed


@dataclass(frozen=True)
class By:
    """Another coroutine function for each peer."""

    runs: tuple[Callable[[Any], Awaitable[None]], ...]

    async def run(self, peer: Any) -> None:
        await self.runs[peer.id](peer)


def live(*runs: Callable[[Any], Awaitable[None]], **more: Any) -> Run:
    more.setdefault("settings", SETTINGS)
    return run_live(By(runs), Network(len(runs)), **more)


def values(run: Run, name: str) -> list[float]:
    return [row.value for row in run.series(name)]


_gate = threading.Event()
_entered = threading.Event()


def blocked(values: Tensor) -> Tensor:
    """Keeps the worker thread busy until somebody opens the gate."""
    _entered.set()
    assert _gate.wait(30.0)
    return values + 1.0


def failing(values: Tensor) -> Tensor:
    raise ArithmeticError(f"{values.numel()} values")


@pytest.fixture(autouse=True)
def _closed_gate() -> None:
    _gate.clear()
    _entered.clear()


async def idle(peer: Any) -> None:
    """A peer that is there and does nothing."""


def test_deadlines_are_kept_and_never_early() -> None:
    async def waits(peer: Any) -> None:
        for step in range(1, 6):
            deadline = 0.01 * step
            assert await peer.recv(Note, deadline=deadline) is None
            peer.record("late", peer.now() - deadline)
        await peer.sleep_until(0.08)
        peer.record("late", peer.now() - 0.08)
        assert await peer.gather(Note, tag=("x",), expect=(1,), deadline=0.09) == {}
        peer.record("late", peer.now() - 0.09)

    late = values(live(waits, idle), "late")
    assert len(late) == 7
    assert min(late) >= 0.0


def test_thousands_of_dropped_deadlines_do_not_pile_up() -> None:
    """Each request sets a deadline far away; what is left in the heap is bounded."""
    sizes: list[int] = []

    async def asks(peer: Any) -> None:
        for number in range(3000):
            await peer.request(1, Ask(number, torch.zeros(1)), deadline=LATE_S)
        sizes.append(len(peer.host.timers._heap))
        await peer.send(1, Note("done"))

    async def serves(peer: Any) -> None:
        async def echo(envelope: Any) -> Any:
            return Answer(envelope.message.number, envelope.message.values)

        peer.serve(Ask, echo)
        await peer.recv(Note, deadline=LATE_S)

    live(asks, serves)
    assert sizes[0] <= 2100


def test_errors_of_handlers_reach_the_requester_and_late_answers_nobody() -> None:
    async def serves(peer: Any) -> None:
        async def handle(envelope: Any) -> Any:
            number = envelope.message.number
            if number == 0:
                raise KeyError("gone")
            if number == 1:
                return None
            await peer.recv(Note, tag=("answer now",), deadline=LATE_S)
            return Answer(number, torch.zeros(1))

        peer.serve(Ask, handle)
        await peer.recv(Note, tag=("done",), deadline=LATE_S)

    async def asks(peer: Any) -> None:
        with pytest.raises(PeerError, match="KeyError: 'gone'"):
            await peer.request(0, Ask(0, torch.zeros(1)), deadline=LATE_S)
        with pytest.raises(PeerError, match="no message"):
            await peer.request(0, Ask(1, torch.zeros(1)), deadline=LATE_S)
        with pytest.raises(DeadlineExceeded):
            await peer.request(0, Ask(2, torch.zeros(1)), deadline=peer.now() + 0.05)
        await peer.send(0, Note("answer now"))
        # The late answer comes before this echo does, on the same connection.
        with pytest.raises(PeerError):
            await peer.request(0, Ask(0, torch.zeros(1)), deadline=LATE_S)
        await peer.send(0, Note("done"))

    run = live(serves, asks)
    assert run.dropped == {"late answer": 1}


def test_cancelled_tasks_and_failing_children() -> None:
    async def groups(peer: Any) -> None:
        async def waits() -> None:
            try:
                await peer.recv(Note, deadline=LATE_S)
            finally:
                peer.record("cleaned", 1.0)

        async def raises() -> None:
            await peer.sleep_until(peer.now() + 0.01)
            raise ValueError("child")

        async with peer.tasks() as group:
            handle = group.start(waits())
            await peer.sleep_until(peer.now() + 0.01)
            handle.cancel()

        async def together() -> None:
            async with peer.tasks() as group:
                group.start(waits())
                group.start(raises())

        with pytest.raises(ValueError, match="child"):
            await together()

    assert values(live(groups), "cleaned") == [1.0, 1.0]


def test_heartbeats_are_answered_during_a_long_computation() -> None:
    async def busy(peer: Any) -> None:
        async def echo(envelope: Any) -> Any:
            return Answer(envelope.message.number, envelope.message.values)

        peer.serve(Ask, echo)
        result = await peer.compute(blocked, torch.zeros(2))
        assert result.eq(1.0).all()
        peer.record("computed", 1.0)

    async def asks(peer: Any) -> None:
        while not _entered.is_set():
            await peer.sleep_until(peer.now() + 0.001)
        for number in range(50):
            await peer.request(0, Ask(number, torch.zeros(1)), deadline=LATE_S)
        peer.record("answered", 50.0)
        _gate.set()

    run = live(busy, asks)
    assert [row.name for row in run.rows] == ["answered", "computed"]


def test_cancelled_computations_are_discarded() -> None:
    ran: list[int] = []

    async def cancels(peer: Any) -> None:
        async def first() -> None:
            await peer.compute(blocked, torch.zeros(1))
            raise AssertionError("a result that was cancelled came back")

        async def second() -> None:
            await peer.compute(lambda x: ran.append(1) or x, torch.zeros(1))

        async with peer.tasks() as group:
            handles = [group.start(first()), group.start(second())]
            while not _entered.is_set():
                await peer.sleep_until(peer.now() + 0.001)
            for handle in handles:
                handle.cancel()
        _gate.set()
        # The thread serves calls in order: when this one is back, the others are over.
        assert (await peer.compute(torch.neg, torch.ones(1))).item() == -1.0
        peer.record("after", 1.0)

    assert values(live(cancels), "after") == [1.0]
    assert ran == []  # cancelled before its turn: it never ran


def test_errors_of_computations_arrive_at_their_await() -> None:
    async def computes(peer: Any) -> None:
        with pytest.raises(ArithmeticError, match="3 values"):
            await peer.compute(failing, torch.zeros(3))
        with pytest.raises(UsageError, match="batch='twice'"):
            await peer.compute(torch.neg, torch.zeros(3), batch="twice")
        with pytest.raises(UsageError, match="neither a tensor"):
            await peer.compute(torch.stack, [torch.zeros(3)])
        assert (await peer.compute(torch.sum, torch.ones(3), static=(0,))).item() == 3.0

    assert live(computes).finished


def test_messages_to_oneself_take_the_wire_too() -> None:
    async def talks(peer: Any) -> None:
        params = torch.ones(3)
        await peer.send(peer.id, Model(0, params))
        await peer.send(peer.id, Sealed(Packed(memoryview(b"abc"))))
        params.zero_()
        envelope = await peer.recv(Model, deadline=LATE_S)
        assert envelope.message.params.eq(1.0).all()
        sealed = await peer.recv(Sealed, deadline=LATE_S)
        assert bytes(sealed.message.content.pack()) == b"abc"
        assert sealed.source == peer.id

    assert live(talks).messages_delivered == 2


def test_flushed_buffers_may_be_written_again() -> None:
    async def sends(peer: Any) -> None:
        params = torch.zeros(1 << 20)
        for round in range(6):
            params.fill_(float(round))
            await peer.send(1, Model(round, params))
            await peer.flushed(1)

    async def receives(peer: Any) -> None:
        for round in range(6):
            envelope = await peer.recv(Model, tag=(round,), deadline=LATE_S)
            assert envelope.message.params.eq(float(round)).all()

    assert live(sends, receives).messages_delivered == 6


def test_what_cannot_be_sent_raises_at_the_sender() -> None:
    limits = Limits(frame_bytes=1 << 16, header_bytes=1 << 10)

    async def sends(peer: Any) -> None:
        with pytest.raises(UndeclaredMessage):
            await peer.send(1, "text")
        for stranger in (2, -1, "x"):
            with pytest.raises(UsageError, match="no peer"):
                await peer.send(stranger, Note("x"))
        with pytest.raises(MessageTooLarge, match="limit 65536"):
            await peer.send(1, Model(0, torch.zeros(1 << 15)))
        with pytest.raises(MessageTooLarge, match="outside of tensors"):
            await peer.send(1, Note("x" * 2000))
        await peer.send(1, Note("small"))

    async def receives(peer: Any) -> None:
        assert (await peer.recv(Note, deadline=LATE_S)).message.name == "small"

    run = live(sends, receives, limits=limits)
    assert run.messages_sent == 1


def test_sixteen_mebibytes_arrive_bit_for_bit() -> None:
    async def sends(peer: Any) -> None:
        big = torch.randn(1 << 22, generator=peer.generator("big"))
        await peer.send(1, Model(0, big))
        await peer.send(1, Model(1, big.view(2048, 2048).T))

    async def receives(peer: Any) -> None:
        first = (await peer.recv(Model, tag=(0,), deadline=LATE_S)).message.params
        second = (await peer.recv(Model, tag=(1,), deadline=LATE_S)).message.params
        peer.record("params", first)
        assert torch.equal(first.view(2048, 2048).T, second)

    run = live(sends, receives, seed=9)
    generator = run_live(By((_draw,)), Network(1), seed=9, settings=SETTINGS)
    assert torch.equal(run.final[1], generator.final[0])
    assert run.bytes_sent[0] == run.bytes_received[1] > 2 * (16 << 20)


async def _draw(peer: Any) -> None:
    peer.record("params", torch.randn(1 << 22, generator=peer.generator("big")))


def test_an_error_in_a_program_ends_the_run_with_its_peer_and_time() -> None:
    with pytest.raises(LookupError, match="no such thing") as caught:
        run_live(Failing(1), Network(3), seed=4, settings=SETTINGS)
    (note,) = caught.value.__notes__
    assert "peer 1" in note
    assert "seed 4" in note


def test_a_program_that_never_waits_is_stopped_by_the_kernel_or_the_horizon() -> None:
    async def spins(peer: Any) -> None:
        while True:
            await peer.recv(Note, deadline=peer.now() + 0.002)

    run = live(spins, settings=LiveSettings(horizon_s=0.1))
    assert not run.finished
    assert 0.1 <= run.virtual_s < 5.0


def test_a_program_that_holds_the_loop_is_reported() -> None:
    async def holds(peer: Any) -> None:
        _entered.set()
        _gate.wait(20.0)

    try:
        with pytest.raises((LimitReached, Exception), match="holds its loop"):
            live(holds, settings=LiveSettings(horizon_s=0.05, stop_s=0.2))
    finally:
        _gate.set()
    deadline = time.monotonic() + 10.0
    while any(t.name == "shoal live" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_the_observer_is_called_by_the_caller_and_in_order() -> None:
    class Watching:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []
            self.threads: set[str] = set()

        def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
            self.seen.append((peer, round))
            self.threads.add(threading.current_thread().name)

        def rows(self) -> list[Row]:
            return [Row("accuracy", 0.5, 0.0)]

    watching, ticks = Watching(), []
    run = run_live(
        Gossip(rounds=3), Network(3), settings=SETTINGS, observer=watching,
        progress=lambda time_s, events: ticks.append(events),
    )  # fmt: skip
    assert sorted(watching.seen) == [(peer, round) for peer in range(3) for round in range(3)]
    assert [r for p, r in watching.seen if p == 1] == [0, 1, 2]
    assert watching.threads == {threading.current_thread().name}
    assert run.series("accuracy")[0].value == 0.5
    assert ticks


def test_a_running_loop_of_the_caller_is_no_obstacle() -> None:
    async def notebook() -> Run:
        return run_live(Gossip(rounds=2), Network(3), settings=SETTINGS)

    assert asyncio.run(notebook()).finished


def test_nothing_is_left_behind() -> None:
    before = set(threading.enumerate())
    run_live(Gossip(rounds=2), Network(4), settings=SETTINGS)
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() >= 1


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="processes=4"):
        run_live(Gossip(), Network(3), processes=4)
    with pytest.raises(UsageError, match="horizon_s"):
        LiveSettings(horizon_s=0.0)
    with pytest.raises(UsageError, match="backoff_most_s"):
        LiveSettings(backoff_s=1.0, backoff_most_s=0.5)


def test_every_peer_may_have_another_program() -> None:
    async def sends(peer: Any) -> None:
        await peer.send(1, Note("hello"))

    async def receives(peer: Any) -> None:
        envelope = await peer.recv(Note, source=0, deadline=LATE_S)
        peer.record("got", float(envelope.message.name == "hello"))

    programs = {0: By((sends, sends)), 1: By((receives, receives))}
    run = run_live(lambda peer: programs[peer], Network(2), settings=SETTINGS)
    assert values(run, "got") == [1.0]
