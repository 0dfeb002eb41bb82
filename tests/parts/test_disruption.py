"""Roles and disruptions: explicit, repeatable, at the right places."""

from __future__ import annotations

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.disruption.base import by_betweenness, by_degree
from shoal.parts.disruption.battery import Battery
from shoal.parts.disruption.removal import Removal
from shoal.parts.disruption.roles import Roles
from shoal.parts.topology.barabasi_albert import BarabasiAlbert
from shoal.parts.topology.base import components
from shoal.parts.topology.geometric import Geometric
from shoal.parts.topology.ring import Ring
from shoal.world.faults import Round

GRAPH = BarabasiAlbert(30, attach=2, seed=4)


@given(st.integers(3, 60), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_barabasi_albert_edges(peers: int, attach: int, seed: int) -> None:
    attach = min(attach, peers - 1)
    graph = BarabasiAlbert(peers, attach=attach, seed=seed)
    degrees = [len(graph.neighbors(p)) for p in range(peers)]
    assert sum(degrees) == 2 * (peers - attach) * attach
    assert int(components(graph.adjacency()).max()) == 0


def test_the_graph_of_the_reproduction_has_96_edges() -> None:
    graph = BarabasiAlbert(50, attach=2)
    assert sum(len(graph.neighbors(p)) for p in range(50)) == 2 * 96


def test_central_peers_go_first() -> None:
    degree = {p: len(GRAPH.neighbors(p)) for p in range(30)}
    gone = Removal(by="degree", count=5).chosen(GRAPH, seed=1)
    assert min(degree[p] for p in gone) >= max(degree[p] for p in degree if p not in gone)
    drawn = networkx.Graph((p, q) for p in degree for q in GRAPH.neighbors(p))
    between = networkx.betweenness_centrality(drawn)
    gone = Removal(by="betweenness", count=5).chosen(GRAPH, seed=1)
    assert min(between[p] for p in gone) >= max(between[p] for p in between if p not in gone)
    assert sorted(by_degree(GRAPH, 0)) == sorted(by_betweenness(GRAPH, 0)) == list(range(30))


@given(st.integers(0, 50), st.floats(0.1, 0.6))
@settings(max_examples=20, deadline=None)
def test_draws_are_repeatable_and_stay_in_their_pool(seed: int, share: float) -> None:
    holders = Roles(0.7).assign(GRAPH, seed)
    assert len(holders) == 21
    for by in ("random", "holders"):
        removal = Removal(at_round=3, by=by, share=share)
        gone = removal.chosen(GRAPH, seed, holders)
        assert gone == removal.chosen(GRAPH, seed, holders)
        assert len(gone) == int(share * 30 + 0.5)
        assert by == "random" or set(gone) <= set(holders)
        (fault,) = removal.faults(GRAPH, seed, holders)
        assert (fault.who, fault.at, fault.until) == (gone, Round(3), None)
    relays = Removal(by="relays", count=3).chosen(GRAPH, seed, holders)
    assert not set(relays) & set(holders)


def test_disc() -> None:
    graph = Geometric(30, radius=0.4, seed=1)
    gone = Removal(by="within", center=(0.2, 0.2), radius=0.3).chosen(graph, seed=0)
    distance = [((x - 0.2) ** 2 + (y - 0.2) ** 2) ** 0.5 for x, y in graph.positions().tolist()]
    assert list(gone) == [p for p, d in enumerate(distance) if d <= 0.3]
    assert Removal(by="within", center=(9.0, 9.0), radius=0.1).faults(graph, 0) == ()


def test_roles() -> None:
    assert set(Roles(0.1, "hub").assign(GRAPH, 1)) == set(by_degree(GRAPH, 1)[:3])
    assert set(Roles(0.1, "leaf").assign(GRAPH, 1)) == set(by_degree(GRAPH, 1)[-3:])
    forced = Roles(0.5).assign(GRAPH, 1, include=(0, 1), exclude=(2, 3))
    assert {0, 1} <= set(forced)
    assert not {2, 3} & set(forced)
    assert len(forced) == 15


def test_lifetimes_are_exponential() -> None:
    graph = Ring(4000)
    battery = Battery(mean_rounds=20.0, rounds=40)
    lives = battery.lifetimes(graph, seed=3)
    # floor of an exponential, plus 1: geometric with mean 1 / (1 - exp(-1/20)) = 20.5
    assert sum(lives) / len(lives) == pytest.approx(20.5, rel=0.06)
    died = {p for fault in battery.faults(graph, seed=3) for p in fault.who}
    assert died == {p for p, end in enumerate(lives) if end < 40}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Removal(by="degree"), "give one of them"),
        (lambda: Removal(by="degree", share=1.5), "up to 1"),
        (lambda: Removal(by="nearest", count=1), "need one of random"),  # type: ignore[arg-type]
        (lambda: Removal(at_round=-1, count=1), "at_round=-1"),
        (lambda: Removal(by="within"), "radius"),
        (lambda: Removal(count=30).chosen(GRAPH, 0), "all 30 peers would disappear"),
        (
            lambda: Removal(by="named", who=(1, 2, 3)).chosen(GRAPH, 0, holders=(1, 2)),
            "all 2 peers with data",
        ),
        (lambda: Removal(by="relays", count=1).chosen(GRAPH, 0), "needs to know who holds data"),
        (lambda: Removal(by="within", radius=1).chosen(GRAPH, 0), "needs positions"),
        (lambda: Removal(by="named", who=(99,)).chosen(GRAPH, 0), "peers from 0 to 29"),
        (lambda: Roles(0.0), "holders=0.0"),
        (lambda: Roles(0.1).assign(GRAPH, 0, include=range(9)), "must hold data"),
        (lambda: Roles(1.0).assign(GRAPH, 0, exclude=(1,)), "exclude fewer"),
        (lambda: Battery(mean_rounds=0, rounds=3), "mean_rounds=0"),
    ],
)
def test_errors(make: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()  # type: ignore[operator]


def test_everybody_may_go_when_asked() -> None:
    assert len(Removal(count=30, everybody=True).chosen(GRAPH, 0)) == 30
