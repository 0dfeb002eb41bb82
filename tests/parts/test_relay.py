"""What strangers and liars get from a relay and from a peer's traversal: nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.engine.event import simulate
from shoal.kernel.datagrams import Endpoint
from shoal.parts.overlay._traversal_wire import Connect, Hello, Punch
from shoal.parts.overlay.relay import (
    Challenge,
    Relay,
    Reserve,
    Reserved,
    Through,
    packed,
    reservation_text,
    unpacked,
)
from shoal.parts.overlay.traversal import Traversal
from shoal.wire.identity import Identity
from shoal.world.links import Links
from shoal.world.nat import ADDRESS, INDEPENDENT, PORT, NatBox
from shoal.world.network import Network
from shoal.world.record import Run

SERVICE = 3478
KEYS = [Identity.from_seed(bytes([n]) * 32) for n in range(8)]


def key_of(peer: PeerId) -> bytes | None:
    return KEYS[peer].public if 0 <= peer < len(KEYS) else None


def place(peer: int) -> Endpoint:
    return Endpoint(f"198.18.0.{peer}", SERVICE)


@dataclass(frozen=True)
class Scene:
    """Peer 0 relays and peer 1 is its partner; the others do as they are told."""

    others: tuple[Any, ...]
    relay: Relay
    until_s: float = 60.0

    async def run(self, peer: Any) -> None:
        if peer.id < 2:
            rules = replace(self.relay, partner=place(1 - peer.id), identity=KEYS[peer.id])
            await rules(peer, peer.datagrams.open(SERVICE), self.until_s)
            return
        await self.others[peer.id - 2](peer)


def play(
    *others: Any, relay: Relay | None = None, nats: tuple[NatBox, ...] = (), until_s: float = 60.0
) -> Run:
    rules = relay or Relay(key_of=key_of, identity=KEYS[0])
    network = Network(len(others) + 2, links=Links(latency_s=0.03), nats=nats)
    return simulate(Scene(others, rules, until_s), network)


async def ask(socket: Any, what: Any) -> Any:
    await socket.send_to(packed(what), place(0))
    found = await socket.recv_from(socket.runtime.now() + 1.0)
    return None if found is None else unpacked(found[0])


async def reserve(socket: Any, peer: int, key: Identity) -> Any:
    told = await ask(socket, Reserve(peer, b"", b""))
    if not isinstance(told, Challenge):
        return told
    signature = key.sign(reservation_text(peer, told.nonce))
    return await ask(socket, Reserve(peer, told.nonce, signature))


def test_a_reservation_needs_the_key_of_its_name() -> None:
    heard: list[Any] = []

    async def owner(peer: Any) -> None:
        socket = peer.datagrams.open(7000)
        assert isinstance(await reserve(socket, 2, KEYS[2]), Reserved)
        # Renewing needs no key: it comes from where the key was shown.
        assert isinstance(await ask(socket, Reserve(2, b"", b"")), Reserved)
        heard.append(await socket.recv_from(40.0))

    async def thief(peer: Any) -> None:
        await peer.sleep_until(5.0)
        socket = peer.datagrams.open(7000)
        heard.append(await reserve(socket, 2, KEYS[3]))
        # A nonce of its own, signed for another name, and one that was never given.
        told = await ask(socket, Reserve(3, b"", b""))
        signature = KEYS[3].sign(reservation_text(3, told.nonce))
        heard.append(await ask(socket, Reserve(2, told.nonce, signature)))
        made_up = KEYS[3].sign(reservation_text(3, bytes(16)))
        heard.append(type(await ask(socket, Reserve(3, bytes(16), made_up))))
        heard.append(await reserve(socket, 99, KEYS[3]))
        assert isinstance(await reserve(socket, 3, KEYS[3]), Reserved)
        await peer.sleep_until(20.0)
        await socket.send_to(packed(Through(3, 2, b"to the owner", b"")), place(0))

    play(owner, thief)
    assert heard[:4] == [None, None, Challenge, None]
    assert unpacked(heard[4][0]).data == b"to the owner"


def test_a_signed_nonce_is_of_no_use_elsewhere_or_later() -> None:
    given: list[Reserve] = []
    answers: dict[str, Any] = {}

    def owner(number: int, use_s: float) -> Any:
        async def runs(peer: Any) -> None:
            socket = peer.datagrams.open(7000)
            told = await ask(socket, Reserve(number, b"", b""))
            signature = KEYS[number].sign(reservation_text(number, told.nonce))
            given.append(Reserve(number, told.nonce, signature))
            await peer.sleep_until(use_s)
            answers[f"after {use_s:g} s"] = type(await ask(socket, given[-1]))

        return runs

    async def copier(peer: Any) -> None:
        await peer.sleep_until(5.0)
        answers["elsewhere"] = type(await ask(peer.datagrams.open(7000), given[0]))

    play(owner(2, 45.0), copier, until_s=70.0)
    play(owner(2, 65.0), copier, until_s=70.0)
    assert answers == {
        "elsewhere": Challenge, "after 45 s": Reserved, "after 65 s": Challenge
    }  # fmt: skip


def test_tables_of_a_relay_are_bounded_and_let_go_what_has_expired() -> None:
    got: list[int] = []

    async def crowd(peer: Any) -> None:
        for start_s in (0.0, 30.0):
            await peer.sleep_until(start_s)
            sockets = [peer.datagrams.open() for _ in range(12)]
            answers = [await reserve(s, 100 + n, KEYS[2]) for n, s in enumerate(sockets)]
            got.append(sum(isinstance(answer, Reserved) for answer in answers))
            for socket in sockets:
                socket.close()

    relay = Relay(per_host=5, reservation_s=10.0)
    play(crowd, relay=relay)
    assert got == [5, 5]
    got.clear()
    play(crowd, relay=Relay(reservations=7, reservation_s=10.0))
    assert got == [7, 7]


@pytest.mark.parametrize(
    ("mapping", "filtering"),
    [(m, f) for m in (INDEPENDENT, ADDRESS, PORT) for f in (INDEPENDENT, ADDRESS, PORT)],
)
def test_mapping_and_filtering_are_found_out(mapping: str, filtering: str) -> None:
    found: list[Any] = []

    async def behind(peer: Any) -> None:
        traversal = Traversal(peer, place(0), place(1), identity=KEYS[2], key_of=key_of)
        async with peer.tasks() as group:
            group.start(traversal.run(20.0))
            assert await traversal.register()
            found.append((traversal.mapping, traversal.filtering, traversal.public))

    play(behind, nats=(NatBox((2,), mapping, filtering),))
    assert found == [(mapping, filtering, False)]


def test_a_port_that_the_box_gives_lets_everybody_in() -> None:
    found: list[Any] = []

    def behind(number: int) -> Any:
        async def runs(peer: Any) -> None:
            traversal = Traversal(peer, place(0), place(1), attempts=0)
            async with peer.tasks() as group:
                group.start(traversal.run(20.0))
                assert await traversal.register()
                found.append((peer.id, traversal.reachable, traversal.mapped is not None))
                await peer.sleep_until(8.0)
                if number:
                    path = await traversal.connect(PeerId(2))
                    found.append(path is not None and path.direct)

        return runs

    kinds = (NatBox.classic("symmetric", (2,), upnp=True), NatBox.classic("symmetric", (3,)))
    play(behind(0), behind(1), nats=kinds, relay=Relay())
    assert sorted(found[:2]) == [(2, True, True), (3, False, False)]
    assert found[2:] == [True]


def test_calls_and_punches_without_the_right_key_or_token_open_nothing() -> None:
    """Peer 3 has a reservation of its own, and knows all numbers; it lacks keys and tokens."""
    seen: list[Any] = []

    async def victim(peer: Any) -> None:
        traversal = Traversal(peer, place(0), place(1), identity=KEYS[2], key_of=key_of)
        async with peer.tasks() as group:
            group.start(traversal.run(40.0))
            assert await traversal.register()
            seen.append(traversal.seen[place(0)])
            await peer.sleep_until(10.0)
            path = await traversal.connect(PeerId(4))
            seen.append(path)
            seen.append(len(traversal._calls))

    async def liar(peer: Any) -> None:
        socket = peer.datagrams.open(7000)
        assert isinstance(await reserve(socket, 3, KEYS[3]), Reserved)
        await peer.sleep_until(10.0)
        for number in range(0, 30_000, 50):
            hello = packed(Hello(number, bytes(8)))
            # In another's name, in its own without a signature, and with that of other data.
            for source in (4, 3):
                await socket.send_to(packed(Through(source, 2, hello, bytes(64))), place(0))
            connect = packed(Connect(number, 0, False, True, True, *socket.local, bytes(8)))
            await socket.send_to(packed(Through(3, 2, connect, KEYS[3].sign(b"?"))), place(0))
            await socket.send_to(packed(Punch(4, number, False, True, bytes(8))), seen[0])
            await peer.sleep_until(peer.now() + 0.01)

    async def silent(peer: Any) -> None:
        await peer.sleep_until(30.0)

    run = play(victim, liar, silent, nats=(NatBox.classic("full cone", (2,)),))
    assert run.dropped.get("filtered", 0) == 0
    assert seen[1:] == [None, 1]


def test_one_peer_may_call_so_often_and_no_more() -> None:
    """Signed calls are bounded too: the tables do not grow with them."""
    counts: list[int] = []

    async def called(peer: Any) -> None:
        traversal = Traversal(peer, place(0), place(1), identity=KEYS[2], key_of=key_of)
        async with peer.tasks() as group:
            group.start(traversal.run(40.0))
            assert await traversal.register()
            await peer.sleep_until(15.0)
            counts.append(len(traversal._calls))
            await peer.sleep_until(38.0)

    async def caller(peer: Any) -> None:
        traversal = Traversal(peer, place(0), place(1), identity=KEYS[3], key_of=key_of)
        async with peer.tasks() as group:
            group.start(traversal.run(40.0))
            assert await traversal.register()
            await peer.sleep_until(10.0)
            for number in range(500):
                await traversal._through(2, Hello(number, bytes(8)))

    play(called, caller, relay=Relay(key_of=key_of, identity=KEYS[0], circuit_bytes=1 << 20))
    assert counts == [16]


def test_direct_paths_are_kept_alive_and_given_up_when_nobody_answers() -> None:
    found: dict[str, Any] = {}
    boxes = tuple(NatBox.classic("port-restricted", (p,), lifetime_s=20.0) for p in (2, 3))

    def side(until_s: float, call: bool) -> Any:
        async def runs(peer: Any) -> None:
            traversal = Traversal(peer, place(0), place(1), keepalive_s=5.0)
            async with peer.tasks() as group:
                group.start(traversal.run(until_s))
                group.start(traversal.keep_alive(until_s))
                assert await traversal.register()
                await peer.sleep_until(6.0)
                if call:
                    path = await traversal.connect(PeerId(3))
                    assert path is not None
                    assert path.direct
                    await peer.sleep_until(60.0)
                    found["after 50 s"] = traversal.path(PeerId(3)) == path.endpoint
                    await peer.sleep_until(119.0)
                    found["in the end"] = traversal.path(PeerId(3))

        return runs

    play(side(120.0, True), side(70.0, False), relay=Relay(), nats=boxes, until_s=121.0)
    assert found == {"after 50 s": True, "in the end": None}


def test_keys_without_an_identity_are_refused() -> None:
    with pytest.raises(UsageError, match="identity"):
        Relay(key_of=key_of)
