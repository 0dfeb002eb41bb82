"""Messages over QUIC on the datagrams of a socket that punched; TCP is switched off."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from paths_world import At, Meet, asked, over_quic, values, why

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.engine.live import LiveSettings, introduction, run_live
from shoal.engine.live import settings as settings_module
from shoal.engine.live.quic import QuicTransport
from shoal.kernel.datagrams import Endpoint
from shoal.wire.identity import Identity
from shoal.world.network import Network

pytestmark = pytest.mark.live
SETTINGS = LiveSettings(horizon_s=50.0, carriers=("quic",))


@dataclass(frozen=True)
class Straight(Meet):
    """Both sides ask over the path."""

    direct: bool = True
    until_s: float = 6.0

    async def then(self, peer: Any, other: PeerId, socket: Any, place: Any) -> None:
        for number, size in enumerate(self.sizes):
            peer.record("asked", await asked(peer, other, number, size))


@pytest.mark.parametrize("security", ["noise", "none"])
def test_messages_and_large_tensors_go_both_ways(security: Any) -> None:
    chosen = LiveSettings(horizon_s=50.0, carriers=("quic",), security=security)
    # A relay that passes on so little could not carry the large ones.
    run = run_live(Straight(sizes=(4, 1 << 17, 4)), Network(3), settings=chosen)
    assert values(run, "punched") == values(run, "quic") == [1.0, 1.0], why(run)
    assert values(run, "asked") == [1.0] * 6, why(run)


def test_both_carriers_are_tried_together() -> None:
    chosen = LiveSettings(horizon_s=50.0, carriers=("tcp", "quic"))
    run = run_live(Straight(until_s=4.0), Network(3), settings=chosen)
    assert values(run, "punched") == [1.0, 1.0]
    assert values(run, "asked") == [1.0] * 6, why(run)
    first, second = values(run, "quic")
    assert first == second


@dataclass(frozen=True)
class Flood(Straight):
    """A peer sends much at once, and small questions beside it."""

    bytes_each: int = 1 << 21
    until_s: float = 9.0

    async def then(self, peer: Any, other: PeerId, socket: Any, place: Endpoint) -> None:
        if peer.id == 2:
            return
        size = self.bytes_each // 4
        async with peer.tasks() as group:
            for number in range(3):
                group.start(self._large(peer, other, number, size))
            for _ in range(10):
                began_s = peer.now()
                assert await asked(peer, other, 9, 4)
                peer.record("small", peer.now() - began_s)

    async def _large(self, peer: Any, other: PeerId, number: int, size: int) -> None:
        peer.record("large", await asked(peer, other, number, size, wait_s=9.0))


def test_large_tensors_sent_at_once_all_arrive_and_heartbeats_are_heard() -> None:
    """Large and small ones are answered, and no peer counts as dead meanwhile."""
    chosen = LiveSettings(horizon_s=50.0, carriers=("quic",), heartbeat_s=1.0, dead_after_s=8.0)
    run = run_live(Flood(), Network(3), settings=chosen)
    assert values(run, "quic") == [1.0, 1.0], why(run)
    assert values(run, "large") == [1.0] * 3, why(run)
    assert len(values(run, "small")) == 10
    assert not any("lost peer" in what for what in why(run)), why(run)


def test_who_is_not_who_was_meant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peer 2 signs with another key than peer 2's: QUIC comes up, and no line."""
    plain, forged_by = introduction._say, list[int]()

    async def forged(transport: Any, *rest: Any) -> None:
        forges = transport.peer == 2 and isinstance(rest[0][1].transport, QuicTransport)
        if forges:
            forged_by.append(transport.peer)
        signs: Any = _Signs(transport) if forges else transport
        await plain(signs, *rest)

    monkeypatch.setattr(introduction, "_say", forged)
    run = run_live(Straight(sizes=(), until_s=6.5), Network(3), settings=SETTINGS)
    assert forged_by
    assert [row.value for row in run.series("punched") if row.peer == 1] == [0.0], why(run)


class _Signs:
    """Claims to be the transport's peer, with its public key, and signs with another one."""

    def __init__(self, transport: Any) -> None:
        self.peer, self.digest = transport.peer, transport.digest
        own, other = transport.credentials.identity, Identity.from_seed(b"x" * 32)
        self.credentials = SimpleNamespace(
            identity=SimpleNamespace(public=own.public, sign=other.sign)
        )


def test_a_line_that_breaks_leaves_the_relay_and_is_opened_again() -> None:
    run = run_live(Again(sizes=(), until_s=9.0), Network(3), settings=SETTINGS)
    assert values(run, "asked") == [1.0, 1.0, 1.0], why(run)
    assert values(run, "relayed") == [1.0]
    assert values(run, "again") == [1.0, 1.0]


@dataclass(frozen=True)
class Again(Straight):
    """The line is cut on one side; then both open another one over the same sockets."""

    async def then(self, peer: Any, other: PeerId, socket: Any, place: Endpoint) -> None:
        lines = peer.host.transports[peer.id].lines
        if peer.id == 1:
            peer.record("asked", await asked(peer, other, 1))
            lines._lines[other].close()
            await peer.sleep_until(peer.now() + 0.3)
            peer.record("asked", await asked(peer, other, 2))
            peer.record("relayed", not lines._lines[other].direct)
            await peer.send(other, At("again", 1))
        else:
            await peer.recv(At, deadline=peer.now() + 5.0)
        found = await peer.paths.punch(other, socket, place, deadline=peer.now() + 3.0)
        peer.record("again", found and over_quic(peer, other))
        if peer.id == 1:
            peer.record("asked", await asked(peer, other, 3, 1 << 16))


def test_a_second_punch_finds_the_line_that_stands() -> None:
    run = run_live(Twice(sizes=(), until_s=3.0), Network(3), settings=SETTINGS)
    assert values(run, "twice") == [1.0, 1.0]


@dataclass(frozen=True)
class Twice(Straight):
    async def then(self, peer: Any, other: PeerId, socket: Any, place: Endpoint) -> None:
        found = await peer.paths.punch(other, socket, place, deadline=peer.now() + 0.5)
        peer.record("twice", found)


def test_closing_the_socket_ends_the_line() -> None:
    run = run_live(Closes(sizes=(), until_s=4.0), Network(3), settings=SETTINGS)
    assert values(run, "still") == [0.0, 0.0]
    assert values(run, "asked") == [1.0], why(run)


@dataclass(frozen=True)
class Closes(Straight):
    async def then(self, peer: Any, other: PeerId, socket: Any, place: Endpoint) -> None:
        if peer.id == 1:
            socket.close()
        await peer.sleep_until(peer.now() + 0.5)
        peer.record("still", peer.paths.direct(other))
        if peer.id == 1:
            peer.record("asked", await asked(peer, other, 1))


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"shoal\[quic\]"):
        LiveSettings(carriers=("quic",))
    LiveSettings()
    with pytest.raises(UsageError, match="carriers="):
        LiveSettings(carriers=())
