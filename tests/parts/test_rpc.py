"""Remote calls: at most once under loss and restarts, deadlines, cancel, flow control, errors."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_programs import (
    SMALL,
    Calling,
    Heartbeats,
    counts,
    no_call_outlives_its_deadline,
    noise,
    nothing_runs_twice,
    what_is_answered_ran_and_is_right,
)

from shoal.base.errors import (
    Cancelled,
    DeadlineExceeded,
    DecodeError,
    MessageTooLarge,
    PeerError,
    ProgramError,
    UsageError,
)
from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Peer
from shoal.lab.explore import explore
from shoal.parts.overlay import _payload
from shoal.parts.overlay._call_errors import (
    AnswerUnreadable,
    CallCancelled,
    CallRefused,
    HandlerFailed,
    NoSuchMethod,
    OutcomeUnknown,
)
from shoal.parts.overlay._call_messages import DONE, Reply
from shoal.parts.overlay._payload import Parcel
from shoal.parts.overlay._served import Served
from shoal.parts.overlay.relay import Ask
from shoal.parts.overlay.rpc import Request, Rpc, RpcSettings
from shoal.testing.ladder import check_program
from shoal.wire.message import Packed
from shoal.world.faults import KINDS, Crash, Fault
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

NEAR = Links(latency_s=0.02)
INVARIANTS = (nothing_runs_twice, what_is_answered_ran_and_is_right, no_call_outlives_its_deadline)


@dataclass(frozen=True)
class Two:
    """Peer 0 calls, peer 1 serves what `serve` gives it."""

    serve: Callable[[Peer, Rpc], None]
    body: Callable[[Peer, Rpc], Awaitable[None]]
    end_s: float = 20.0
    settings: RpcSettings = SMALL
    stop_s: float | None = None

    async def run(self, peer: Peer) -> None:
        rpc = Rpc(peer, self.settings)
        async with peer.tasks() as group:
            rpc.start(group)
            if peer.id == 1:
                self.serve(peer, rpc)
                if self.stop_s is not None and peer.now() < self.stop_s:
                    await peer.sleep_until(self.stop_s)
                    rpc.stop()
                await peer.sleep_until(self.end_s)
            else:
                await self.body(peer, rpc)
            rpc.stop()


def run_two(
    serve: Callable[[Peer, Rpc], None], body: Callable[[Peer, Rpc], Awaitable[None]],
    links: Links = NEAR, faults: tuple[Fault, ...] = (), **more: Any,
) -> Run:  # fmt: skip
    program = Two(serve, body, **more)
    run = simulate(
        program, Network(2, links=links, faults=faults), settings=EventSettings(horizon_s=100.0)
    )
    assert run.finished
    return run


def values(run: Run, name: str) -> list[float]:
    return [row.value for row in run.series(name)]


def echo(peer: Peer, rpc: Rpc) -> None:
    async def handler(request: Request) -> Any:
        return request.payload

    rpc.serve("echo", handler)


async def read_all(rpc: Rpc, method: str) -> None:
    async with rpc.stream(1, method, deadline=5.0) as stream:
        while await stream.receive() is not None:
            pass


# Payloads.


@pytest.mark.parametrize("compression", ["", "zlib", "zstd"])
@pytest.mark.parametrize(
    "payload",
    [b"", b"x", noise(256, 1), noise(257, 1), noise(20_000, 1), b"a" * 20_000, Ask(7),
     torch.arange(5_000, dtype=torch.int64), torch.zeros(0), torch.randn(3, 4, 5)],
)  # fmt: skip
def test_what_is_sent_arrives(payload: Any, compression: str) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")

    async def body(peer: Peer, rpc: Rpc) -> None:
        said = await rpc.call(1, "echo", payload, deadline=10.0, compression=compression)
        same = torch.equal(said, payload) if isinstance(payload, torch.Tensor) else said == payload
        peer.record("same", float(same))

    program = Two(echo, body)
    run = simulate(program, Network(2, links=NEAR), settings=EventSettings(strict=True))
    assert values(run, "same") == [1.0]


@given(
    data=st.binary(max_size=3000), piece=st.integers(1, 700),
    compression=st.sampled_from(["", "zlib"]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_pieces_fit_together_again(data: bytes, piece: int, compression: str) -> None:
    parcel = _payload.pack(data, compression)
    pieces = list(parcel.pieces(piece))
    assert all(len(each) == piece for each in pieces[:-1])
    assert _payload.unpack(parcel.form, b"".join(pieces), 3000) == data


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_what_expands_beyond_the_limit_is_refused(compression: str) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")
    parcel = _payload.pack(bytes(1 << 20), compression)
    assert parcel.size_bytes < 5000
    with pytest.raises(MessageTooLarge, match="expanded"):
        _payload.unpack(parcel.form, parcel.whole(), 100_000)
    with pytest.raises(DecodeError):
        _payload.unpack(parcel.form, parcel.whole()[:-5], 1 << 20)
    with pytest.raises(DecodeError):
        _payload.unpack(f"bytes+{compression}", b"no such thing", 1 << 20)
    assert zlib.decompress(_payload.pack(b"abc", "zlib").whole()) == b"abc"


CUT = zlib.compress(b"x" * 900)[:-5]
ASK = _payload.pack(Ask(7)).whole()
BAD = {
    "form": Parcel("byTes", 3, (b"abc",)), "compression": Parcel("bytes+lzma", 3, (b"abc",)),
    "cut": Parcel("bytes+zlib", len(CUT), (CUT,)),
    "bomb": _payload.pack(bytes(20_000), "zlib"),
    "tensor": Parcel("tensor", 900, (noise(900, 2),)), "message": Parcel("message", 3, (b"abc",)),
    "other": Parcel("tensor", len(ASK), (ASK,)),
    "sizes": Parcel("bytes", 900, (bytes(950),)), "long": Parcel("bytes", 1 << 40, (bytes(900),)),
}  # fmt: skip


@pytest.mark.parametrize("how", list(BAD))
def test_an_answer_that_cannot_be_read_is_an_error_of_the_call(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a peer answers, its caller's program can go on with another one."""

    def serve(peer: Peer, rpc: Rpc) -> None:
        async def handler(request: Request) -> bytes:
            return b"good"

        async def items(request: Request) -> None:
            await request.send(b"good")
            await request.send(b"bad")

        rpc.serve("bad", handler)
        rpc.serve_stream("items", items)

    parcel = BAD[how]
    data = parcel.whole()

    async def answers(self: Any, result: Any) -> None:
        rpc, opening = self._rpc, self.open
        whole = len(data) <= SMALL.inline_bytes
        self.reply = Reply(
            rpc.life, opening.life, opening.call, DONE, form=parcel.form, size=parcel.size_bytes,
            whole=whole, body=Packed(data if whole else b""),
        )  # fmt: skip
        await rpc.peer.send(self.source, self.reply)
        if not whole:
            await self.sending.put(parcel)
            await self.sending.end()

    async def puts(self: Any, item: Any) -> None:
        await self.sending.put(_payload.pack(item) if item == b"good" else parcel)

    monkeypatch.setattr(Served, "_answer", answers)
    monkeypatch.setattr(Served, "put", puts)

    async def body(peer: Peer, rpc: Rpc) -> None:
        with pytest.raises(AnswerUnreadable, match=r"call 'bad' of peer 1: ") as unary:
            await rpc.call(1, "bad", deadline=5.0)
        with pytest.raises(AnswerUnreadable):
            await read_all(rpc, "items")
        assert isinstance(unary.value, PeerError)
        assert unary.value.kind in ("DecodeError", "MessageTooLarge")
        peer.record("done", 1.0)

    limits = RpcSettings(inline_bytes=256, piece_bytes=512, window_bytes=4096, payload_bytes=10_000)
    assert values(run_two(serve, body, settings=limits), "done") == [1.0]


# At most once.


@pytest.mark.parametrize("seed", range(4))
def test_calls_run_once_although_a_third_of_the_messages_is_lost(seed: int) -> None:
    links = Links(latency_s=0.03, latency_spread=0.5, loss=0.3, seed=seed)
    run = simulate(Calling(timeout_s=30.0), Network(4, links=links), seed=seed)
    assert [rule(run) for rule in INVARIANTS] == [None] * 3
    assert run.series("failed") == []
    assert len(run.series("right")) == 4 * 11
    assert set(counts(run).values()) == {1}


def test_who_restarts_between_two_attempts_says_that_nobody_knows() -> None:
    """The handler runs, its peer dies before it answers, and what comes back knows of nothing."""

    def serve(peer: Peer, rpc: Rpc) -> None:
        async def slow(request: Request) -> bytes:
            peer.record("ran", 1.0)
            await peer.sleep_until(peer.now() + 1.0)
            return b""

        rpc.serve("slow", slow)

    async def body(peer: Peer, rpc: Rpc) -> None:
        await rpc.call(1, "slow", deadline=5.0)
        with pytest.raises(OutcomeUnknown, match="restarted"):
            await rpc.call(1, "slow", deadline=15.0)
        peer.record("told_s", peer.now())
        # A new call knows the new life.
        await rpc.call(1, "slow", deadline=15.0)

    crash = Crash(who=(1,), at=1.6, until=2.5)
    run = run_two(serve, body, faults=(crash,))
    assert len(values(run, "ran")) == 3
    assert values(run, "told_s")[0] < 6.0


def test_a_call_that_the_other_life_cannot_have_run_is_sent_anew() -> None:
    """Only one message of it went out, and the new life refused that one."""

    async def body(peer: Peer, rpc: Rpc) -> None:
        assert await rpc.call(1, "echo", b"a", deadline=5.0) == b"a"
        await peer.sleep_until(4.0)
        assert await rpc.call(1, "echo", b"b", deadline=9.0) == b"b"
        peer.record("done_s", peer.now())

    run = run_two(echo, body, faults=(Crash(who=(1,), at=2.0, until=3.0),))
    # One round trip to be refused and one to be served.
    assert values(run, "done_s") == pytest.approx([4.08], abs=1e-6)


def test_random_faults_run_nothing_twice_and_hang_nothing() -> None:
    # No flipped bits: calls rely on links that deliver what was sent, as encrypted ones do.
    found = explore(
        lambda: Calling(), Network(4, links=Links(latency_s=0.03, loss=0.05)), seeds=40,
        horizon_s=200.0, invariants=INVARIANTS, kinds=[kind for kind in KINDS if kind != "corrupt"],
    )  # fmt: skip
    assert [failure.problem for failure in found.failures] == []
    assert found.traces > 30


# Deadlines and cancel.


def watched(peer: Peer, rpc: Rpc) -> None:
    """A handler that takes forever, and records when it is stopped."""

    async def forever(request: Request) -> bytes:
        try:
            await peer.sleep_until(90.0)
        except Cancelled:
            peer.record("stopped_s", peer.now())
            raise
        return b""

    async def tokens(request: Request) -> None:
        try:
            for number in range(1_000_000):
                await request.send(bytes([number % 256]) * 100)
        except Cancelled:
            peer.record("stopped_s", peer.now())
            raise

    rpc.serve("forever", forever)
    rpc.serve_stream("tokens", tokens)


def test_a_deadline_ends_the_call_on_both_sides() -> None:
    async def body(peer: Peer, rpc: Rpc) -> None:
        with pytest.raises(DeadlineExceeded, match="no word from there"):
            await rpc.call(1, "forever", deadline=0.001)
        began_s = peer.now()
        with pytest.raises(DeadlineExceeded, match="forever"):
            await rpc.call(1, "forever", deadline=began_s + 3.0)
        peer.record("raised_s", peer.now() - began_s)

    run = run_two(watched, body)
    assert values(run, "raised_s") == pytest.approx([3.0], abs=1e-6)
    # Within a moment of the caller's: its cancel or the deadline, whichever is first.
    assert values(run, "stopped_s") == pytest.approx([3.04], abs=0.03)


@pytest.mark.parametrize("method", ["forever", "tokens"])
def test_who_cancels_a_call_cancels_its_handler(method: str) -> None:
    async def one(peer: Peer, rpc: Rpc) -> None:
        if method == "forever":
            await rpc.call(1, method, deadline=60.0)
            return
        async with rpc.stream(1, method, deadline=60.0) as stream:
            while True:
                await stream.receive()

    async def body(peer: Peer, rpc: Rpc) -> None:
        async with peer.tasks() as group:
            call = group.start(one(peer, rpc))
            await peer.sleep_until(2.0)
            call.cancel()

    assert values(run_two(watched, body), "stopped_s") == pytest.approx([2.02], abs=1e-3)


def test_a_lost_cancel_is_made_good_by_the_next_call() -> None:
    async def body(peer: Peer, rpc: Rpc) -> None:
        echo(peer, rpc)
        for number in range(12):
            with pytest.raises(DeadlineExceeded):
                await rpc.call(1, "forever", deadline=peer.now() + 2.0)
            peer.record("called", number)

    links = Links(latency_s=0.02, loss=0.5, seed=3)
    run = run_two(watched, body, links=links, end_s=40.0)
    # Late by a message at most, never for good.
    assert len(values(run, "called")) == 12
    assert len(values(run, "stopped_s")) >= 4
    assert max(values(run, "stopped_s")) < 26.0


def test_who_stops_serving_tells_its_callers() -> None:
    async def body(peer: Peer, rpc: Rpc) -> None:
        with pytest.raises(CallCancelled, match="stopped serving"):
            await rpc.call(1, "forever", deadline=60.0)
        peer.record("told_s", peer.now())

    assert values(run_two(watched, body, stop_s=2.0), "told_s") == pytest.approx([2.02], abs=1e-3)


def test_leaving_a_stream_early_stops_its_handler() -> None:
    async def body(peer: Peer, rpc: Rpc) -> None:
        async with rpc.stream(1, "tokens", deadline=60.0) as stream:
            heard = [await stream.receive() for _ in range(5)]
        peer.record("right", float(heard == [bytes([n]) * 100 for n in range(5)]))
        peer.record("left_s", peer.now())

    run = run_two(watched, body)
    assert values(run, "right") == [1.0]
    assert values(run, "stopped_s") == pytest.approx([values(run, "left_s")[0] + 0.02], abs=1e-3)


# Flow control and priorities.


def test_a_slow_reader_holds_its_writer_up() -> None:
    """What the writer is ahead of the reader stays within the window."""
    lead: list[int] = []
    sent = read = 0

    def serve(peer: Peer, rpc: Rpc) -> None:
        async def produce(request: Request) -> None:
            nonlocal sent
            for _ in range(60):
                await request.send(bytes(500))
                sent += 1
                lead.append(sent - read)

        rpc.serve_stream("produce", produce)

    async def body(peer: Peer, rpc: Rpc) -> None:
        nonlocal read
        async with rpc.stream(1, "produce", deadline=60.0) as stream:
            async for _ in stream:
                read += 1
                await peer.sleep_until(peer.now() + 0.3)

    run_two(serve, body)
    assert (sent, read) == (60, 60)
    assert max(lead) <= 4096 // 564 + 1


@pytest.mark.parametrize(("rate", "window"), [(6.25e6, 1 << 20), (1.25e6, 1 << 18)])
def test_calls_wait_for_no_tensor(rate: float, window: int) -> None:
    """On one slow uplink a call waits for a window at most, not for the tensor."""
    tensor_bytes = 8 << 20
    links = Links(latency_s=0.03, uplink_bytes_per_s=rate, downlink_bytes_per_s=rate)
    rpc = RpcSettings(piece_bytes=1 << 15, window_bytes=window)
    run = simulate(Heartbeats(tensor_bytes, 1, rpc), Network(2, links=links))
    assert values(run, "right") == [1.0]
    beats = values(run, "beat_s")
    assert len(beats) >= 5
    assert max(beats) <= window / rate + 0.1
    assert max(beats) < 0.3 * tensor_bytes / rate
    # And the tensor has the line nearly to itself.
    assert values(run, "sent_s")[0] <= 1.2 * tensor_bytes / rate + 0.2


def test_a_tensor_comes_whole_over_a_bad_line() -> None:
    links = Links(latency_s=0.03, loss=0.1, seed=1)
    run = simulate(Heartbeats(1 << 18, 2, RpcSettings(inline_bytes=256, piece_bytes=1 << 13,
                   window_bytes=1 << 16)), Network(2, links=links))  # fmt: skip
    assert values(run, "right") == [1.0]
    assert values(run, "sent_s")[0] < 12.0


# Errors.


def test_errors_are_typed_and_say_what_to_do() -> None:
    def serve(peer: Peer, rpc: Rpc) -> None:
        async def fail(request: Request) -> bytes:
            raise KeyError("no such model")

        async def talk(request: Request) -> Any:
            return "text is no payload"

        async def break_off(request: Request) -> None:
            await request.send(b"one")
            raise ValueError("broke off")

        rpc.serve("fail", fail)
        rpc.serve("talk", talk)
        rpc.serve("large", lambda request: fail(request))
        rpc.serve_stream("break", break_off)

    async def body(peer: Peer, rpc: Rpc) -> None:
        with pytest.raises(HandlerFailed, match="no such model") as failed:
            await rpc.call(1, "fail", deadline=5.0)
        assert failed.value.kind == "KeyError"
        with pytest.raises(HandlerFailed, match="need bytes, a Tensor or a message"):
            await rpc.call(1, "talk", deadline=5.0)
        for method in ("none.such", "break"):
            with pytest.raises(NoSuchMethod, match="nobody serves it"):
                await rpc.call(1, method, deadline=5.0)
        with pytest.raises(NoSuchMethod):
            async with rpc.stream(1, "fail", deadline=5.0):
                pass
        with pytest.raises(HandlerFailed, match="broke off"):
            await read_all(rpc, "break")
        with pytest.raises(MessageTooLarge, match="limit 10000"):
            await rpc.call(1, "fail", bytes(10_001), deadline=5.0)
        with pytest.raises(UsageError, match="finite"):
            await rpc.call(1, "fail", deadline=float("inf"))
        with pytest.raises(UsageError, match="payload is a str"):
            await rpc.call(1, "fail", "text", deadline=5.0)
        with pytest.raises(UsageError, match="need one of"):
            await rpc.call(1, "fail", deadline=5.0, compression="lzma")
        with pytest.raises(ProgramError, match="async with"):
            await rpc.stream(1, "break", deadline=5.0).receive()
        peer.record("done", 1.0)

    limits = RpcSettings(inline_bytes=256, piece_bytes=512, window_bytes=4096, payload_bytes=10_000)
    assert values(run_two(serve, body, settings=limits), "done") == [1.0]


def test_a_payload_over_the_other_side_s_limit_is_not_sent() -> None:
    async def body(peer: Peer, rpc: Rpc) -> None:
        rpc.settings = RpcSettings()
        sent = 500_000
        with pytest.raises(MessageTooLarge, match="limit there 10000"):
            await rpc.call(1, "echo", noise(sent, 1), deadline=9.0)
        peer.record("done_s", peer.now())

    limits = RpcSettings(inline_bytes=256, piece_bytes=512, window_bytes=4096, payload_bytes=10_000)
    run = run_two(echo, body, settings=limits)
    assert values(run, "done_s")[0] < 0.5
    assert sum(run.bytes_sent) < 5_000


def test_a_payload_that_cannot_be_read_is_refused() -> None:
    async def body(peer: Peer, rpc: Rpc) -> None:
        good = _payload.pack(b"a" * 200, "zlib")
        bad = _payload.Parcel(good.form, good.size_bytes - 3, (good.whole()[:-3],))
        call = rpc._open(1, "echo", b"", 5.0, "", False)
        call._parcel = bad
        with pytest.raises(CallRefused, match="cut short"):
            async with call:
                await call.answer()
        peer.record("done", 1.0)

    assert values(run_two(echo, body), "done") == [1.0]


def test_more_calls_than_are_served_at_once_take_turns() -> None:
    def serve(peer: Peer, rpc: Rpc) -> None:
        running = 0

        async def slow(request: Request) -> bytes:
            nonlocal running
            running += 1
            peer.record("running", running)
            await peer.sleep_until(peer.now() + 0.2)
            running -= 1
            return request.payload

        rpc.serve("slow", slow)

    async def body(peer: Peer, rpc: Rpc) -> None:
        async def one(number: int) -> None:
            said = await rpc.call(1, "slow", bytes([number]), deadline=60.0)
            peer.record("right", float(said == bytes([number])))

        async with peer.tasks() as group:
            for number in range(20):
                group.start(one(number))

    limits = RpcSettings(inline_bytes=256, piece_bytes=512, window_bytes=4096, calls=4)
    run = run_two(serve, body, settings=limits, end_s=60.0)
    assert values(run, "right") == [1.0] * 20
    assert max(values(run, "running")) == 4
    assert len(values(run, "running")) == 20


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="four pieces"):
        RpcSettings(piece_bytes=1000, window_bytes=3000)
    with pytest.raises(UsageError, match="retry_s"):
        RpcSettings(retry_s=0.0)


def test_the_text_means_the_same_batched_or_not() -> None:
    check_program(Calling(calls=6), Network(3, links=Links(latency_s=0.02, loss=0.1)))
