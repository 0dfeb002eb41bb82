"""Hostile callers against a peer that encrypts: changed handshakes, records and frames, old bytes.

Three kinds of attack, from a seeded generator: bytes of the handshake that were changed; sealed
records of a true session that were changed on the way; and frames that a peer with a valid key
changed itself before it sealed them. An honest peer calls the attacked one all the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest
from live_programs import Note
from test_live_links import DIGEST, Pair, genuine, memory_bytes, mutated, run, until

from shoal.base.errors import HandshakeError
from shoal.wire.frame import GREETING_BYTES
from shoal.wire.handshake import Credentials, Handshake, Trust
from shoal.wire.identity import Identity
from shoal.wire.noise import StaticKey
from shoal.wire.session import SCRATCH_BYTES, Session

pytestmark = pytest.mark.live
HONEST, ATTACKED, HOSTILE, NOBODY = (Identity.from_seed(bytes([n]) * 32) for n in range(1, 5))
KEYS = {0: HONEST.public, 1: ATTACKED.public, 2: HOSTILE.public}
MOST_GROWTH_BYTES = 20 << 20


class Target(Pair):
    """Peers 0 and 1 with keys; peer 1 is attacked, and knows peer 2's key."""

    def open(self) -> None:
        for peer, identity in zip(self.peers, (HONEST, ATTACKED), strict=True):
            peer.credentials = Credentials(identity)
            peer.open(self.addresses, DIGEST, KEYS)
            peer.up()


@contextlib.contextmanager
def target(**more: Any) -> Any:
    pair = Target(asyncio.get_running_loop(), security="noise", **more)
    try:
        pair.open()
        yield pair
    finally:
        pair.close()


# One for all of an attack, as of a real peer: proofs are signed once for a key.
_HOSTILE = Credentials(HOSTILE)


def caller(credentials: Credentials, source: int = 2) -> Handshake:
    return Handshake(credentials, source, DIGEST, Trust(KEYS).check, target=1)


def shake(sock: socket.socket, side: Handshake) -> None:
    """Go through the handshake; OSError when the other side hangs up."""
    sock.sendall(side.begin())
    while side.session is None:
        data = sock.recv(side.missing)
        if not data:
            raise ConnectionResetError
        if reply := side.receive(data):
            sock.sendall(reply)


def sealed(session: Session, plain: bytes) -> bytes:
    """All of it in records, short ones first as a peer would send them."""
    place, stream, view = memoryview(bytearray(SCRATCH_BYTES)), b"", memoryview(plain)
    sizes = [32, 200, 1500]
    while view:
        size = sizes.pop(0) if sizes else len(view)
        out, taken = session.seal([view[:size]], place)
        stream += out
        view = view[taken:]
    return stream


def drained(sock: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    sock.shutdown(socket.SHUT_WR)
    heard = b""
    while data := sock.recv(1 << 16):
        heard += data
    return heard


def attack_once(address: Any, seed: int, stream: bytes) -> None:
    with contextlib.suppress(OSError), socket.create_connection(address, 5.0) as sock:
        sock.settimeout(5.0)
        side = caller(_HOSTILE)
        kind = seed % 4
        if kind == 0:
            sock.sendall(mutated(side.begin(), seed))
        elif kind == 1:
            sock.sendall(side.begin())
            third = b""
            while not third:
                third = side.receive(sock.recv(side.missing))
            sock.sendall(mutated(third, seed))
        else:
            shake(sock, side)
            assert side.session is not None
            if kind == 2:
                sock.sendall(mutated(sealed(side.session, stream), seed))
            else:
                sock.sendall(sealed(side.session, mutated(stream, seed)))
        drained(sock)


def attack(address: Any, seeds: range) -> None:
    stream = genuine()[GREETING_BYTES:]
    for seed in seeds:
        attack_once(address, seed, stream)


def check(count: int) -> None:
    async def scenario() -> None:
        with target() as pair:
            attacked = pair.owners[1]
            await asyncio.to_thread(attack, pair.addresses[1], range(count, count + 200))
            before, rounds = memory_bytes(), 0
            told_before = sum(attacked.dropped.values())
            attacker = asyncio.create_task(
                asyncio.to_thread(attack, pair.addresses[1], range(count))
            )
            while not attacker.done():
                name = f"honest {rounds}"
                pair.send(Note(name))
                await until(
                    lambda n=name: any(
                        not s and isinstance(m, Note) and m.name == n for s, m, _ in attacked.got
                    )
                )
                attacked.got.clear()
                attacked.reasons.clear()
                rounds += 1
                await asyncio.sleep(0.05)
            await attacker
            assert rounds > 3
            assert attacked.dropped["greeting"] > count / 3
            assert attacked.dropped["malformed"] > count / 5
            # One word at most for each attack: nothing is counted twice, nothing goes on.
            assert sum(attacked.dropped.values()) - told_before <= count
            assert not pair.owners[0].dropped
            assert len(pair.peers[1].strangers) <= 1
            assert memory_bytes() - before < MOST_GROWTH_BYTES

    run(scenario())


def test_changed_handshakes_records_and_frames_neither_stop_a_peer_nor_fill_its_memory() -> None:
    check(400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_changed_handshakes_records_and_frames() -> None:
    check(100_000)


def refused(source: int, credentials: Credentials) -> list[str]:
    """What the attacked peer's log says about such a caller."""
    reasons: list[str] = []

    def call(address: Any) -> None:
        with (
            socket.create_connection(address, 5.0) as sock,
            pytest.raises(HandshakeError, match="refused"),
        ):
            shake(sock, caller(credentials, source))

    async def scenario() -> None:
        with target() as pair:
            await asyncio.to_thread(call, pair.addresses[1])
            await until(lambda: pair.owners[1].reasons)
            assert pair.owners[1].dropped == {"greeting": 1}
            assert not pair.owners[1].got
            reasons.extend(pair.owners[1].reasons)

    run(scenario())
    return reasons


def test_who_has_no_key_of_the_group_is_refused_and_named() -> None:
    (why,) = refused(2, Credentials(NOBODY))
    assert "wrong key" in why
    assert NOBODY.name in why


def test_who_claims_another_peers_number_with_its_own_key_is_refused() -> None:
    (why,) = refused(0, Credentials(HOSTILE))
    assert f"wrong key: peer 0 is {HONEST.name}" in why


def test_who_shows_another_peers_signature_without_its_secret_is_refused() -> None:
    """The signature was seen in an earlier handshake with the honest peer."""
    stolen = Credentials(HONEST)
    signature = stolen.signature
    stolen.static, stolen.signature = StaticKey(), signature
    (why,) = refused(0, stolen)
    assert f"{HONEST.name} did not sign the key that speaks for it" in why


def test_records_of_an_old_session_open_nothing_in_a_new_one() -> None:
    async def scenario() -> None:
        with target() as pair:

            def replay(address: Any) -> None:
                old: list[bytes] = []
                for _ in range(2):
                    with (
                        contextlib.suppress(OSError),
                        socket.create_connection(address, 5.0) as sock,
                    ):
                        side = caller(_HOSTILE)
                        shake(sock, side)
                        assert side.session is not None
                        # The first time these are its own, the second time the old ones.
                        old.append(sealed(side.session, genuine()[GREETING_BYTES:]))
                        sock.sendall(old[0])
                        drained(sock)

            await asyncio.to_thread(replay, pair.addresses[1])
            reasons = pair.owners[1].reasons
            await until(lambda: any("record 0" in why for why in reasons))
            why = next(why for why in reasons if "record 0" in why)
            assert "replayed" in why
            assert "peer 2" in why

    run(scenario())
