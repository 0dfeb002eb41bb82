"""Peer programs that the bench of collectives times, on real processes.

`python -m shoal.lab.bench._collective QUANTISED [BYTES REPEATS]...`: seconds in the clear, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.base.ids import PeerId
from shoal.base.stopwatch import Stopwatch
from shoal.engine.live import LiveSettings, run_live
from shoal.kernel.peer import Program
from shoal.parts.collective._errors import CollectiveError, ConnectionLost
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.quantised import Quantised
from shoal.world.faults import Fault
from shoal.world.network import Network
from shoal.world.record import Run

_MASTER = PeerId(0)
_UNCOUNTED = 2
_LATE_S = 900.0


@dataclass(frozen=True)
class WithMaster:
    """The master is peer 0, the others run the program."""

    program: Any

    def __call__(self, peer: int) -> Program:
        return self.program if peer else Master(end_s=_LATE_S)


async def together(peer: Any, group: Communicator, peers: int) -> None:
    """Until all are in the group."""
    while group.everybody < peers:
        await group.update_topology()
        await peer.sleep_until(peer.now() + 0.05)


@dataclass(frozen=True)
class Reduces:
    """All-reduces of some sizes (bytes, repeats); peer 1 records how long each took."""

    peers: int
    plan: tuple[tuple[int, int], ...]
    quantised: bool = False

    async def run(self, peer: Any) -> None:
        codec = Quantised() if self.quantised else None
        async with Communicator(peer, _MASTER, master_timeout_s=_LATE_S) as group:
            await together(peer, group, self.peers)
            for size_bytes, repeats in self.plan:
                values, here = torch.empty(size_bytes // 4), torch.zeros(1)
                for turn in range(_UNCOUNTED + repeats):
                    values.fill_(1.0)
                    await group.all_reduce_with_retry(here, tag=1)  # So that all begin at once.
                    watch = Stopwatch()
                    await group.all_reduce(values, quantise=codec)
                    took_s = watch.wall_s
                    assert values[0] == values[-1] == self.peers
                    if peer.id == 1 and turn >= _UNCOUNTED:
                        peer.record("took_s", took_s, size_bytes=str(size_bytes))


@dataclass(frozen=True)
class Loses:
    """All-reduces in which the last peer is killed at a moment, or cut off by a fault; survivors
    record when each one ended and how many peers were in it."""

    peers: int
    size_bytes: int
    at_s: float
    kills: bool

    async def run(self, peer: Any) -> None:
        values = torch.empty(self.size_bytes // 4)
        try:
            async with Communicator(peer, _MASTER, master_timeout_s=4.0) as group:
                await together(peer, group, self.peers)
                if peer.id == self.peers and self.kills:
                    async with peer.tasks() as tasks:
                        tasks.start(self._killed(peer))
                        await self._reduce(peer, group, values)
                else:
                    await self._reduce(peer, group, values)
        except CollectiveError:
            peer.record("left", 1.0)

    async def _killed(self, peer: Any) -> None:
        await peer.sleep_until(self.at_s)
        os.kill(os.getpid(), signal.SIGKILL)

    async def _reduce(self, peer: Any, group: Communicator, values: Tensor) -> None:
        few = 0
        while few < 3:
            values.fill_(1.0)
            await group.all_reduce_with_retry(values, "sum")
            count = float(values[0])
            assert bool((values == count).all())
            peer.record("ended_s", peer.now(), peers=str(int(count)))
            few += count < self.peers


@dataclass(frozen=True)
class Busy:
    """All-reduces for some time while every peer computes all the time; aborts are counted."""

    peers: int
    size_bytes: int
    for_s: float

    async def run(self, peer: Any) -> None:
        async with Communicator(peer, _MASTER, master_timeout_s=60.0) as group:
            await together(peer, group, self.peers)
            async with peer.tasks() as tasks:
                work = tasks.start(self._compute(peer))
                await self._reduce(peer, group)
                work.cancel()

    async def _compute(self, peer: Any) -> None:
        square = torch.rand(512, 512)
        while True:
            square = await peer.compute(_work, square)

    async def _reduce(self, peer: Any, group: Communicator) -> None:
        values = torch.empty(self.size_bytes // 4 + 1)
        end_s, done, aborts = peer.now() + self.for_s, 0, 0
        while True:
            values.fill_(1.0)
            values[-1] = peer.now() < end_s
            try:
                await group.all_reduce(values)
            except ConnectionLost:
                aborts += 1
                continue
            done += 1
            if values[-1] < self.peers:
                break
        if peer.id == 1:
            peer.record("aborts", aborts)
            peer.record("done", done)


def _work(square: Tensor) -> Tensor:
    return torch.tanh(square @ square / 512.0)


def run(program: Any, security: Any, faults: tuple[Fault, ...] = ()) -> Run:
    """On as many processes as the group has peers; the master lives with the last of them, unless
    that one is to be lost."""
    peers = program.peers
    own = bool(faults) or getattr(program, "kills", False)
    return run_live(
        WithMaster(program), Network(peers + 1, faults=faults), processes=peers + own,
        settings=LiveSettings(horizon_s=_LATE_S, security=security, start_s=180.0, stop_s=60.0),
    )  # fmt: skip


def seconds(
    security: str, plan: tuple[tuple[int, int], ...], *, quantised: bool = False, peers: int = 4
) -> list[list[float]]:
    """How long the all-reduces of each size took."""
    rows = run(Reduces(peers, plan, quantised), security).series("took_s")
    return [
        [row.value for row in rows if row.labels == (("size_bytes", str(size_bytes)),)]
        for size_bytes, _ in plan
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    quantised, *numbers = map(int, sys.argv[1:])
    plan = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    sys.stdout.write(json.dumps(seconds("none", plan, quantised=bool(quantised))) + "\n")
