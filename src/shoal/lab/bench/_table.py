"""A hash table at work: one node tells the others when to join, to store and to search.

So the work is as fast as the machine, and the times of searches hold no waiting for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shoal.base.ids import PeerId
from shoal.engine.live import LiveSettings, run_live
from shoal.kernel.peer import Envelope, Peer
from shoal.parts.overlay.kademlia import Kademlia
from shoal.wire.message import message
from shoal.world.faults import Partition, Round
from shoal.world.network import Network
from shoal.world.record import Run

_CONDUCTOR = PeerId(1)
_AT_ONCE = 4
_WORK_S = 120.0
_LATE_S = 3600.0
Security = Literal["noise", "none"]


@message
class Go:
    """Do this: "join", "put" a value of your own under a key, or "get" it."""

    what: str
    number: int


@message
class Did:
    """It is done: whether it had the result that it should have, and the time that it took."""

    well: bool
    seconds: float


@message
class Stop:
    """The run is over."""


@dataclass(frozen=True)
class Table:
    """Everybody joins, some store, then the odd ones search twice; before the second time, in round
    1, the even ones fall silent, and in round 2 they are heard again. Records "found" and "get_s",
    with the label "phase"."""

    keys: int
    gets: int

    async def run(self, peer: Peer) -> None:
        dht = Kademlia(peer)

        async def on_go(envelope: Envelope[Go]) -> Did:
            return await self._do(peer, dht, envelope.message)

        async with peer.tasks() as group:
            peer.serve(Go, on_go)
            dht.start(group)
            if peer.id == _CONDUCTOR:
                await self._conduct(peer, dht)
            else:
                await peer.recv(Stop, deadline=_LATE_S)
            dht.stop()

    async def _do(self, peer: Peer, dht: Kademlia, work: Go) -> Did:
        began_s = peer.now()
        deadline = began_s + _WORK_S
        key = b"key %d" % work.number
        if work.what == "join":
            # The conductor is the first; everybody after it knows three of those before.
            earlier = [_CONDUCTOR, *range(peer.id)]
            contacts = [peer.choice(earlier, "contact", turn) for turn in range(3)]
            well = await dht.join(contacts, deadline=deadline) > 0
        elif work.what == "put":
            well = await dht.put(key, b"value of " + key, deadline=deadline) > 0
        else:
            found = await dht.get(key, deadline=deadline)
            well = b"value of " + key in found.values.values()
        return Did(well, peer.now() - began_s)

    async def _conduct(self, peer: Peer, dht: Kademlia) -> None:
        others = [each for each in peer.roster if each != peer.id]

        async def ask(target: PeerId, work: Go) -> Did:
            if target == peer.id:
                return await self._do(peer, dht, work)
            return await peer.request(target, work, deadline=peer.now() + 2 * _WORK_S)

        async def lane(what: str, numbers: list[int], targets: list[PeerId]) -> None:
            for number in numbers:
                done = await ask(targets[number % len(targets)], Go(what, number))
                peer.record(what, float(done.well))

        for what, targets, count in (("join", others, len(others)), ("put", others, self.keys)):
            async with peer.tasks() as group:
                for first in range(_AT_ONCE):
                    group.start(lane(what, list(range(first, count, _AT_ONCE)), targets))
        odd = [each for each in peer.roster if each % 2]
        for phase in (0, 1):
            if phase:
                peer.enter_round(1)
            for turn in range(self.gets):
                number = peer.choice(range(self.keys), "key", phase, turn)
                done = await ask(odd[turn % len(odd)], Go("get", number))
                peer.record("found", float(done.well), phase=str(phase))
                peer.record("get_s", done.seconds, phase=str(phase))
        peer.enter_round(2)
        for each in others:
            await peer.send(each, Stop())
            await peer.flushed(each)


def searched(nodes: int, keys: int, gets: int, security: Security) -> Run:
    """The run of a table of so many nodes in this process, over loopback TCP.

    Heartbeats are rarer than by default: with thousands of connections in one process they would be
    a good part of its work. Connections stay as long as there are descriptors.
    """
    silence = Partition(who=tuple(range(0, nodes, 2)), at=Round(1), until=Round(2))
    settings = LiveSettings(
        horizon_s=_LATE_S, security=security, heartbeat_s=20.0, dead_after_s=60.0, idle_s=600.0
    )
    return run_live(Table(keys, gets), Network(nodes, faults=(silence,)), settings=settings)


def figures(run: Run, phase: int) -> list[tuple[bool, float]]:
    """(found, seconds) of each search in a phase: 0 all well, 1 half of the nodes silent."""
    return list(zip(map(bool, _values(run, "found", phase)), _values(run, "get_s", phase),
                    strict=True))  # fmt: skip


def _values(run: Run, name: str, phase: int) -> list[Any]:
    wanted = ("phase", str(phase))
    return [row.value for row in run.series(name) if wanted in row.labels]
