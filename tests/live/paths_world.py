"""Peers that meet over a relay and then directly: the program and messages of several tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import DeadlineExceeded, PeerError, PeerUnreachable
from shoal.base.ids import PeerId
from shoal.engine.live.quic import QuicTransport
from shoal.kernel.datagrams import Endpoint
from shoal.kernel.paths import RelayLimits
from shoal.wire.message import message
from shoal.world.record import Run


@message
class Question:
    number: int
    values: Tensor


@message
class Answer:
    number: int
    values: Tensor


@message
class At:
    host: str
    port: int


async def doubles(envelope: Any) -> Answer:
    return Answer(envelope.message.number, envelope.message.values * 2)


async def asked(peer: Any, to: int, number: int, size: int = 4, wait_s: float = 5.0) -> bool:
    """Whether that peer gave the right answer to so many numbers."""
    values = torch.full((size,), float(number), device="cpu")
    try:
        question = Question(number, values)
        found = await peer.request(PeerId(to), question, deadline=peer.now() + wait_s)
    except (DeadlineExceeded, PeerError, PeerUnreachable):
        return False
    assert torch.equal(found.values, values * 2)
    return True


async def punched(peer: Any, other: PeerId, socket: Any) -> tuple[bool, Endpoint]:
    """Tell the other side this side's port, hear its, and dial: whether that worked, and where."""
    await peer.send(other, At(*socket.local))
    told = await peer.recv(At, deadline=peer.now() + 4.0)
    place = Endpoint(told.message.host, told.message.port)
    return await peer.paths.punch(other, socket, place, deadline=peer.now() + 5.0), place


def over_quic(peer: Any, other: int) -> bool:
    line = peer.host.transports[peer.id].lines._lines.get(other)
    return line is not None and isinstance(line._writer.transport, QuicTransport)


@dataclass(frozen=True)
class Meet:
    """Peer 0 relays; peers 1 and 2 reserve there, and talk through it; `direct`: then directly."""

    limits: RelayLimits = field(default_factory=RelayLimits)
    direct: bool = False
    sizes: tuple[int, ...] = (4, 4, 4)
    until_s: float = 12.0

    async def run(self, peer: Any) -> None:
        peer.serve(Question, doubles)
        if peer.id == 0:
            peer.paths.serve(self.limits)
            await peer.sleep_until(self.until_s)
            return
        other, socket = PeerId(3 - peer.id), peer.datagrams.open()
        peer.record("reserved", await peer.paths.reserve(PeerId(0), deadline=3.0))
        await peer.sleep_until(1.0)
        peer.paths.through(other, PeerId(0))
        place = None
        if self.direct:
            found, place = await punched(peer, other, socket)
            peer.record("punched", found)
            peer.record("direct", peer.paths.direct(other))
            peer.record("quic", over_quic(peer, other))
        await self.then(peer, other, socket, place)
        await peer.sleep_until(self.until_s)

    async def then(self, peer: Any, other: PeerId, socket: Any, place: Any) -> None:
        """What each side does once they have met: peer 1 asks."""
        if peer.id == 1:
            for number, size in enumerate(self.sizes):
                peer.record("asked", await asked(peer, other, number, size), number=str(number))


def values(run: Run, name: str) -> list[float]:
    return [row.value for row in run.series(name)]


def why(run: Run) -> list[str]:
    return [happening.what for happening in run.happenings]
