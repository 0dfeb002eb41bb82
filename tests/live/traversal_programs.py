"""One traversal program for the virtual network, network namespaces and user-space NAT boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.base.errors import DeadlineExceeded, PeerError, PeerUnreachable
from shoal.base.ids import PeerId
from shoal.kernel.datagrams import Endpoint
from shoal.parts.overlay.relay import Relay
from shoal.parts.overlay.traversal import Traversal
from shoal.wire.identity import Identity
from shoal.wire.message import message
from shoal.world.record import Run

SERVICE = 3478


@message
class Question:
    number: int
    filling: bytes


@message
class Reply:
    number: int


def key(peer: int) -> Identity:
    return Identity.from_seed(bytes([peer]) * 32)


def key_of(peer: PeerId) -> bytes:
    return key(peer).public


async def replies(envelope: Any) -> Reply:
    return Reply(envelope.message.number)


async def asked(peer: Any, to: int, number: int, size: int) -> bool:
    try:
        question = Question(number, bytes(size))
        found = await peer.request(PeerId(to), question, deadline=peer.now() + 2.0)
    except (DeadlineExceeded, PeerError, PeerUnreachable):
        return False
    return found.number == number


@dataclass(frozen=True)
class Cross:
    """Peers 0 and 1 relay and reflect at `hosts`; the others meet in `turns` of (caller, called).

    messages: whether questions are asked over what was opened, by both sides.
    """

    hosts: tuple[str, str]
    turns: tuple[tuple[tuple[int, int], ...], ...]
    messages: bool = True
    port: int = SERVICE
    begin_s: float = 6.0
    slot_s: float = 8.0
    timeout_s: float = 1.0
    size: int = 2000

    @property
    def until_s(self) -> float:
        return self.begin_s + self.slot_s * len(self.turns) + 1.0

    async def run(self, peer: Any) -> None:
        places = [Endpoint(host, self.port) for host in self.hosts]
        peer.serve(Question, replies)
        if peer.id < 2:
            if self.messages:
                peer.paths.serve()
            relay = Relay(partner=places[1 - peer.id], identity=key(peer.id), key_of=key_of)
            await relay(peer, peer.datagrams.open(self.port), self.until_s)
            return
        traversal = Traversal(
            peer, *places, timeout_s=self.timeout_s, messages=self.messages,
            identity=key(peer.id), key_of=key_of,
        )  # fmt: skip
        async with peer.tasks() as group:
            group.start(traversal.run(self.until_s))
            group.start(traversal.keep_alive(self.until_s))
            peer.record("registered", await traversal.register())
            peer.record("symmetric", traversal.symmetric)
            for name in ("reachable", "public"):
                peer.record(name, getattr(traversal, name))
            peer.record(f"filtering {traversal.filtering}", 1)
            for number, turn in enumerate(self.turns):
                await peer.sleep_until(self.begin_s + number * self.slot_s)
                for caller, called in turn:
                    if caller == peer.id:
                        await self._call(peer, traversal, called)
                    elif called == peer.id and self.messages:
                        # The caller has found its path by then.
                        await peer.sleep_until(peer.now() + self.slot_s - 2.5)
                        answer = await asked(peer, caller, number, self.size)
                        peer.record("asked back", answer, other=str(caller))

    async def _call(self, peer: Any, traversal: Traversal, called: int) -> None:
        other = str(called)
        path = await traversal.connect(PeerId(called))
        peer.record("path", -1 if path is None else path.direct, other=other)
        if self.messages:
            peer.record("messages", path is not None and path.messages, other=other)
            peer.record("answered", await asked(peer, called, 0, self.size), other=other)


NAMES = ("registered", "symmetric", "reachable", "public", "path", "messages", "answered",
         "asked back", "filtering endpoint-independent", "filtering address-dependent",
         "filtering address-and-port-dependent")  # fmt: skip


def outcomes(*runs: Run) -> dict[tuple[str, int, str], float]:
    """What was found: (name, peer, the other peer) -> value."""
    return {
        (row.name, row.peer, dict(row.labels).get("other", "")): row.value
        for run in runs
        for row in run.rows
        if row.name in NAMES
    }
