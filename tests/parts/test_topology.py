"""Topologies: the contract for every one found, closed forms, and wrong settings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.topology.barabasi_albert import BarabasiAlbert
from shoal.parts.topology.base import GraphTopology, components, spectral_gap
from shoal.parts.topology.erdos_renyi import ErdosRenyi
from shoal.parts.topology.exponential import Exponential
from shoal.parts.topology.from_edges import FromEdges
from shoal.parts.topology.full import Full
from shoal.parts.topology.geometric import Geometric
from shoal.parts.topology.random_regular import RandomRegular
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.small_world import SmallWorld
from shoal.parts.topology.star import Star
from shoal.parts.topology.torus import Torus
from shoal.testing.topology import check_topology

EXAMPLES = [
    pytest.param(find("topology", name), example, id=f"{name}-{i}")
    for name in names("topology")
    for i, example in enumerate(find("topology", name).examples)
]


def dense(topology: GraphTopology, round: int = 0) -> np.ndarray:
    return topology.weights(round).to_dense().numpy()


def edges_of(topology: GraphTopology, round: int = 0) -> set[tuple[int, int]]:
    return {(i, j) for i in range(topology.peers) for j in topology.neighbors(i, round)}


@pytest.mark.parametrize(("kind", "example"), EXAMPLES)
def test_contract(kind: type[Any], example: dict[str, Any]) -> None:
    check_topology(kind(**example))


@pytest.mark.parametrize(("kind", "example"), EXAMPLES)
def test_settings_survive_json(kind: type[Any], example: dict[str, Any]) -> None:
    topology = kind(**example)
    again = kind(**json.loads(json.dumps(dataclasses.asdict(topology))))
    assert again == topology
    assert hash(again) == hash(topology)


def test_every_topology_is_enrolled() -> None:
    assert len(names("topology")) >= 11
    assert all(find("topology", name).examples for name in names("topology"))


@dataclasses.dataclass(frozen=True)
class Broken(GraphTopology):
    """A ring of six with one fault, to see that the suite finds it."""

    fault: str
    peers: int = 6
    mixing: str = "metropolis"

    def arcs(self, period: int) -> np.ndarray:
        if self.fault == "disconnected":
            return np.array([(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)])
        if self.fault == "one-way":
            return np.array([(i, (i + d) % 6) for i in range(6) for d in (1, 2)])
        arcs = Ring(6).arcs(0)
        if self.fault == "unrepeatable":
            return arcs[torch.randperm(len(arcs)).numpy()]
        return arcs

    def neighbors(self, peer: int, round: int = 0) -> tuple[int, ...]:
        told = super().neighbors(peer, round)
        return told[:1] if self.fault == "neighbors" and peer == 3 else told

    def sources(self, round: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        sources, weights, own = (part.clone() for part in super().sources(round))
        if self.fault == "sum":
            own[2] += 1e-6
        if self.fault == "padding":
            sources[:] = torch.where(sources == 5, -2, sources)
        if self.fault == "drifts" and round == 2:
            sources = sources.flip(-1)
        return sources, weights, own

    def weights(self, round: int = 0) -> Tensor:
        return super().weights(round) * 1.0 if self.fault != "weights" else Full(6).weights()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("neighbors", r"neighbors\(3\)"),
        ("sum", "do not sum to 1"),
        ("padding", "padding is not -1"),
        ("weights", "differs from sources"),
        ("disconnected", "disconnected: 3 components"),
        ("one-way", "not symmetric"),
        ("drifts", "does not declare time_varying"),
        ("unrepeatable", "another graph each time"),
    ],
)
def test_suite_names_the_broken_rule(fault: str, message: str) -> None:
    with pytest.raises((AssertionError, UsageError), match=message):
        check_topology(Broken(fault))


def test_suite_accepts_the_sound_one() -> None:
    check_topology(Broken("none"))


def test_suite_checks_columns() -> None:
    @dataclasses.dataclass(frozen=True)
    class Promises(GraphTopology):
        peers: int = 4
        mixing: str = "uniform"
        doubly_stochastic: bool = True

        def arcs(self, period: int) -> np.ndarray:
            return Star(4).arcs(0)

    with pytest.raises(UsageError, match="not doubly stochastic: column 0"):
        check_topology(Promises())


@pytest.mark.parametrize("peers", [3, 4, 9, 30])
def test_ring_spectrum(peers: int) -> None:
    angles = 2 * np.pi * np.arange(peers) / peers
    expected = np.sort(1 / 3 + 2 / 3 * np.cos(angles))
    np.testing.assert_allclose(
        np.sort(np.linalg.eigvalsh(dense(Ring(peers)))), expected, atol=1e-12
    )
    assert edges_of(Ring(peers)) == {(i, j % peers) for i in range(peers) for j in (i - 1, i + 1)}


def test_torus_spectrum_and_shapes() -> None:
    rows, columns = 5, 7
    a = np.cos(2 * np.pi * np.arange(rows) / rows)[:, None]
    b = np.cos(2 * np.pi * np.arange(columns) / columns)[None, :]
    expected = np.sort(((1 + 2 * a + 2 * b) / 5).ravel())
    found = np.sort(np.linalg.eigvalsh(dense(Torus(35))))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert Torus(36).shape == (6, 6)
    assert Torus(12).shape == (3, 4)
    assert Torus(13).shape == (1, 13)
    assert edges_of(Torus(13)) == edges_of(Ring(13))
    assert Torus(12, rows=4).shape == (4, 3)
    # A grid keeps its corners at two neighbours, its borders at three.
    degrees = sorted(len(Torus(12, wrap=False).neighbors(i)) for i in range(12))
    assert degrees == [2] * 4 + [3] * 6 + [4] * 2


def test_exponential_of_32() -> None:
    graph = Exponential(32)
    assert {len(graph.neighbors(i)) for i in range(32)} == {9}
    sources, weights, own = graph.sources()
    assert torch.allclose(weights, torch.full_like(weights, 0.1))
    assert torch.allclose(own, torch.full_like(own, 0.1))
    assert sources.shape == (32, 9)
    assert spectral_gap(graph.weights()) == pytest.approx(0.4, abs=1e-12)


def test_directed_exponential_of_32() -> None:
    graph = Exponential(32, directed=True)
    assert graph.neighbors(30) == (0, 2, 6, 14, 31)
    sources, weights, _ = graph.sources()
    assert set(sources[0].tolist()) == {31, 30, 28, 24, 16}
    assert torch.allclose(weights, torch.full_like(weights, 1 / 6))
    assert spectral_gap(graph.weights()) == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize("peers", [2, 4, 8, 32, 128])
def test_one_peer_exponential_averages_exactly(peers: int) -> None:
    graph = Exponential(peers, one_peer=True)
    x = torch.randn(peers, 3, generator=torch.Generator().manual_seed(peers), dtype=torch.float64)
    mixed = x
    for round in range(int(math.log2(peers))):
        assert all(len(graph.neighbors(i, round)) == 1 for i in range(peers))
        mixed = graph.weights(round) @ mixed
    torch.testing.assert_close(mixed, x.mean(0).expand_as(x), rtol=0, atol=1e-14)


def test_one_peer_exponential_of_11_only_contracts() -> None:
    graph = Exponential(11, one_peer=True)
    product = np.eye(11)
    for round in range(4):
        product = dense(graph, round) @ product
    spread = np.linalg.norm(product - 1 / 11, 2)
    assert 1e-3 < spread < 0.7
    np.testing.assert_allclose(product.sum(0), 1.0, atol=1e-14)


@pytest.mark.parametrize("peers", [2, 5, 40])
def test_full_averages_in_one_round(peers: int) -> None:
    np.testing.assert_allclose(dense(Full(peers)), 1 / peers, atol=1e-15)
    assert spectral_gap(Full(peers).weights()) == pytest.approx(1.0, abs=1e-12)
    assert Full(peers).neighbors(1) == tuple(j for j in range(peers) if j != 1)


def test_star_gap() -> None:
    assert spectral_gap(Star(10).weights()) == pytest.approx(0.1, abs=1e-12)
    uniform = dense(Star(5, hub=2, mixing="uniform"))
    np.testing.assert_allclose(uniform[2], 0.2)
    np.testing.assert_allclose(uniform[0], [0.5, 0, 0.5, 0, 0])


@pytest.mark.parametrize(("peers", "attach"), [(10, 1), (50, 3), (200, 7), (8, 7)])
def test_barabasi_albert_edges(peers: int, attach: int) -> None:
    graph = BarabasiAlbert(peers, attach, seed=3)
    assert len(edges_of(graph)) == 2 * (peers - attach) * attach
    assert int(components(graph.adjacency()).max()) == 0


def test_erdos_renyi_edges_follow_p() -> None:
    counts = [len(edges_of(ErdosRenyi(40, p=0.3, seed=seed))) / 2 for seed in range(12)]
    pairs = 40 * 39 / 2
    tolerance = 4 * math.sqrt(pairs * 0.3 * 0.7 / len(counts))
    assert abs(np.mean(counts) - 0.3 * pairs) < tolerance
    assert ErdosRenyi(41, mean_degree=8.0).p_edge == 0.2


def test_random_graphs_are_drawn_again_until_connected() -> None:
    # At the threshold about 1/e of all draws is connected, so ten seeds need further attempts.
    p = math.log(60) / 60
    for seed in range(10):
        assert int(components(ErdosRenyi(60, p=p, seed=seed).adjacency()).max()) == 0


def test_geometric_edges_are_those_within_the_radius() -> None:
    graph = Geometric(40, radius=0.3, seed=5)
    place = graph.positions()
    assert ((place >= 0) & (place < 1)).all()
    distance = (place[:, None] - place[None]).square().sum(-1).sqrt()
    expected = (distance <= 0.3) & ~torch.eye(40, dtype=torch.bool)
    assert torch.equal(torch.from_numpy(graph.adjacency().toarray()), expected)


def test_random_regular_degrees_seeds_and_rounds() -> None:
    fixed = RandomRegular(50, degree=4, seed=1)
    assert {len(fixed.neighbors(i)) for i in range(50)} == {4}
    assert edges_of(fixed) == edges_of(fixed, 3)
    assert edges_of(fixed) != edges_of(RandomRegular(50, degree=4, seed=2))
    changing = RandomRegular(50, degree=4, seed=1, changing=True)
    rounds = [edges_of(changing, round) for round in range(4)]
    assert all(rounds[i] != rounds[j] for i in range(4) for j in range(i))
    assert rounds[2] == edges_of(changing, 2)
    assert {len(changing.neighbors(i, 3)) for i in range(50)} == {4}


def test_random_regular_is_an_expander() -> None:
    # Friedman 2008: the second eigenvalue of the adjacency is near 2 sqrt(d - 1).
    gap = spectral_gap(RandomRegular(2000, degree=8, seed=4).weights())
    best = 1 - (1 + 2 * math.sqrt(7)) / 9
    assert best - 0.02 < gap < best + 0.05


def test_random_regular_of_degree_two_is_one_circle() -> None:
    graph = RandomRegular(101, degree=2, seed=9)
    seen, here = [0], graph.neighbors(0)[0]
    while here != 0:
        seen.append(here)
        here = next(j for j in graph.neighbors(here) if j != seen[-2] or len(seen) < 2)
    assert sorted(seen) == list(range(101))
    assert seen != sorted(seen)


def test_small_world_rewires() -> None:
    lattice = edges_of(SmallWorld(40, degree=4, rewire=0.0))
    assert lattice == {(i, (i + d) % 40) for i in range(40) for d in (-2, -1, 1, 2)}
    moved = [
        len(lattice - edges_of(SmallWorld(40, degree=4, rewire=0.2, seed=s))) for s in range(9)
    ]
    assert 0.1 < np.mean(moved) / len(lattice) < 0.3


def reference_weights(graph: networkx.Graph, mixing: str) -> np.ndarray:
    peers = graph.number_of_nodes()
    matrix = np.zeros((peers, peers))
    most = max((d for _, d in graph.degree()), default=0)
    for i in range(peers):
        for j in graph.neighbors(i):
            degrees = (graph.degree(i), graph.degree(j))
            bound = {"metropolis": max(degrees), "uniform": degrees[0], "max_degree": most}[mixing]
            matrix[i, j] = 1 / (1 + bound)
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(["metropolis", "uniform", "max_degree"]))
def test_weights_of_any_connected_graph(data: st.DataObject, mixing: str) -> None:
    peers = data.draw(st.integers(1, 12))
    # A random tree and some more edges.
    graph = networkx.empty_graph(peers)
    for i in range(1, peers):
        graph.add_edge(i, data.draw(st.integers(0, i - 1)))
    pair = st.tuples(st.integers(0, peers - 1), st.integers(0, peers - 1))
    graph.add_edges_from((a, b) for a, b in data.draw(st.lists(pair, max_size=20)) if a != b)
    topology = FromEdges.of(graph, mixing=mixing)
    check_topology(topology, rounds=2)
    np.testing.assert_allclose(dense(topology), reference_weights(graph, mixing), atol=1e-15)
    assert edges_of(topology) == {e for a, b in graph.edges() for e in ((a, b), (b, a))}


def test_from_edges_of_takes_any_nodes() -> None:
    graph = networkx.Graph([("x", "y"), ("y", "z"), ("z", "z")])
    assert FromEdges.of(graph).neighbors(1) == (0, 2)


WRONG = [
    (Ring, {"peers": 0}, "peers=0"),
    (Torus, {"peers": 12, "rows": 5}, "does not divide"),
    (Torus, {"peers": 12, "mixing": "fastest"}, "mixing='fastest'"),
    (RandomRegular, {"peers": 5, "degree": 5}, "degree < peers"),
    (RandomRegular, {"peers": 5, "degree": 3}, "is odd"),
    (RandomRegular, {"peers": 4, "degree": 1}, "cannot connect"),
    (ErdosRenyi, {"peers": 5}, "exactly one"),
    (ErdosRenyi, {"peers": 5, "p": 0.5, "mean_degree": 2.0}, "exactly one"),
    (ErdosRenyi, {"peers": 5, "p": 1.5}, "0 to 1"),
    (ErdosRenyi, {"peers": 5, "p": math.nan}, "0 to 1"),
    (ErdosRenyi, {"peers": 5, "mean_degree": 4.5}, "at most peers - 1"),
    (ErdosRenyi, {"peers": 5, "p": 0.0}, "cannot connect"),
    (BarabasiAlbert, {"peers": 3, "attach": 3}, "attach < peers"),
    (SmallWorld, {"peers": 9, "degree": 3}, "even number"),
    (SmallWorld, {"peers": 4, "degree": 4}, "even number"),
    (SmallWorld, {"peers": 9, "rewire": -0.1}, "rewire=-0.1"),
    (Star, {"peers": 3, "hub": 3}, "hub=3"),
    (Geometric, {"peers": 3, "radius": 0.0}, "radius=0.0"),
    (FromEdges, {"peers": 3, "edges": ((0, 1), (1, 3))}, "leaves the peers"),
    (FromEdges, {"peers": 3, "edges": ((0, 1), (1, 1), (1, 2))}, "is a loop"),
    (FromEdges, {"peers": 3, "edges": ((0, 1), (1, 2), (1, 0))}, "given twice"),
    (FromEdges, {"peers": 4, "edges": ((0, 1), (2, 3))}, "2 components"),
]


@pytest.mark.parametrize(("kind", "wrong", "message"), WRONG)
def test_wrong_settings(kind: type[Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**wrong)


@pytest.mark.parametrize("graph", [ErdosRenyi(200, p=0.005), Geometric(200, radius=0.02)])
def test_a_graph_too_thin_to_connect_says_so(graph: GraphTopology) -> None:
    with pytest.raises(UsageError, match="connected graphs become typical at"):
        graph.neighbors(0)


@pytest.mark.parametrize("graph", [Ring(4), Full(4)])
@pytest.mark.parametrize("peer", [-1, 4])
def test_neighbors_of_nobody(graph: GraphTopology, peer: int) -> None:
    with pytest.raises(UsageError, match="no peer"):
        graph.neighbors(peer)


def test_static_graphs_are_built_once() -> None:
    graph = RandomRegular(20, degree=4, seed=77)
    assert graph.sources(0)[0] is graph.sources(9)[0]
    assert graph.weights(0) is RandomRegular(20, degree=4, seed=77).weights(5)


def test_ten_thousand_peers_build_quickly() -> None:
    graph = RandomRegular(10_000, degree=8, seed=123)
    start = time.process_time()
    graph.sources()
    graph.weights()
    told = [graph.neighbors(i) for i in range(10_000)]
    assert time.process_time() - start < 2.0
    assert {len(row) for row in told} == {8}


def test_same_graph_in_another_process() -> None:
    program = (
        "from shoal.parts import find, names\n"
        "for name in names('topology'):\n"
        "    for example in find('topology', name).examples:\n"
        "        print(find('topology', name)(**example).sources(1)[0].tolist())\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "4242"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    here = [
        str(find("topology", name)(**example).sources(1)[0].tolist())
        for name in names("topology")
        for example in find("topology", name).examples
    ]
    assert out.stdout.splitlines() == here


def test_one_target_is_one_and_comes_round() -> None:
    turns = find("topology", "one_target")(7, choice="turns")
    for round in range(6):
        assert [turns.neighbors(i, round) for i in range(7)] == [
            ((i + 1 + round) % 7,) for i in range(7)
        ]
    assert turns.neighbors(3, 6) == turns.neighbors(3, 0)
    heard = {source for round in range(6) for source in turns.sources(round)[0][2].tolist()}
    assert heard == set(range(7)) - {2}
    ring = find("topology", "one_target")(5, choice="ring")
    assert [ring.neighbors(i, 9) for i in range(5)] == [(1,), (2,), (3,), (4,), (0,)]


def test_one_random_target_is_uniform_and_keyed() -> None:
    drawn = find("topology", "one_target")(6, seed=4)
    targets = np.array([[drawn.neighbors(i, r) for i in range(6)] for r in range(400)])[..., 0]
    assert (targets != np.arange(6)).all()
    for peer in range(6):
        counts = np.delete(np.bincount(targets[:, peer], minlength=6), peer)
        assert counts.min() > 50
    other = find("topology", "one_target")(6, seed=5)
    assert any(drawn.neighbors(i, 0) != other.neighbors(i, 0) for i in range(6))
    with pytest.raises(UsageError, match="choice='both'"):
        find("topology", "one_target")(6, choice="both")
