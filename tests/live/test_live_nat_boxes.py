"""Every pair of NAT kinds over real UDP sockets: what the model predicts is what happens."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from nat_boxes import Behind, Box, boxes
from traversal_programs import Cross, outcomes

from shoal.engine.event import simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.world.links import Links
from shoal.world.nat import BEHAVIOURS, CLASSIC, PUBLIC, NatBox
from shoal.world.network import Network
from shoal.world.record import Run

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="needs the whole of 127.0.0.0/8"),
]

KINDS = (PUBLIC, *CLASSIC)
RELAYS = ("127.9.0.1", "127.9.0.2")
Box_ = NatBox | None


@dataclass(frozen=True)
class Boxed:
    """A program whose peers are behind these boxes, or behind none."""

    program: Any
    behind: dict[int, Box]

    async def run(self, peer: Any) -> None:
        box = self.behind.get(peer.id)
        await self.program.run(peer if box is None else Behind(peer, box))


def pairs_of(
    pairs: list[tuple[Box_, Box_]], turns: tuple[tuple[tuple[int, int], ...], ...]
) -> tuple[Run, Run]:
    """The same program on real sockets and on the virtual network, boxes by peer from 2 on."""
    kinds = [box for pair in pairs for box in pair]
    nats = [box for box in kinds if box is not None]
    made = {p: Box(None, host) for p, host in enumerate(RELAYS)}
    for number, box in enumerate(kinds):
        if box is not None:
            made[2 + number] = Box(box, f"127.9.{1 + number // 250}.{1 + number % 250}")
    program = Cross(RELAYS, turns, messages=False, begin_s=5.0, slot_s=4.5)
    size = Network(2 + len(kinds))
    with boxes(*made.values()):
        live = run_live(Boxed(program, made), size, settings=LiveSettings(horizon_s=60.0))
    model = replace(program, hosts=("198.18.0.0", "198.18.0.1"))
    network = Network(size.peers, links=Links(latency_s=0.001), nats=tuple(nats))
    return live, simulate(model, network)


def classic(kind: str, peer: int) -> Box_:
    return None if kind == PUBLIC else NatBox.classic(kind, (peer,))


def test_every_pair_of_classic_kinds_meets_as_predicted() -> None:
    names = list(product(KINDS, KINDS))
    pairs = [(classic(a, 2 + 2 * n), classic(b, 3 + 2 * n)) for n, (a, b) in enumerate(names)]
    calls = tuple((2 + 2 * n, 3 + 2 * n) for n in range(len(names)))
    live, model = pairs_of(pairs, (calls,))
    expected = outcomes(model)
    hard = {"symmetric", "port-restricted"}
    for number, pair in enumerate(names):
        straight = "symmetric" not in pair or not set(pair) <= hard
        caller, called = calls[number]
        assert expected["path", caller, str(called)] == straight, pair
    assert outcomes(live) == expected


def test_all_nine_behaviours_are_found_out() -> None:
    kinds = list(product(BEHAVIOURS, BEHAVIOURS))
    nats = [NatBox((2 + number,), *kind) for number, kind in enumerate(kinds)]
    live, model = pairs_of(_in_pairs(nats), ())
    assert outcomes(live) == outcomes(model)
    for number, (_, filtering) in enumerate(kinds):
        assert outcomes(model)[f"filtering {filtering}", 2 + number, ""] == 1


def _in_pairs(nats: list[NatBox]) -> list[tuple[Box_, Box_]]:
    padded: list[Box_] = [*nats, *[None] * (len(nats) % 2)]
    return list(zip(padded[::2], padded[1::2], strict=True))


@pytest.mark.parametrize("hairpin", [False, True])
def test_peers_behind_one_box_meet_by_outer_endpoints_only_with_hairpin(hairpin: bool) -> None:
    shared = NatBox.classic("full cone", (2, 3), hairpin=hairpin)
    made = {p: Box(None, host) for p, host in enumerate(RELAYS)}
    box = Box(shared, "127.9.1.1")
    program = Cross(RELAYS, (((2, 3),),), messages=False, begin_s=5.0, slot_s=5.0)
    behind = {**made, 2: box, 3: box}
    with boxes(*made.values(), box):
        live = run_live(Boxed(program, behind), Network(4), settings=LiveSettings(horizon_s=60.0))
    model = replace(program, hosts=("198.18.0.0", "198.18.0.1"))
    run = simulate(model, Network(4, links=Links(latency_s=0.001), nats=(shared,)))
    assert outcomes(run)["path", 2, "3"] == hairpin
    assert outcomes(live) == outcomes(run)
