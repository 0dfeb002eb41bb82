"""Exchanges: who hears whom, who takes part, and that the mean is kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.exchange.first_come import FirstCome
from shoal.parts.exchange.gossip import Gossip
from shoal.parts.exchange.isolated import Isolated
from shoal.parts.exchange.star import Star
from shoal.parts.topology.erdos_renyi import ErdosRenyi
from shoal.parts.topology.exponential import Exponential
from shoal.parts.topology.random_regular import RandomRegular
from shoal.parts.topology.ring import Ring
from shoal.rounds.exchange import Hop

TOPOLOGIES = (
    Ring(7), Ring(1), Exponential(8, one_peer=True), RandomRegular(10, degree=3, changing=True),
    ErdosRenyi(12, p=0.4, mixing="uniform"),
)  # fmt: skip


def exchanges() -> list[Any]:
    found = []
    for name in names("exchange"):
        kind = find("exchange", name)
        needs = "topology" in {field.name for field in dataclasses.fields(kind)}
        for example in kind.examples:
            found += [kind(t, **example) for t in TOPOLOGIES] if needs else [kind(**example)]
    return found


def as_matrix(hop: Hop) -> torch.Tensor:
    assert hop.weights is not None
    assert hop.own is not None
    matrix = torch.diag(hop.own)
    row, column = (hop.sources >= 0).nonzero(as_tuple=True)
    matrix[row, hop.sources[row, column]] += hop.weights[row, column]
    return matrix


@pytest.mark.parametrize("exchange", exchanges(), ids=str)
def test_contract(exchange: Any) -> None:
    assert hash(exchange) == hash(dataclasses.replace(exchange))
    peers = exchange.peers
    for round in range(4):
        active = exchange.active(round, seed=5)
        assert active.shape == (peers,)
        assert active.dtype == torch.bool
        assert torch.equal(active, dataclasses.replace(exchange).active(round, seed=5))
        hops = exchange.hops(round, seed=5)
        assert len(hops) >= 1
        for hop in hops:
            check_hop(hop, active, exchange.hub)


def check_hop(hop: Hop, active: torch.Tensor, hub: int | None) -> None:
    peers = len(active)
    sources = hop.sources
    receivers = torch.arange(peers) if hop.receivers is None else hop.receivers
    assert receivers.tolist() == (list(range(peers)) if hub is None else [hub])
    assert sources.dtype == receivers.dtype == torch.int64
    assert sources.shape[0] == len(receivers)
    assert ((sources >= -1) & (sources < peers)).all()
    assert not (sources == receivers.unsqueeze(-1)).any()
    if hop.taken is not None:
        assert hop.taken.dtype == torch.bool
        assert hop.taken.shape == sources.shape
        # Padding can't be waited for, and a receiver that waits for nobody hears nobody.
        assert not (hop.taken & (sources < 0)).any()
        assert (hop.taken.any(-1) == (sources >= 0).any(-1)).all()
    for receiver, row in zip(receivers.tolist(), sources.tolist(), strict=True):
        heard = [source for source in row if source >= 0]
        assert len(heard) == len(set(heard))
        # Nobody waits for a peer that does not take part.
        assert all(active[source] for source in heard)
        if hub is None:
            assert active[receiver] or not heard
        else:
            assert heard == [i for i in active.nonzero().flatten().tolist() if i != hub]
    assert (hop.weights is None) == (hop.own is None)
    if hop.weights is not None and hop.own is not None:
        assert hop.weights.shape == sources.shape
        assert hop.own.shape == receivers.shape
        assert (hop.weights >= 0).all()
        assert (hop.weights[sources < 0] == 0).all()
        total = hop.weights.sum(-1) + hop.own
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)


@pytest.mark.parametrize("faulty", [(), (0, 5)])
def test_first_come_takes_all_but_the_last_and_the_faulty_first(faulty: tuple[int, ...]) -> None:
    exchange = FirstCome(7, byzantine=2, faulty=faulty)
    seen = set()
    for round in range(20):
        (hop,) = exchange.hops(round, seed=3)
        assert hop.taken is not None
        # n - f vectors with one's own among them.
        assert (hop.taken.sum(-1) == 7 - 2 - 1).all()
        for peer in faulty:
            assert hop.taken[hop.sources == peer].all()
        seen.add(tuple(hop.taken.flatten().tolist()))
    assert len(seen) == 20
    assert FirstCome(5).hops(0, seed=3)[0].taken is None


def test_gossip_is_the_topology() -> None:
    topology = ErdosRenyi(12, p=0.4)
    gossip = Gossip(topology)
    assert gossip.hub is None
    assert gossip.peers == 12
    (hop,) = gossip.hops(3, seed=1)
    assert torch.equal(as_matrix(hop), topology.weights().to_dense())
    (bare,) = Gossip(topology, weighted=False).hops(3, seed=1)
    assert torch.equal(bare.sources, hop.sources)
    assert bare.weights is None
    assert bare.own is None


def test_steps_walk_through_a_changing_graph() -> None:
    topology = RandomRegular(10, degree=3, changing=True)
    hops = Gossip(topology, steps=3).hops(2, seed=0)
    assert len(hops) == 3
    for q, hop in enumerate(hops):
        assert torch.equal(hop.sources, topology.sources(6 + q)[0])


@pytest.mark.parametrize("peers", [4, 16, 64])
def test_enough_steps_of_a_one_peer_graph_average_exactly(peers: int) -> None:
    gossip = Gossip(Exponential(peers, one_peer=True), steps=int(math.log2(peers)))
    for round in (0, 1, 5):
        product = torch.eye(peers, dtype=torch.float64)
        for hop in gossip.hops(round, seed=0):
            product = as_matrix(hop) @ product
        torch.testing.assert_close(product, torch.full_like(product, 1 / peers), rtol=0, atol=1e-15)


def test_partial_participation_keeps_the_mean_and_silences_the_absent() -> None:
    gossip = Gossip(ErdosRenyi(30, p=0.3), participation=0.6)
    seen = set()
    for round in range(6):
        active = gossip.active(round, seed=2)
        seen.add(tuple(active.tolist()))
        (hop,) = gossip.hops(round, seed=2)
        matrix = as_matrix(hop)
        torch.testing.assert_close(matrix.sum(0), torch.ones(30, dtype=torch.float64))
        torch.testing.assert_close(matrix, matrix.T)
        absent = ~active
        assert torch.equal(matrix[absent], torch.eye(30, dtype=torch.float64)[absent])
    assert len(seen) == 6


def test_participation_rate_and_seed() -> None:
    gossip = Gossip(Ring(400), participation=0.3)
    draws = torch.stack([gossip.active(round, seed=4) for round in range(50)]).double()
    # 20,000 draws: five standard deviations are 0.016.
    assert abs(draws.mean().item() - 0.3) < 0.016
    assert not torch.equal(gossip.active(0, seed=4), gossip.active(0, seed=5))
    assert not torch.equal(gossip.hops(0, seed=4)[0].sources, gossip.hops(0, seed=5)[0].sources)


def test_star_draws_uniformly_without_replacement() -> None:
    star = Star(10, hub=3, sample=4)
    rounds = torch.stack([star.active(round, seed=1) for round in range(1200)]).double()
    assert (rounds.sum(-1) == 4).all()
    # Each peer is in with probability 0.4, each pair with 4 * 3 / (10 * 9); five deviations.
    assert (rounds.mean(0) - 0.4).abs().max() < 5 * math.sqrt(0.24 / 1200)
    together = rounds.T @ rounds / 1200
    off = together[~torch.eye(10, dtype=torch.bool)]
    p = 12 / 90
    assert (off - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 1200)


def test_star_keeps_its_width_and_leaves_weights_open() -> None:
    star = Star(10, hub=3, sample=4)
    drawn_hub = set()
    for round in range(30):
        (hop,) = star.hops(round, seed=1)
        assert hop.sources.shape == (1, 4)
        assert hop.weights is None
        drawn_hub.add(bool(star.active(round, seed=1)[3]))
    assert drawn_hub == {True, False}


@pytest.mark.parametrize("exchange", [Star(10), Isolated(4), Gossip(Ring(5))], ids=str)
def test_a_wave_that_never_changes_is_made_once(exchange: Any) -> None:
    (first,), (later,) = exchange.hops(0, seed=1), exchange.hops(7, seed=2)
    assert first.same(later)


def test_a_pure_server_never_works() -> None:
    star = Star(5, hub=1, hub_works=False)
    assert star.active(0, seed=0).tolist() == [True, False, True, True, True]
    sampled = Star(5, hub=1, sample=4, hub_works=False)
    for round in range(5):
        assert torch.equal(sampled.active(round, seed=0), star.active(0, seed=0))
    assert sampled.hub == 1


def test_isolated_hears_nobody() -> None:
    (hop,) = Isolated(3).hops(0, seed=0)
    assert hop.sources.shape == (3, 0)
    assert torch.equal(as_matrix(hop), torch.eye(3, dtype=torch.float64))
    assert Isolated(3).hub is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gossip(Ring(4), steps=0), "steps=0"),
        (lambda: Gossip(Ring(4), participation=0.0), "participation=0.0"),
        (lambda: Gossip(Ring(4), participation=math.nan), "participation=nan"),
        (lambda: Gossip(Ring(4), participation=1.5), "participation=1.5"),
        (lambda: Star(0), "peers=0"),
        (lambda: Star(3, hub=3), "hub=3"),
        (lambda: Star(3, sample=0), "sample=0"),
        (lambda: Star(3, sample=4), "sample=4 of 3 clients"),
        (lambda: Star(3, sample=3, hub_works=False), "sample=3 of 2 clients"),
        (lambda: Star(1, hub_works=False), "need a client"),
        (lambda: Isolated(0), "peers=0"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
