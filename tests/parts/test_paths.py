"""Messages to peers behind NAT boxes: lost without a path, through a relay, or straight."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest

from shoal.base.errors import DeadlineExceeded, PeerError, UsageError
from shoal.base.ids import PeerId
from shoal.engine.event import simulate
from shoal.engine.event.simulation import EventSettings
from shoal.kernel.datagrams import Endpoint
from shoal.kernel.paths import RelayLimits
from shoal.parts.overlay.relay import Relay
from shoal.parts.overlay.traversal import Path, Traversal
from shoal.wire.message import message
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.nat import CLASSIC, PUBLIC, NatBox
from shoal.world.network import Network
from shoal.world.record import Run

SERVICE = 3478
LATENCY_S = 0.03
KINDS = (PUBLIC, *CLASSIC)


@message
class Question:
    number: int
    filling: bytes


@message
class Reply:
    number: int


async def replies(envelope: Any) -> Reply:
    return Reply(envelope.message.number)


async def asked(peer: Any, to: int, number: int = 0, size: int = 10, wait_s: float = 1.0) -> float:
    """How long a question and its answer took; -1: nothing came."""
    began_s = peer.now()
    try:
        found = await peer.request(to, Question(number, bytes(size)), deadline=began_s + wait_s)
    except (DeadlineExceeded, PeerError):
        return -1.0
    assert found.number == number
    return peer.now() - began_s


@dataclass(frozen=True)
class Talk:
    """Peers 0 and 1 relay; peer 2 finds a path to peer 3 and asks it, and is asked by it."""

    attempts: int = 3
    limits: RelayLimits = field(default_factory=RelayLimits)
    until_s: float = 16.0
    then: Callable[[Any, Traversal, Path | None], Awaitable[None]] | None = None

    async def run(self, peer: Any) -> None:
        places = [Endpoint(f"198.18.0.{p}", SERVICE) for p in (0, 1)]
        peer.serve(Question, replies)
        if peer.id < 2:
            peer.paths.serve(self.limits)
            relay = Relay(partner=places[1 - peer.id])
            await relay(peer, peer.datagrams.open(SERVICE), self.until_s)
            return
        traversal = Traversal(peer, *places, attempts=self.attempts, messages=True)
        async with peer.tasks() as group:
            group.start(traversal.run(self.until_s))
            assert await traversal.register()
            await peer.sleep_until(5.0)
            other = 5 - peer.id
            if peer.id == 2:
                peer.record("before", await asked(peer, other))
                path = await traversal.connect(PeerId(other))
                assert path is not None
                peer.record("direct", path.direct)
                peer.record("messages", path.messages)
                peer.record("took", await asked(peer, other))
                if self.then is not None:
                    await self.then(peer, traversal, path)
            else:
                await peer.sleep_until(14.0)
                peer.record("took", await asked(peer, other))
                await peer.sleep_until(self.until_s)


def play(program: Talk, *kinds: str, faults: tuple = (), **settings: Any) -> Run:
    nats = tuple(
        NatBox.classic(kind, (2 + number,), messages=True)
        for number, kind in enumerate(kinds)
        if kind != PUBLIC
    )
    network = Network(4, links=Links(latency_s=LATENCY_S), nats=nats, faults=faults)
    return simulate(program, network, settings=EventSettings(**settings))


def values(run: Run, name: str, peer: int = 2) -> list[float]:
    return [row.value for row in run.series(name) if row.peer == peer]


@pytest.mark.parametrize("pair", list(product(KINDS, KINDS)))
def test_questions_are_answered_over_what_every_pair_of_kinds_can_open(
    pair: tuple[str, str],
) -> None:
    run = play(Talk(), *pair)
    straight = "symmetric" not in pair or not set(pair) <= {"symmetric", "port-restricted"}
    assert values(run, "direct") == values(run, "messages") == [float(straight)]
    # Before there is a path only who is public can be asked.
    assert (values(run, "before")[0] > 0) == (pair[1] == PUBLIC)
    hops = 1 if straight else 2
    for peer in (2, 3):
        assert values(run, "took", peer) == pytest.approx([2 * hops * LATENCY_S], abs=1e-6)
    assert bool(run.bytes_by_kind.get("Carried")) == (not straight)


@pytest.mark.parametrize("strict", [False, True])
def test_a_relay_keeps_to_its_limit_of_bytes_and_makes_up_after_a_pause(strict: bool) -> None:
    times: list[float] = []

    async def floods(peer: Any, traversal: Traversal, path: Path | None) -> None:
        times.extend([await asked(peer, 3, number, 1000, 0.5) for number in range(10)])
        await peer.sleep_until(40.0)
        times.append(await asked(peer, 3, 11))

    limits = RelayLimits(circuit_bytes=5000, circuit_s=10.0)
    run = play(Talk(0, limits, 50.0, floods), "symmetric", "symmetric", strict=strict)
    # The first question of the program and four of these fit, with their answers.
    assert [took > 0 for took in times] == [True] * 4 + [False] * 6 + [True]
    assert run.dropped["relay limit"] == 6
    assert run.bytes_by_kind["Carried"] > 2 * 4 * 1000


def test_a_relay_keeps_to_its_limit_of_time() -> None:
    times: list[float] = []

    async def waits(peer: Any, traversal: Traversal, path: Path | None) -> None:
        for at_s in (9.0, 13.0, 16.0):
            await peer.sleep_until(at_s)
            times.append(await asked(peer, 3))

    play(Talk(0, RelayLimits(circuit_s=3.0), 20.0, waits), "symmetric", "symmetric")
    assert [took > 0 for took in times] == [True, False, True]


def test_a_relay_has_so_many_places() -> None:
    with pytest.raises(AssertionError):
        play(Talk(0, RelayLimits(reservations=1), 20.0), "symmetric", "symmetric")


def test_a_crash_ends_paths_on_both_sides() -> None:
    times: list[float] = []

    async def again(peer: Any, traversal: Traversal, path: Path | None) -> None:
        times.append(peer.paths.direct(PeerId(3)))
        await peer.sleep_until(14.5)
        times.append(peer.paths.direct(PeerId(3)))
        # The relay has no reservation of the new incarnation either.
        times.append(await asked(peer, 3, wait_s=0.5))

    faults = (Crash(who=(3,), at=12.0, until=14.0),)
    run = play(Talk(until_s=40.0, then=again), "full cone", "restricted", faults=faults)
    assert times == [True, False, -1.0]
    assert run.dropped["relay limit"] == 1


def test_who_is_behind_the_same_box_needs_no_path_and_strangers_find_none() -> None:
    class Beside:
        async def run(self, peer: Any) -> None:
            peer.serve(Question, replies)
            if peer.id:
                peer.record("beside", await asked(peer, 3 - peer.id))
            else:
                peer.record("stranger", await asked(peer, 1))
            await peer.sleep_until(2.0)
            if peer.id == 1:
                peer.record("out", await asked(peer, 0))
            await peer.sleep_until(4.0)
            if not peer.id:
                # Answered on what the other one opened.
                peer.record("back", await asked(peer, 1))
            await peer.sleep_until(5.0)

    box = NatBox((1, 2), messages=True)
    run = simulate(Beside(), Network(3, links=Links(latency_s=0.01), nats=(box,)))
    assert [v > 0 for v in (*values(run, "beside", 1), *values(run, "beside", 2))] == [True, True]
    assert values(run, "stranger", 0) == [-1.0]
    assert values(run, "out", 1)[0] > 0
    assert values(run, "back", 0)[0] > 0
    assert run.dropped["no path"] == 1


def test_paths_make_sense_or_are_refused() -> None:
    class Wrong:
        async def run(self, peer: Any) -> None:
            for to, relay in ((peer.id, 7), (1 - peer.id, 1 - peer.id)):
                with pytest.raises(UsageError, match="two other peers"):
                    peer.paths.through(PeerId(to), PeerId(relay))
            with pytest.raises(UsageError, match="circuit_s=0"):
                RelayLimits(circuit_s=0)
            # Where nothing holds messages up, every path is there.
            assert await peer.paths.reserve(PeerId(1), deadline=1.0)

    simulate(Wrong(), Network(2))
