"""Who reaches whom through NAT boxes: exactly what the tables predict."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest

from shoal.base import keyed
from shoal.base.ids import PeerId
from shoal.engine.event import simulate
from shoal.kernel.datagrams import Endpoint
from shoal.parts.overlay.relay import Relay
from shoal.parts.overlay.traversal import Traversal
from shoal.world.links import Links
from shoal.world.nat import CLASSIC, PUBLIC, NatBox, placed
from shoal.world.network import Network
from shoal.world.record import Run

KINDS = (PUBLIC, *CLASSIC)
PORT = 3478


def direct(one: str, other: str) -> bool:
    """Everything but symmetric with symmetric or port-restricted (Ford et al. 2005)."""
    return "symmetric" not in (one, other) or not {one, other} <= {"symmetric", "port-restricted"}


@dataclass(frozen=True)
class Meet:
    """The last two peers relay; `calls` are (caller, called), one after the other per caller."""

    calls: tuple[tuple[int, int], ...]
    until_s: float
    relay: Relay = field(default_factory=Relay)
    attempts: int = 3
    reversal: bool = True
    start_s: float = 5.0
    keepalive_s: float = 15.0

    async def run(self, peer: Any) -> None:
        places = [Endpoint(f"198.18.{p >> 8}.{p & 255}", PORT) for p in peer.roster[-2:]]
        if peer.id in peer.roster[-2:]:
            partner = places[0] if peer.id == peer.roster[-1] else places[1]
            relay = replace(self.relay, partner=partner)
            await relay(peer, peer.datagrams.open(PORT), self.until_s)
            return
        traversal = Traversal(
            peer,
            *places,
            attempts=self.attempts,
            reversal=self.reversal,
            keepalive_s=self.keepalive_s,
        )
        async with peer.tasks() as group:
            group.start(traversal.run(self.until_s))
            group.start(traversal.keep_alive(self.until_s))
            assert await traversal.register()
            peer.record("symmetric", traversal.symmetric)
            peer.record("reachable", traversal.reachable)
            await peer.sleep_until(self.start_s)
            for number, (caller, called) in enumerate(self.calls):
                if caller == peer.id:
                    path = await traversal.connect(PeerId(called))
                    kind = -1 if path is None else int(path.direct)
                    peer.record("path", kind, call=str(number))


def outcomes(run: Run) -> dict[int, int]:
    return {int(dict(row.labels)["call"]): int(row.value) for row in run.series("path")}


def test_every_pair_of_kinds_is_direct_or_relayed_as_predicted() -> None:
    pairs = list(product(KINDS, KINDS))
    nats = tuple(
        NatBox.classic(kind, who=(2 * number + side,))
        for number, pair in enumerate(pairs)
        for side, kind in enumerate(pair)
        if kind != PUBLIC
    )
    calls = tuple((2 * number, 2 * number + 1) for number in range(len(pairs)))
    network = Network(2 * len(pairs) + 2, links=Links(latency_s=0.03), nats=nats)
    run = simulate(Meet(calls, 16.0), network)
    assert outcomes(run) == {n: int(direct(*pair)) for n, pair in enumerate(pairs)}
    kinds = [kind for pair in pairs for kind in pair]
    assert {row.peer: bool(row.value) for row in run.series("symmetric")} == {
        peer: kind == "symmetric" for peer, kind in enumerate(kinds)
    }
    assert {row.peer: bool(row.value) for row in run.series("reachable")} == {
        peer: kind in (PUBLIC, "full cone") for peer, kind in enumerate(kinds)
    }


def lattica(pairs: int, **more: Any) -> tuple[list[tuple[str, str]], dict[int, int]]:
    """400 peers with exact quotas, random pairs."""
    quotas = {"full cone": 40, "restricted": 60, "port-restricted": 200, "symmetric": 100}
    nats = placed(quotas, seed=1)
    kind = {box.who[0]: box.name for box in nats}
    calls = []
    for number in range(pairs):
        one, other = (int(keyed.uniform(1, "pair", number, side) * (400 - side)) for side in (0, 1))
        calls.append((one, other + (other >= one)))
    most = max(sum(caller == peer for caller, _ in calls) for peer in range(400))
    links = Links(latency_s=0.03, latency_spread=0.5, seed=1)
    program = Meet(tuple(calls), 7.0 + 8.1 * most, **more)
    found = outcomes(simulate(program, Network(402, links=links, nats=nats)))
    return [(kind[a], kind[b]) for a, b in calls], found


@pytest.mark.parametrize("pairs", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_direct_rate_of_lattica_s_population(pairs: int) -> None:
    kinds, found = lattica(pairs)
    assert found == {number: int(direct(*pair)) for number, pair in enumerate(kinds)}
    if pairs == 2000:
        assert abs(sum(found.values()) / pairs - 0.6875) <= 0.03


@pytest.mark.parametrize(("reversal", "rate"), [(False, 0.10), (True, 0.19)])
def test_without_punching_only_full_cones_are_reached(reversal: bool, rate: float) -> None:
    kinds, found = lattica(2000, attempts=0, reversal=reversal)
    assert found == {
        number: int(called == "full cone" or (reversal and caller == "full cone"))
        for number, (caller, called) in enumerate(kinds)
    }
    # Two thousand draws at 0.19 have a spread of 0.009.
    assert abs(sum(found.values()) / len(found) - rate) <= 0.03


def test_a_relay_keeps_to_its_limits() -> None:
    nats = (NatBox.classic("symmetric", (0,)), NatBox.classic("symmetric", (1,)))
    calls = ((0, 1),) * 12
    network = Network(4, links=Links(latency_s=0.03), nats=nats)
    run = simulate(Meet(calls, 110.0, Relay(circuit_bytes=4000)), network)
    found = outcomes(run)
    assert found[0] == 0
    assert found[11] == -1
    assert run.series("relay_refused")


@pytest.mark.parametrize(("keepalive_s", "reached"), [(15.0, 1), (1000.0, -1)])
def test_a_reservation_outlives_its_mapping_only_if_it_is_kept_alive(
    keepalive_s: float, reached: int
) -> None:
    """Without keepalive the relay's datagrams reach no mapping any more."""
    nats = tuple(NatBox.classic("port-restricted", (peer,), lifetime_s=20.0) for peer in (0, 1))
    network = Network(4, links=Links(latency_s=0.03), nats=nats)
    program = Meet(((0, 1),), 120.0, start_s=100.0, keepalive_s=keepalive_s)
    assert outcomes(simulate(program, network)) == {0: reached}


def test_most_pairs_still_meet_when_every_tenth_datagram_is_lost() -> None:
    """Three attempts of three punches each: one lost datagram costs an attempt at most."""
    peers = 100
    nats = tuple(NatBox.classic("port-restricted", (peer,)) for peer in range(peers))
    calls = tuple((peer, peer + 1) for peer in range(0, peers, 2))
    network = Network(peers + 2, links=Links(latency_s=0.03, loss=0.1, seed=5), nats=nats)
    found = outcomes(simulate(Meet(calls, 20.0), network))
    # Three messages over two hops each: an attempt works with 0.9^6 = 0.53, one of three with 0.90,
    # which is 45 of 50 with a spread of 2.1.
    assert list(found.values()).count(1) >= 40
    assert -1 not in found.values()
