"""Connections that nobody uses are closed, with nothing lost, and descriptors are kept to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import resource
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from live_programs import Model, Note
from test_live_links import DIGEST, Owner, Pair, run, tensor, until

from shoal.base.errors import UsageError
from shoal.base.limits import DEFAULT
from shoal.engine.live import LiveSettings
from shoal.engine.live.attention import Attention
from shoal.engine.live.pool import LEAST, Pool, room
from shoal.engine.live.transport import Transport
from shoal.wire import codec

pytestmark = pytest.mark.live


class Crowd:
    """Transports in one loop that share a pool of so many descriptors."""

    def __init__(self, peers: int, most: int | None = None, **more: Any) -> None:
        loop = asyncio.get_running_loop()
        settings = LiveSettings(security="none", **more)
        self.pool = Pool(loop, settings, most)
        self.owners = [Owner() for _ in range(peers)]
        self.peers = [
            Transport(loop, n, owner, DEFAULT, settings, self.pool)
            for n, owner in enumerate(self.owners)
        ]
        addresses = {n: peer.bind() for n, peer in enumerate(self.peers)}
        for peer in self.peers:
            peer.open(addresses, DIGEST, {})
            peer.up()

    def send(self, source: int, target: int, message: Any) -> None:
        self.peers[source].send(target, codec.encode(message))
        self.owners[source].settle()

    @property
    def got(self) -> list[tuple[int, int, Any]]:
        return [
            (source, target, message)
            for target, owner in enumerate(self.owners)
            for source, message, _ in owner.got
        ]

    @property
    def connections(self) -> int:
        return sum(len(inlet.lanes) for peer in self.peers for inlet in peer.incoming.values())

    @property
    def lost(self) -> dict[str, int]:
        """But for greetings that did not come: calls were put off after they had been let in."""
        found: dict[str, int] = {}
        for owner in self.owners:
            for reason, count in owner.dropped.items():
                if reason != "greeting":
                    found[reason] = found.get(reason, 0) + count
        return found

    def nothing_was_lost(self) -> bool:
        said = [why for owner in self.owners for why in owner.reasons]
        return not self.lost and all("descriptors" in why for why in said)


@contextlib.contextmanager
def crowd(peers: int, most: int | None = None, **more: Any) -> Iterator[Crowd]:
    made = Crowd(peers, most, **more)
    try:
        yield made
    finally:
        for peer in made.peers:
            peer.close()
        assert made.pool.open == 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("connections", [1, 3])
def test_an_idle_connection_is_closed_and_opened_again_when_it_is_needed(connections: int) -> None:
    async def scenario() -> None:
        with crowd(2, idle_s=0.2, heartbeat_s=0.4, connections=connections) as both:
            before = descriptors()
            for number in range(3):
                both.send(0, 1, Note(f"{number}"))
                both.send(0, 1, Model(number, tensor(1.5)))
                await until(lambda n=number: len(both.got) == 2 * n + 2)
                await until(lambda: both.connections == connections)
                await until(lambda: both.pool.open == 0, 5.0)
                assert descriptors() == before
                assert not both.peers[0].busy
            assert both.nothing_was_lost()
            assert both.peers[0]._outgoing == {}

    run(scenario())


def test_a_connection_in_use_stays() -> None:
    """Also one that carries nothing but a frame larger than the time allows."""

    async def scenario() -> None:
        with crowd(2, idle_s=0.2, heartbeat_s=0.4) as both:
            both.send(0, 1, Note("0"))
            await until(lambda: both.got)
            life = both.peers[1].incoming[0].lanes[0]
            for number in range(1, 12):
                both.send(0, 1, Note(f"{number}"))
                await asyncio.sleep(0.05)
            assert both.peers[1].incoming[0].lanes[0] is life

    run(scenario())


def test_what_is_sent_at_any_moment_of_closing_arrives_once_and_in_order() -> None:
    """A frame is pushed after every step of the loop while connections close again and again."""

    async def scenario() -> None:
        with crowd(2, idle_s=60.0) as both:
            number = 0
            for pause in range(60):
                both.send(0, 1, Note(f"{number}"))
                number += 1
                await until(lambda n=number: len(both.got) == n)
                assert both.peers[0]._outgoing[1].retire()
                both.owners[0].settle()
                for _ in range(pause % 12):
                    await asyncio.sleep(0)
                kind = Model(number, tensor(1.2)) if pause % 3 == 0 else Note(f"{number}")
                both.send(0, 1, kind)
                number += 1
                await until(lambda n=number: len(both.got) == n)
                await until(lambda: not both.peers[0].busy)
            order = [
                message.round if isinstance(message, Model) else int(message.name)
                for _, _, message in both.got
            ]
            assert order == list(range(number))
            assert both.nothing_was_lost()

    run(scenario())


def test_a_process_short_of_descriptors_closes_what_was_used_least_recently() -> None:
    async def scenario() -> None:
        with crowd(8, most=24) as many:
            count, seen = 0, 0
            for turn in range(4):
                for source in range(8):
                    for target in range(8):
                        if source != target:
                            many.send(source, target, Note(f"{turn}"))
                            count += 1
                while len(many.got) < count:
                    await asyncio.sleep(0.001)
                    seen = max(seen, many.pool.open)
            assert 8 < seen <= 24
            assert many.pool.retired > 50
            said = [why for owner in many.owners for why in owner.reasons]
            assert len(said) == 1
            assert re.search(r"shares \d+ descriptors .*`ulimit -n`", said[0])
            assert many.lost == {}
            assert many.nothing_was_lost()
            # The pair that talks all the time keeps its connection.
            many.send(0, 1, Note("often"))
            await until(lambda: 0 in many.peers[1].incoming and many.peers[1].incoming[0].lanes)
            often = many.peers[1].incoming[0].lanes[0]
            for target in (3, 4, 5, 6, 7):
                for source in (1, 2):
                    many.send(0, 1, Note("often"))
                    came = len(many.owners[target].got)
                    many.send(source, target, Note("seldom"))
                    await until(lambda t=target, c=came: len(many.owners[t].got) > c)
            assert many.peers[1].incoming[0].lanes[0] is often

    run(scenario())


def test_the_system_may_run_out_of_descriptors_before_the_pool_does() -> None:
    """Connections that are there make room for those that are wanted; no message is lost."""
    earlier = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def scenario() -> None:
        with crowd(10) as many:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 20, earlier[1]))
            count = 0
            for source in range(10):
                for target in range(10):
                    if source != target:
                        many.send(source, target, Note("hello"))
                        count += 1
            await until(lambda: len(many.got) == count)
            assert many.nothing_was_lost()
            assert many.pool.most < 1000

    try:
        run(scenario())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, earlier)


def test_too_few_descriptors_are_refused_with_the_repair() -> None:
    earlier = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = descriptors() + 150
    assert room(10) > LEAST
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, earlier[1]))
    try:
        assert 90 <= room(20) <= 100
        with pytest.raises(UsageError, match=rf"{limit} descriptors.*ulimit -n \d+"):
            room(120)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, earlier)


def test_a_called_peer_may_ask_for_the_end() -> None:
    async def scenario() -> None:
        with crowd(2) as both:
            both.send(0, 1, Note("hello"))
            await until(lambda: both.got)
            # At first it sees that the connection was in use a moment ago.
            assert not both.peers[1].incoming[0].lanes[0].retire()
            assert both.peers[1].incoming[0].lanes[0].retire()
            await until(lambda: both.pool.open == 0)
            both.send(0, 1, Note("again"))
            await until(lambda: len(both.got) == 2)
            assert both.nothing_was_lost()

    run(scenario())


@pytest.mark.slow
def test_thousand_connections_leave_neither_descriptors_nor_memory() -> None:
    async def scenario() -> None:
        with crowd(3, handshake_s=0.3) as few:

            async def turn(number: int) -> None:
                for peer in (1, 2):
                    few.send(0, peer, Note(f"{number}"))
                await until(lambda: len(few.got) == 2)
                assert all(each.retire() for each in few.peers[0]._outgoing.values())
                few.owners[0].settle()
                await until(lambda: few.pool.open == 0)
                for owner in few.owners:
                    owner.got.clear()

            for number in range(50):
                await turn(number)
            gc.collect()
            before, open_before = tracemalloc.get_traced_memory()[0], descriptors()
            for number in range(500):
                await turn(number)
            assert descriptors() == open_before
            assert few.peers[0]._outgoing == {}
            await until(lambda: not any(peer.incoming or peer.strangers for peer in few.peers))
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < 60_000
            assert few.nothing_was_lost()

    tracemalloc.start()
    try:
        run(scenario())
    finally:
        tracemalloc.stop()


def test_a_peer_that_answers_is_not_lost_while_this_process_is_behind() -> None:
    """The loop stands still for longer than any silence allows; then it hears before it judges."""

    async def scenario() -> None:
        with crowd(2, heartbeat_s=0.05, dead_after_s=0.3, handshake_s=0.3, stall_s=0.3) as both:
            both.send(0, 1, Note("first"))
            await until(lambda: both.got)
            for _ in range(3):
                time.sleep(0.7)
                await asyncio.sleep(0.02)
            both.peers[0]._outgoing[1].fail("dead")
            both.peers[0].seen(1)
            both.send(0, 1, Note("second"))
            await asyncio.sleep(0)
            time.sleep(0.7)
            await until(lambda: len(both.got) == 2)
            assert both.nothing_was_lost()

    run(scenario())


def test_the_clock_of_time_outs_stands_still_while_the_loop_is_away() -> None:
    async def scenario() -> None:
        clock = Attention(asyncio.get_running_loop())
        clock.begin()
        began = time.monotonic()
        await until(lambda: clock.now_s > 0.3)
        assert time.monotonic() - began < 5.0
        before = clock.now_s
        time.sleep(1.0)
        await asyncio.sleep(0)
        assert clock.now_s - before <= 0.101
        await until(lambda: clock.lag_s > 0.5, 1.0)
        clock.stop()

    run(scenario())


def test_few_handshakes_are_under_way_at_once() -> None:
    async def scenario() -> None:
        with crowd(12, handshakes=3) as many:
            most = 0
            for target in range(1, 12):
                many.send(0, target, Note("hello"))
            while len(many.got) < 11:
                most = max(most, len(many.pool._opening))
                await asyncio.sleep(0)
            assert most == 3
            assert many.nothing_was_lost()

    run(scenario())


def test_silent_peers_do_not_keep_others_waiting() -> None:
    """They accept and say nothing; handshakes with those that answer go on beside them."""

    async def scenario() -> None:
        pair = Pair(asyncio.get_running_loop(), handshakes=2, handshake_s=10.0)
        import socket

        silent = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
        for number, server in enumerate(silent):
            pair.addresses[10 + number] = server.getsockname()
        pair.open()
        try:
            for number in range(6):
                pair.peers[0].send(10 + number, codec.encode(Note("nobody")))
            pair.send(Note("hello"))
            await until(lambda: pair.owners[1].got, 5.0)
        finally:
            pair.close()
            for server in silent:
                server.close()

    run(scenario())
