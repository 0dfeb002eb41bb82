"""Connections that prove who speaks: strangers on the socket, allow-lists, the same results."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_programs import LATE_S, Answer, Ask, Gossip, Note
from test_live_kernel import By

from shoal.base.errors import HandshakeError, UsageError
from shoal.base.limits import DEFAULT
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.live.transport import Transport
from shoal.wire.frame import Greeting, unpack_answer
from shoal.wire.handshake import Credentials, Handshake, Trust
from shoal.wire.identity import Identity
from shoal.wire.session import SCRATCH_BYTES
from shoal.world.network import Network

pytestmark = pytest.mark.live
DIGEST = bytes(range(16))
OWN, FRIEND, STRANGER = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
KEYS = {0: OWN.public, 1: FRIEND.public}


@dataclass
class Owner:
    """Notes what a transport tells its engine."""

    ready: Any = field(default_factory=list)
    dirty: dict[Any, None] = field(default_factory=dict)
    lost_by: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def arrived(self, *_: Any) -> None:
        raise AssertionError("nothing may arrive")

    def lost(self, reason: str, messages: int) -> None:
        self.lost_by[reason] = self.lost_by.get(reason, 0) + messages

    def closed(self, peer: int, why: str) -> None:
        self.reasons.append(why)

    def round_trip(self, seconds: float) -> None:
        """Not looked at."""

    def settle(self) -> None:
        while self.dirty:
            self.dirty.popitem()[0].write()


@contextmanager
def listening(secure: bool = True, **settings: Any) -> Iterator[tuple[Any, Owner]]:
    """The address of peer 0's transport on a loop of its own, and what it tells."""
    loop, owner = asyncio.SelectorEventLoop(), Owner()
    transport = Transport(loop, 0, owner, DEFAULT, LiveSettings(**settings))
    transport.credentials = Credentials(OWN) if secure else None
    address = transport.bind()
    transport.open({0: address, 1: ("127.0.0.1", 1)}, DIGEST, KEYS)
    transport.up()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield address, owner
    finally:

        def end() -> None:
            transport.close()
            loop.stop()

        loop.call_soon_threadsafe(end)
        thread.join(5.0)
        loop.close()


def calling(identity: Identity, peer: int = 1, digest: bytes = DIGEST) -> Handshake:
    trust = Trust({0: OWN.public})
    return Handshake(Credentials(identity), peer, digest, trust.check, target=0)


def knock(address: Any, caller: Handshake) -> list[bytes]:
    """A whole handshake over a socket; what this side said."""
    said = [caller.begin()]
    with socket.create_connection(address, timeout=5.0) as sock:
        sock.sendall(said[0])
        while caller.session is None:
            data = sock.recv(caller.missing)
            assert data, "closed without a word"
            if reply := caller.receive(data):
                said.append(reply)
                sock.sendall(reply)
    return said


def until_closed(address: Any, data: bytes) -> bytes:
    """What the transport answers to bytes of anybody before it hangs up."""
    heard = b""
    with socket.create_connection(address, timeout=5.0) as sock:
        sock.sendall(data)
        while piece := sock.recv(1 << 12):
            heard += piece
    return heard


def test_a_friend_is_let_in_and_a_stranger_is_told_why_not() -> None:
    with listening() as (address, owner):
        knock(address, calling(FRIEND))
        with pytest.raises(HandshakeError, match="refused: wrong key: peer 1 is"):
            knock(address, calling(STRANGER))
        with pytest.raises(HandshakeError, match="no peer 7 here"):
            knock(address, calling(FRIEND, peer=7))
        # The caller sees first that the other side is of another run, and says so.
        with pytest.raises(HandshakeError, match="another run"):
            knock(address, calling(FRIEND, digest=bytes(16)))
    assert owner.lost_by["greeting"] >= 2
    assert any(f"wrong key: peer 1 is {FRIEND.name}" in why for why in owner.reasons)


def test_the_allow_list_is_kept_and_the_log_names_who_came() -> None:
    with (
        listening(allow=(OWN.name,)) as (address, owner),
        pytest.raises(HandshakeError, match="not on the allow-list"),
    ):
        knock(address, calling(FRIEND))
    assert owner.lost_by == {"greeting": 1}
    assert owner.reasons == [
        f"refused a connection: not allowed: {FRIEND.name} is not on the allow-list"
    ]


def test_an_old_sessions_bytes_and_a_caller_in_clear_are_refused() -> None:
    with listening() as (address, owner):
        said = knock(address, calling(FRIEND))
        heard = until_closed(address, b"".join(said))
        # The replayed first message gets a fresh answer, the third one opens nothing.
        assert heard.endswith(b"altered")
        heard = until_closed(address, Greeting(1, 0, DIGEST).pack())
        assert unpack_answer(heard) == "this peer encrypts and you do not"
    assert any("(a replay)" in why for why in owner.reasons)
    assert any("does not encrypt" in why for why in owner.reasons)


def test_a_peer_in_clear_turns_an_encrypted_caller_away() -> None:
    with (
        listening(secure=False, security="none") as (address, owner),
        pytest.raises(HandshakeError, match="does not encrypt"),
    ):
        knock(address, calling(FRIEND))
    assert any("no Shoal peer" in why for why in owner.reasons)


def test_who_says_nothing_or_too_little_is_cut_off() -> None:
    first = calling(FRIEND).begin()
    with listening(handshake_s=0.2) as (address, owner):
        assert until_closed(address, b"") == b""
        assert until_closed(address, first[:-1]) == b""
    assert owner.lost_by == {"greeting": 2}
    assert owner.reasons == ["refused a connection: no greeting in time"] * 2


@pytest.mark.parametrize("at", [0, 60, 1000, 140_000])
def test_a_changed_byte_after_the_handshake_ends_the_connection(at: int) -> None:
    with listening() as (address, owner), socket.create_connection(address, timeout=5.0) as sock:
        caller = calling(FRIEND)
        sock.sendall(caller.begin())
        while caller.session is None:
            if reply := caller.receive(sock.recv(caller.missing)):
                sock.sendall(reply)
        place = memoryview(bytearray(SCRATCH_BYTES))
        stream = bytearray(caller.session.seal([bytes(200_000)], place)[0])
        stream[at] ^= 64
        with suppress(ConnectionError):
            sock.sendall(stream)
            while sock.recv(1 << 12):
                pass
    assert owner.lost_by == {"malformed": 1}
    assert len(owner.reasons) == 1


async def _asks(peer: Any) -> None:
    small = await peer.request(1, Ask(1, torch.ones(4)), deadline=LATE_S)
    large = await peer.request(1, Ask(2, torch.arange(700_000.0)), deadline=LATE_S)
    peer.record("small", float(small.values.sum()))
    peer.record("large", float(torch.equal(large.values, torch.arange(700_000.0))))
    await peer.send(1, Note("end"))


async def _answers(peer: Any) -> None:
    async def answer(envelope: Any) -> Answer:
        return Answer(envelope.message.number, envelope.message.values)

    peer.serve(Ask, answer)
    await peer.recv(Note, deadline=LATE_S)


@pytest.mark.parametrize("security", ["noise", "none"])
def test_small_and_large_calls_arrive_with_and_without_security(security: Any) -> None:
    settings = LiveSettings(horizon_s=50.0, security=security)
    run = run_live(By((_asks, _answers)), Network(2), settings=settings)
    assert {row.name: row.value for row in run.rows if row.name in ("small", "large")} == {
        "small": 4.0,
        "large": 1.0,
    }
    assert not run.dropped
    assert run.settings["security"] == security


def test_an_identity_is_kept_beside_the_store_and_an_allow_list_knows_it(tmp_path: Path) -> None:
    settings = LiveSettings(horizon_s=50.0, store_dir=str(tmp_path))
    run_live(By((_asks, _answers)), Network(2), settings=settings)
    first = [Identity.load(tmp_path / f"peer-{peer}.pem") for peer in range(2)]
    allowed = replace(settings, allow=tuple(identity.name for identity in first))
    again = run_live(By((_asks, _answers)), Network(2), settings=allowed)
    assert not again.dropped
    assert [Identity.load(tmp_path / f"peer-{peer}.pem") for peer in range(2)] == first


def test_two_processes_learn_what_one_learns_without_security() -> None:
    program = Gossip(rounds=3)
    runs = [
        run_live(
            program, Network(3), seed=5, processes=processes,
            settings=LiveSettings(horizon_s=50.0, security=security),
        )
        for security, processes in (("noise", 2), ("none", 1))
    ]  # fmt: skip
    assert runs[0].finished
    assert not runs[0].dropped
    assert runs[0].state_digest == runs[1].state_digest


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="security='tls'"):
        LiveSettings(security="tls")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="allow needs security"):
        LiveSettings(security="none", allow=(OWN.name,))
    with pytest.raises(UsageError, match="no peer's name"):
        LiveSettings(allow=("alice",))
