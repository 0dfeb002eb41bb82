"""Whose turn it is: floods wait in line, and whoever sends little waits for one of their turns."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import select
import socket
import termios
from array import array
from collections.abc import Callable
from itertools import groupby
from time import perf_counter, sleep

import pytest
from live_programs import Note
from test_live_links import Pair, call, run, until

from shoal.engine.live import incoming
from shoal.engine.live.turns import Turns
from shoal.wire import codec

pytestmark = pytest.mark.live


class Flood:
    """Has something to be read at every turn."""

    def __init__(self, name: str, turns: Turns, log: list[str], then: Callable[[], None]) -> None:
        self.name, self.turns, self.log, self.then = name, turns, log, then

    def go_on(self) -> None:
        self.log.append(self.name)
        if len(self.log) < 40:
            self.turns.join(self)
        self.then()


def test_news_comes_before_the_next_in_line_and_the_line_goes_round() -> None:
    async def scenario() -> None:
        loop, log = asyncio.get_running_loop(), []
        here, there = socket.socketpair()
        with here, there:
            there.setblocking(False)
            loop.add_reader(there, lambda: log.append(there.recv(1).decode()))
            turns = Turns(loop)
            for name in "abc":
                turns.join(Flood(name, turns, log, lambda: here.send(b".") and None))
            await until(lambda: len(log) >= 40)
            loop.remove_reader(there)
            turns.stop()
        # What came during a turn of a flood is heard before anybody else's next turn.
        assert "".join(log[:36]) == "a.b.c." * 6

    run(scenario())


class SlowClock:
    """Every look at it takes a tenth of a turn: a turn is eleven messages, on any machine."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += incoming._TURN_S / 10
        return self.now_s


def waiting(lane: incoming.Incoming) -> int:
    """Bytes that the system holds for a connection, and nobody has read."""
    count = array("i", [0])
    assert lane._socket is not None
    fcntl.ioctl(lane._socket, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("floods", [1, 5])
def test_a_small_message_waits_for_one_turn_of_however_many_floods(
    monkeypatch: pytest.MonkeyPatch, floods: int
) -> None:
    """Turns are counted in messages: no time is measured."""
    monkeypatch.setattr(incoming, "perf_counter", SlowClock())
    frames = b"".join(codec.encode(Note("flood"))) * 500

    async def scenario() -> None:
        pair = Pair(asyncio.get_running_loop())
        sources = range(2, 2 + floods)
        for source in (*sources, 9):
            pair.addresses[source] = ("127.0.0.1", 9)
        pair.open()
        address, waited = pair.addresses[1], []
        callers = [await asyncio.to_thread(call, address, source) for source in sources]
        honest = await asyncio.to_thread(call, address, 9)

        sent = dict.fromkeys(callers, 0)

        def fill() -> None:
            for caller in callers:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent[caller] += caller.send(frames[sent[caller] % len(frames) :])

        def fill_for_certain() -> None:
            """Nobody is read empty in the next turns: who is has a turn at once, as news has."""
            end_s = perf_counter() + 5.0
            fill()
            while min(waiting(pair.peers[1].incoming[s].lanes[0]) for s in sources) < 8192:
                assert perf_counter() < end_s, "the system does not deliver"
                sleep(0.001)
                fill()

        try:
            for caller in callers:
                caller.setblocking(False)
            fill()
            got = pair.owners[1].got
            await until(lambda: {s for s, _, _ in got} == set(sources))
            for number in range(8):
                before = len(got)
                fill_for_certain()
                honest.sendall(b"".join(codec.encode(Note(f"{number}"))))
                # The system may take its time; the loop stands still until it is there.
                there = pair.peers[1].incoming[9].lanes[0]._socket
                assert select.select([there], [], [], 5.0)[0]
                await until(lambda n=before: any(s == 9 for s, _, _ in got[n:]))
                waited.append([s for s, _, _ in got[before:]].index(9))
            order = [s for s, _, _ in got]
            assert all(turn <= 11 for turn in waited), waited
            assert len(order) > 20 * 8
            if floods > 1:
                # None of the floods has two turns while another one waits.
                turns = [source for source, _ in groupby(s for s in order if s != 9)]
                assert len(turns) > 2 * floods
        finally:
            for each in (*callers, honest):
                each.close()
            pair.close()

    run(scenario())
