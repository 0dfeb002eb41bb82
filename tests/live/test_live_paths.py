"""Paths over real connections on loopback: through a relay, opened from both sides, and hostile."""

from __future__ import annotations

import asyncio
import os
import socket as sockets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from paths_world import At, Meet, Question, asked, doubles, values, why

from shoal.base.errors import HandshakeError
from shoal.base.ids import PeerId
from shoal.engine.event import simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.live.introduction import MAGIC, Intro, _hear
from shoal.engine.live.switchboard import Switchboard
from shoal.kernel.paths import RelayLimits
from shoal.wire import codec
from shoal.wire.handshake import Trust
from shoal.wire.identity import Identity
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.nat import NatBox
from shoal.world.network import Network

pytestmark = pytest.mark.live
SETTINGS = LiveSettings(horizon_s=40.0)


@pytest.mark.parametrize("security", ["noise", "none"])
@pytest.mark.parametrize("direct", [False, True])
def test_messages_and_large_tensors_pass(direct: bool, security: Any) -> None:
    settings = LiveSettings(horizon_s=40.0, security=security)
    limits = RelayLimits(circuit_bytes=1 << 26)
    program = Meet(limits, direct, (4, 1 << 18, 1 << 20, 4), until_s=5.0)
    run = run_live(program, Network(3), settings=settings)
    assert values(run, "reserved") == [1.0, 1.0]
    assert values(run, "asked") == [1.0] * 4, why(run)
    assert values(run, "direct") == values(run, "punched") == [1.0] * (2 * direct)


@pytest.mark.parametrize("security", ["noise", "none"])
def test_a_relay_cannot_read_what_it_passes_on(
    monkeypatch: pytest.MonkeyPatch, security: Any
) -> None:
    """In the clear the same measurement finds the words, so it would see them."""
    passed = bytearray()
    plain = Switchboard._pass

    async def overheard(self: Any, reader: Any, writer: Any, used: Any) -> None:
        write = writer.write
        monkeypatch.setattr(writer, "write", lambda data: (passed.extend(data), write(data))[1])
        await plain(self, reader, writer, used)

    monkeypatch.setattr(Switchboard, "_pass", overheard)
    settings = LiveSettings(horizon_s=40.0, security=security)
    run = run_live(Meet(sizes=(1000,), until_s=3.0), Network(3), settings=settings)
    assert values(run, "asked") == [1.0]
    assert len(passed) > 8000
    words = b"\0\0\0\0" * 900  # Question 0 holds a thousand zeros.
    assert (words in passed) == (security == "none")


@pytest.mark.slow
def test_limits_of_a_relay_cut_a_pair_off() -> None:
    limits = RelayLimits(circuit_bytes=100_000)
    run = run_live(Meet(limits, sizes=(4, 1 << 16, 4), until_s=14.0), Network(3), settings=SETTINGS)
    # 256 KiB do not fit; after that nothing does, for as long as a circuit may last.
    assert values(run, "asked") == [1.0, 0.0, 0.0]


def test_what_a_pair_may_do_again_after_a_pause() -> None:
    program = Pauses(RelayLimits(circuit_s=1.0))
    run = run_live(program, Network(3), settings=SETTINGS)
    assert values(run, "asked") == [1.0, 0.0, 1.0], why(run)


@dataclass(frozen=True)
class Pauses(Meet):
    """Asks at once, when the pair's time is over, and when it may begin again."""

    async def run(self, peer: Any) -> None:
        peer.serve(Question, doubles)
        if peer.id == 0:
            peer.paths.serve(self.limits)
        else:
            assert await peer.paths.reserve(PeerId(0), deadline=3.0)
        if peer.id == 1:
            peer.paths.through(PeerId(2), PeerId(0))
            for wait_s in (0.0, 1.3, 1.5):
                await peer.sleep_until(peer.now() + wait_s)
                peer.record("asked", await asked(peer, 2, 0, wait_s=0.5))
        await peer.sleep_until(6.0)


@dataclass(frozen=True)
class Stranger:
    """Peer 1 reserves at peer 0; a thread of strangers does what it can with both ports."""

    attack: Callable[[int, bytes], None]

    async def run(self, peer: Any) -> None:
        peer.serve(Question, doubles)
        if peer.id == 0:
            peer.paths.serve()
            ports = [p for p in (_listening(peer),) if p]
            await peer.sleep_until(1.0)
            transport = peer.host.transports[0]
            assert transport.lines.board.has(1)
            await peer.compute(_attacks, static=(self.attack, ports[0], transport.digest))
            await peer.sleep_until(peer.now() + 0.5)
            peer.record("guests", len(transport.lines.board._guests))
            # The reservation still leads to the peer that made it.
            peer.record("asked", await asked(peer, 1, 7))
            return
        assert await peer.paths.reserve(PeerId(0), deadline=3.0)
        await peer.sleep_until(8.0)


def _listening(peer: Any) -> int:
    return peer.host.transports[peer.id].listening[1]


def _attacks(attack: Callable[[int, bytes], None], port: int, digest: bytes) -> int:
    attack(port, digest)
    return 1


def _takes_a_reservation(port: int, digest: bytes) -> None:
    """As peer 1, with a key of its own."""
    for what in ("reserve", "line", "call", "answer"):
        _introduce(port, what, digest, Identity.new(), target=0)


def _says_nonsense(port: int, digest: bytes) -> None:
    for data in (MAGIC, MAGIC + bytes(16), MAGIC + bytes(600), MAGIC + bytes(16) + b"\xff\xff"):
        with sockets.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
            connection.settimeout(0.2)
            try:
                while connection.recv(4096):
                    pass
            except OSError:
                continue


def _opens_many(port: int, digest: bytes) -> None:
    """More than may be under way at once, none of which ever goes on."""
    held = []
    for _ in range(400):
        connection = sockets.create_connection(("127.0.0.1", port))
        connection.sendall(MAGIC + os.urandom(16))
        held.append(connection)
    for connection in held:
        connection.close()


def _introduce(port: int, what: str, digest: bytes, key: Identity, target: int) -> None:
    nonce = os.urandom(16)
    with sockets.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(2.0)
        connection.sendall(MAGIC + nonce)
        theirs = connection.recv(20, sockets.MSG_WAITALL)[4:]
        bare = Intro(what, 1, target, 2, key.public, b"")
        text = b"shoal line" + digest + b"".join(sorted((nonce, theirs)))
        signature = key.sign(text + b"".join(codec.encode(bare)))
        signed = Intro(what, 1, target, 2, key.public, signature)
        data = b"".join(codec.encode(signed))
        connection.sendall(len(data).to_bytes(2, "little") + data)
        # Closed without a word.
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""


@pytest.mark.parametrize("attack", [_takes_a_reservation, _says_nonsense, _opens_many])
def test_strangers_take_nothing(attack: Callable[[int, bytes], None]) -> None:
    run = run_live(Stranger(attack), Network(2), settings=SETTINGS)
    assert values(run, "guests") == [1.0]
    assert values(run, "asked") == [1.0], why(run)
    if attack is _takes_a_reservation:
        assert sum("but" in text and "refused a line: wrong key" in text for text in why(run)) == 4


def test_the_introduction_of_the_test_is_a_good_one_with_the_right_key() -> None:
    """So that the refusals above are about the key."""
    key = Identity.new()
    transport: Any = SimpleNamespace(
        peer=0, digest=bytes(16), addresses={1: ("", 0)}, credentials=object(),
        trust=Trust({1: key.public}),
    )  # fmt: skip
    nonces = bytes(32)
    bare = Intro("line", 1, 0, 2, key.public, b"")
    signature = key.sign(b"shoal line" + bytes(16) + nonces + b"".join(codec.encode(bare)))
    good = Intro("line", 1, 0, 2, key.public, signature)

    async def heard(intro: Intro) -> Any:
        reader = asyncio.StreamReader()
        data = b"".join(codec.encode(intro))
        reader.feed_data(len(data).to_bytes(2, "little") + data)
        reader.feed_eof()
        return await _hear(transport, (reader, None), nonces)  # type: ignore[arg-type]

    assert asyncio.run(heard(good)).source == 1
    with pytest.raises(HandshakeError, match="did not sign"):
        asyncio.run(heard(Intro("reserve", 1, 0, 2, key.public, signature)))


def test_the_same_text_talks_on_the_virtual_network() -> None:
    """Through a relay and straight, as on real connections."""
    boxes = tuple(NatBox((peer,), messages=True) for peer in (1, 2))
    network = Network(3, links=Links(latency_s=0.01), nats=boxes)
    # The two tell each other their ports by a message, which needs the relay there.
    run = simulate(Telling(sizes=(4, 1000, 4), until_s=6.0), network)
    real = run_live(Telling(sizes=(4, 1000, 4), until_s=6.0), Network(3), settings=SETTINGS)
    for name in ("reserved", "asked", "told"):
        assert values(run, name) == values(real, name), name
    assert values(run, "asked") == [1.0] * 3


@dataclass(frozen=True)
class Telling(Meet):
    """Both tell each other something before they ask."""

    async def run(self, peer: Any) -> None:
        peer.serve(Question, doubles)
        if peer.id == 0:
            peer.paths.serve(self.limits)
            await peer.sleep_until(self.until_s)
            return
        other = PeerId(3 - peer.id)
        peer.record("reserved", await peer.paths.reserve(PeerId(0), deadline=2.0))
        await peer.sleep_until(2.0)
        peer.paths.through(other, PeerId(0))
        await peer.send(other, At("here", peer.id))
        told = await peer.recv(At, deadline=4.0)
        peer.record("told", told is not None and told.message.port == other)
        if peer.id == 1:
            for number, size in enumerate(self.sizes):
                peer.record("asked", await asked(peer, other, number, size))
        await peer.sleep_until(self.until_s)


@dataclass(frozen=True)
class Stubborn(Meet):
    """Peer 1 asks peer 2 through the relay twice a second, whatever happens."""

    async def run(self, peer: Any) -> None:
        peer.serve(Question, doubles)
        if peer.id == 0:
            peer.paths.serve(self.limits)
        else:
            await peer.paths.reserve(PeerId(0), deadline=peer.now() + 3.0)
            peer.paths.through(PeerId(3 - peer.id), PeerId(0))
        while peer.now() < self.until_s:
            if peer.id == 1:
                began_s = peer.now()
                peer.record("asked", await asked(peer, 2, 0, wait_s=1.0), at=f"{began_s:.2f}")
            await peer.sleep_until(peer.now() + 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 2])
def test_who_comes_back_is_found_again(who: int) -> None:
    """The relay, or the peer that is called: reservations and lines are made anew."""
    network = Network(3, faults=(Crash(who=(who,), at=3.0, until=4.5),))
    run = run_live(Stubborn(until_s=14.0), network, settings=SETTINGS)
    rows = [(float(dict(row.labels)["at"]), row.value) for row in run.series("asked")]
    assert any(value for at_s, value in rows if at_s < 3.0)
    assert not any(value for at_s, value in rows if 3.1 < at_s < 4.0)
    assert all(value for at_s, value in rows if at_s > 11.0), (rows, why(run))


@dataclass(frozen=True)
class Broken(Meet):
    """A direct line breaks: the next question takes the relay."""

    direct: bool = True

    async def then(self, peer: Any, other: PeerId, socket: Any, place: Any) -> None:
        lines = peer.host.transports[peer.id].lines
        if peer.id == 1:
            peer.record("asked", await asked(peer, other, 1))
            lines._lines[other].close()
            await peer.sleep_until(peer.now() + 0.3)
            peer.record("relayed", not peer.paths.direct(other))
            peer.record("asked", await asked(peer, other, 2))
            peer.record("relayed", not lines._lines[other].direct)


def test_when_a_direct_line_breaks_messages_take_the_relay_again() -> None:
    run = run_live(Broken(until_s=9.0), Network(3), settings=SETTINGS)
    assert values(run, "punched") == [1.0, 1.0]
    assert values(run, "asked") == [1.0, 1.0]
    assert values(run, "relayed") == [1.0, 1.0]
