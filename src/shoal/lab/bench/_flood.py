"""Round trips of a peer beside another one that floods the peer they both talk to.

Three processes: the asked peer, one that asks it one question at a time, and one that sends it
small messages as fast as it takes them. Calm and flood alternate within one run. The flooding
process only has the processor time that the other two leave, where the system can do that, as if
it ran on a machine of its own: on two cores it would hold them up for the system's time slices of
some 4 ms, whatever they read from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from shoal.base.limits import Limits
from shoal.engine.live import LiveSettings, run_live
from shoal.wire.message import message
from shoal.world.network import Network

_LATE_S = 300.0
_SETTLE_S = 0.1
# So many messages, then the flooding peer looks whether it is to stop.
_BURST = 1000
_LOOK_S = 0.001


@message
class Question:
    number: int
    text: bytes


@message
class Reply:
    number: int


@message
class Spam:
    text: bytes


@message
class Switch:
    on: bool


@message
class End:
    pass


@dataclass(frozen=True)
class Flooded:
    """Peer 0 answers, peer 1 asks and times itself, peer 2 floods peer 0 when it is told to."""

    calls: int
    turns: int

    async def run(self, peer: Any) -> None:
        await (self._answer, self._ask, self._flood)[peer.id](peer)

    async def _answer(self, peer: Any) -> None:
        spam = 0

        async def answer(envelope: Any) -> Reply:
            return Reply(envelope.message.number)

        async def swallow(envelope: Any) -> None:
            nonlocal spam
            spam += 1

        peer.serve(Question, answer)
        peer.serve(Spam, swallow)
        await peer.recv(End, deadline=_LATE_S)
        peer.record("spam", spam)

    async def _ask(self, peer: Any) -> None:
        text = bytes(64)

        async def ask(name: str) -> None:
            times = []
            for number in range(self.calls):
                begin = perf_counter()
                await peer.request(0, Question(number, text), deadline=_LATE_S)
                times.append(perf_counter() - begin)
            times.sort()
            peer.record(f"{name} p50", times[len(times) // 2])
            peer.record(f"{name} p99", times[len(times) * 99 // 100])

        await ask("warm")
        for _ in range(self.turns):
            await ask("calm")
            await self._switch(peer, True)
            await ask("flood")
            await self._switch(peer, False)
        for other in (0, 2):
            await peer.send(other, End())

    async def _switch(self, peer: Any, on: bool) -> None:
        await peer.request(2, Switch(on), deadline=_LATE_S)
        await peer.sleep_until(peer.now() + _SETTLE_S)

    async def _flood(self, peer: Any) -> None:
        on = False

        async def switch(envelope: Any) -> Reply:
            nonlocal on
            on = envelope.message.on
            return Reply(0)

        peer.serve(Switch, switch)
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        spam = Spam(bytes(64))
        while await peer.recv(End, deadline=peer.now() + _LOOK_S) is None:
            for _ in range(_BURST if on else 0):
                await peer.send(0, spam)
            await peer.flushed(0)


def seconds(calls: int, turns: int) -> dict[str, list[float]]:
    """{"calm p50", "calm p99", "flood p50", "flood p99": seconds of each turn; "spam": how many
    messages the asked peer swallowed}."""
    run = run_live(
        Flooded(calls, turns), Network(3), processes=3, limits=Limits(queue_bytes=1 << 20),
        settings=LiveSettings(horizon_s=_LATE_S),
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    for row in run.rows:
        found.setdefault(row.name, []).append(row.value)
    return found
