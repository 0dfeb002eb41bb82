"""Connections under load and under attack: heartbeats, resuming, slow and flooding callers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from live_programs import Model, Note

from shoal.base.keyed import fold
from shoal.base.limits import DEFAULT, Limits
from shoal.engine.live import LiveSettings
from shoal.engine.live.transport import Transport
from shoal.wire import codec
from shoal.wire.frame import ANSWER_BYTES, Greeting, pack_answer
from shoal.wire.inflow import Inflow, Receiver
from shoal.wire.message import Message
from shoal.wire.mux import CHUNK_BYTES, Kind, Record
from shoal.wire.outflow import Lane, Outflow

pytestmark = pytest.mark.live
DIGEST = bytes(range(16))


class Owner:
    """Counts what transports say, on a loop of its own."""

    def __init__(self) -> None:
        self.ready: Any = deque()
        self.dirty: dict[Any, None] = {}
        self.got: list[tuple[int, Message, float]] = []
        self.dropped: dict[str, int] = {}
        self.reasons: list[str] = []
        self.trips: list[float] = []

    def arrived(
        self, target: int, source: int, message: Message, request: int, size_bytes: int
    ) -> None:
        self.got.append((source, message, time.perf_counter()))

    def lost(self, reason: str, messages: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + messages

    def closed(self, peer: int, why: str) -> None:
        self.reasons.append(why)

    def round_trip(self, seconds: float) -> None:
        self.trips.append(seconds)

    def settle(self) -> None:
        while self.dirty:
            self.dirty.popitem()[0].write()


class Pair:
    """Transports 0 and 1 in one loop; `relay` stands between 0 and 1 if it is given."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limits: Limits = DEFAULT, **more: Any
    ) -> None:
        self.owners = Owner(), Owner()
        settings = LiveSettings(**{"security": "none", **more})
        self.peers = [Transport(loop, n, self.owners[n], limits, settings) for n in (0, 1)]
        self.addresses = {n: peer.bind() for n, peer in enumerate(self.peers)}
        self.addresses[2] = ("127.0.0.1", 9)

    def open(self) -> None:
        for peer in self.peers:
            peer.open(self.addresses, DIGEST, {})
            peer.up()

    def send(self, message: Any) -> None:
        self.peers[0].send(1, codec.encode(message))
        self.owners[0].settle()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()


async def until(condition: Callable[[], Any], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.002)


def run(scenario: Any) -> None:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(scenario)


def tensor(chunks: float) -> torch.Tensor:
    return torch.arange(int(chunks * CHUNK_BYTES / 4), dtype=torch.int32)


@contextlib.contextmanager
def opened(**more: Any) -> Iterator[Pair]:
    pair = Pair(asyncio.get_running_loop(), **more)
    try:
        pair.open()
        yield pair
    finally:
        pair.close()


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("checksums", [False, True])
def test_large_and_small_frames_over_several_connections(connections: int, checksums: bool) -> None:
    async def scenario() -> None:
        with opened(connections=connections, checksums=checksums) as pair:
            for number in range(6):
                pair.send(Model(number, tensor(10.3)))
                pair.send(Note(f"{number}"))
            await until(lambda: len(pair.owners[1].got) == 12)
            models = [m for _, m, _ in pair.owners[1].got if isinstance(m, Model)]
            assert [m.round for m in models] == list(range(6))
            assert all(torch.equal(m.params, tensor(10.3)) for m in models)
            names = [m.name for _, m, _ in pair.owners[1].got if isinstance(m, Note)]
            assert names == [str(number) for number in range(6)]
            await until(lambda: not pair.peers[0].busy)
            assert len(pair.peers[1].incoming[0].lanes) == connections
            assert not pair.owners[0].dropped
            assert not pair.owners[1].dropped

    run(scenario())


def test_heartbeats_pass_what_is_large_and_small_messages_do_too() -> None:
    async def scenario() -> None:
        with opened(heartbeat_s=0.02, dead_after_s=10.0) as pair:
            pair.send(Model(0, tensor(400)))
            sent = time.perf_counter()
            pair.send(Note("quick"))
            await until(lambda: len(pair.owners[1].got) == 2)
            (_, first, at), (_, second, end) = pair.owners[1].got
            assert isinstance(first, Note)
            assert isinstance(second, Model)
            assert at - sent < (end - sent) / 2
            await until(lambda: pair.owners[0].trips)

    run(scenario())


def test_a_peer_that_falls_silent_is_lost() -> None:
    """It greets and reads nothing after that, as behind a cable that was pulled."""

    async def scenario() -> None:
        pair = Pair(asyncio.get_running_loop(), heartbeat_s=0.05, dead_after_s=0.3)
        with socket.create_server(("127.0.0.1", 0)) as server:
            pair.addresses[1] = server.getsockname()
            pair.open()
            try:
                pair.send(Note("hello"))
                connection = await asyncio.to_thread(lambda: server.accept()[0])
                await asyncio.to_thread(connection.recv, 40)
                receiver = Receiver(DEFAULT)
                receiver.join(Inflow(DEFAULT), 7)
                connection.sendall(pack_answer() + bytes(receiver.unsent))
                await until(lambda: any("lost peer 1" in why for why in pair.owners[0].reasons))
                connection.close()
            finally:
                pair.close()

    run(scenario())


class Relay(threading.Thread):
    """Passes bytes between a caller and a peer, and breaks connections after so many."""

    def __init__(self, target: Any, cuts: list[int]) -> None:
        super().__init__(daemon=True)
        self.target, self.cuts, self.passed = target, cuts, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = self.server.getsockname()

    def run(self) -> None:
        while True:
            try:
                caller = self.server.accept()[0]
            except OSError:
                return
            peer = socket.create_connection(self.target)
            back = threading.Thread(target=self._back, args=(peer, caller), daemon=True)
            back.start()
            left = self.cuts.pop(0) if self.cuts else 1 << 60
            with contextlib.suppress(OSError):
                while left > 0 and (data := caller.recv(min(left, 1 << 16))):
                    peer.sendall(data)
                    left -= len(data)
                    self.passed += len(data)
            for each in (caller, peer):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()

    def _back(self, peer: socket.socket, caller: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := peer.recv(1 << 16):
                caller.sendall(data)


def test_a_transfer_that_is_cut_twice_arrives_once_and_is_not_sent_anew() -> None:
    async def scenario() -> None:
        pair = Pair(asyncio.get_running_loop())
        relay = Relay(pair.addresses[1], [int(20.5 * CHUNK_BYTES), int(10.2 * CHUNK_BYTES)])
        relay.start()
        try:
            pair.addresses[1] = relay.address
            pair.open()
            pair.send(Model(0, tensor(40)))
            await until(lambda: pair.owners[1].got)
            assert torch.equal(pair.owners[1].got[0][1].params, tensor(40))  # type: ignore[attr-defined]
            # What was on the way when it was cut is sent again, and not the rest.
            assert relay.passed < 43 * CHUNK_BYTES
            await until(lambda: not pair.peers[0].busy)
            assert len(pair.owners[1].got) == 1
        finally:
            pair.close()
            relay.server.close()

    run(scenario())


def test_a_restarted_receiver_gets_nothing_of_the_transfer_before() -> None:
    async def scenario() -> None:
        with opened() as pair:
            pair.send(Model(0, tensor(400)))
            await until(lambda: 0 in pair.peers[1].incoming)
            pair.peers[1].down()
            pair.peers[1].up()
            await until(lambda: not pair.peers[0].busy)
            assert pair.owners[0].dropped == {"dead": 1}
            pair.peers[0].seen(1)
            pair.send(Note("again"))
            await until(lambda: pair.owners[1].got)
            assert [type(m) for _, m, _ in pair.owners[1].got] == [Note]

    run(scenario())


# Hostile callers.


def call(address: Any, source: int = 2) -> socket.socket:
    """A socket that has greeted as peer 2 and said hello."""
    connection = socket.create_connection(address)
    connection.sendall(Greeting(source, 1, DIGEST).pack())
    connection.sendall(Record(Kind.HELLO, part=1, total=9).pack())
    got = b""
    while len(got) < ANSWER_BYTES + 96:
        got += connection.recv(4096)
    return connection


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def test_who_begins_and_does_not_go_on_is_cut_off() -> None:
    """In the middle of a greeting, of a prefix, and between two chunks with heartbeats."""

    async def scenario() -> None:
        with opened(handshake_s=0.4, stall_s=0.4) as pair:
            with socket.create_connection(pair.addresses[1]) as greeting:
                greeting.send(b"ShHi")
                await until(lambda: closed(greeting), 3.0)
            with await asyncio.to_thread(call, pair.addresses[1]) as prefix:
                prefix.send(b"Sh")
                await until(lambda: closed(prefix), 3.0)
            chunks = await asyncio.to_thread(call, pair.addresses[1])
            total = 4 * CHUNK_BYTES
            head = codec.PREFIX.pack(b"Sh", codec.VERSION, 0, 1, 0, 0, 8, total - 40)
            record = Record(Kind.CHUNK, number=1, total=total).pack()
            chunks.sendall(record + head + bytes(CHUNK_BYTES - 32))
            for number in range(1, 4):
                chunks.send(Record(Kind.PING, number=number).pack())
                await asyncio.sleep(0.05)
            await until(lambda: closed(chunks), 3.0)
            chunks.close()
            assert pair.owners[1].dropped == {"greeting": 1, "too slow": 2}
            assert pair.peers[1].incoming == {} or not pair.peers[1].incoming[2].lanes

    run(scenario())


def test_callers_that_do_not_greet_are_bounded_per_address() -> None:
    async def scenario() -> None:
        with opened(address_callers=5) as pair:
            callers = [socket.create_connection(pair.addresses[1]) for _ in range(12)]
            await until(lambda: sum(map(closed, callers)) == 7, 3.0)
            assert len(pair.peers[1].strangers) == 5
            for each in callers:
                each.close()

    run(scenario())


def flood(address: Any, stop: threading.Event) -> None:
    """Small messages as fast as the peer takes them; what it answers is not read."""
    frames = b"".join(codec.encode(Note("flood"))) * 400
    with contextlib.suppress(OSError), contextlib.closing(call(address)) as connection:
        connection.settimeout(0.2)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection.sendall(frames)


def test_a_flood_leaves_the_others_their_turns() -> None:
    """However much the flooding caller sends, a turn of its connection is short."""

    async def scenario() -> None:
        with opened(limits=Limits(window_bytes=1 << 27)) as pair:
            stop = threading.Event()
            flooding = threading.Thread(target=flood, args=(pair.addresses[1], stop), daemon=True)
            flooding.start()
            owner = pair.owners[1]
            try:
                await until(lambda: len(owner.got) > 2000)
                for number in range(20):
                    came = len(owner.got)
                    pair.send(Note(f"{number}"))
                    await until(lambda c=came: any(not s for s, _, _ in owner.got[c:]), 5.0)
            finally:
                stop.set()
                flooding.join(5.0)
            assert not owner.dropped
            assert len(owner.got) > 4000

    run(scenario())


def genuine() -> bytes:
    """What a caller that is welcome says, from its hello on."""
    outflow = Outflow(DEFAULT)
    lane, receiver = Lane(outflow, 0, 1, 9), Receiver(DEFAULT)
    receiver.join(Inflow(DEFAULT), 7)
    lane.cutter.feed(memoryview(bytes(receiver.unsent)))
    lane.heard()
    for number in range(3):
        outflow.push(codec.encode(Model(number, tensor(0.001))))
        outflow.push(codec.encode(Note(f"{number}"), number))
    outflow.push(codec.encode(Model(5, tensor(0.3))))
    stream = b""
    while head := lane.head():
        data = b"".join(head)
        lane.advance(len(data))
        stream += data
    return Greeting(2, 1, DIGEST).pack() + stream


def mutated(stream: bytes, seed: int) -> bytes:
    data = bytearray(stream)
    for step in range(1 + fold(seed, "steps") % 4):
        reach = len(data) if fold(seed, "far", step) % 3 == 0 else min(len(data), 1200)
        if not reach:
            break
        at = fold(seed, "at", step) % reach
        what, value = fold(seed, "what", step) % 4, fold(seed, "value", step)
        if what == 0:
            data[at] ^= 1 << (value % 8)
        elif what == 1:
            data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
        elif what == 2:
            del data[at : at + value % 64]
        else:
            data[at:at] = data[value % reach : value % reach + 40]
    return bytes(data)


def memory_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def attack(address: Any, seeds: range) -> None:
    stream = genuine()
    for seed in seeds:
        with contextlib.suppress(OSError), socket.create_connection(address, 5.0) as connection:
            connection.settimeout(5.0)
            connection.sendall(mutated(stream, seed))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


def check_attack(count: int) -> None:
    """The peer under attack answers an honest one meanwhile, and takes no memory."""

    async def scenario() -> None:
        with opened() as pair:
            await asyncio.to_thread(attack, pair.addresses[1], range(count, count + 200))
            before = memory_bytes()
            attacker = asyncio.create_task(
                asyncio.to_thread(attack, pair.addresses[1], range(count))
            )
            rounds = 0
            while not attacker.done():
                pair.send(Note(f"honest {rounds}"))
                await until(
                    lambda n=f"honest {rounds}": any(
                        isinstance(m, Note) and m.name == n
                        for s, m, _ in pair.owners[1].got
                        if not s
                    ),
                    5.0,
                )
                pair.owners[1].got.clear()
                pair.owners[1].reasons.clear()
                rounds += 1
                await asyncio.sleep(0.05)
            await attacker
            assert rounds > 3
            assert pair.owners[1].dropped["malformed"] > count / 10
            assert memory_bytes() - before < 20 << 20

    run(scenario())


def test_mutated_streams_neither_stop_a_peer_nor_fill_its_memory() -> None:
    check_attack(600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_mutated_streams() -> None:
    check_attack(100_000)
