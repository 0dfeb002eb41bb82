"""Resistance, mixing constants and gossip rates against closed forms and a general optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from shoal.base.errors import UsageError
from shoal.parts.topology import _gossip_rates
from shoal.parts.topology._gossip_rates import gossip_edges, gossip_rates
from shoal.parts.topology._measures import effective_resistance, gossip_constants, laplacian
from shoal.parts.topology.exponential import Exponential
from shoal.parts.topology.from_edges import FromEdges
from shoal.parts.topology.full import Full
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.star import Star

BARBELL = list(networkx.barbell_graph(8, 0).edges())


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[float]]:
    """A connected graph (a random tree and some more edges) with positive rates."""
    peers = draw(st.integers(2, 9))
    edges = {(draw(st.integers(0, b - 1)), b) for b in range(1, peers)}
    pair = st.tuples(st.integers(0, peers - 1), st.integers(0, peers - 1))
    edges |= {(min(p), max(p)) for p in draw(st.lists(pair, max_size=8)) if p[0] != p[1]}
    rate = st.floats(0.05, 20.0)
    return peers, sorted(edges), [draw(rate) for _ in edges]


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_constants_follow_their_definitions(
    graph: tuple[int, list[tuple[int, int]], list[float]],
) -> None:
    peers, edges, rates = graph
    matrix = laplacian(peers, edges, rates)
    known = networkx.Graph()
    known.add_weighted_edges_from((a, b, r) for (a, b), r in zip(edges, rates, strict=True))
    expected = networkx.laplacian_matrix(known, nodelist=range(peers)).toarray()
    np.testing.assert_allclose(matrix, expected, rtol=1e-12, atol=1e-12)
    inverse = np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    steps = [np.eye(peers)[a] - np.eye(peers)[b] for a, b in edges]
    expected = [step @ inverse @ step for step in steps]
    found = effective_resistance(peers, edges, rates)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    # Foster's theorem.
    assert float(np.dot(rates, found)) == pytest.approx(peers - 1, rel=1e-9)
    chi_1, chi_2 = gossip_constants(peers, edges, rates)
    assert chi_1 == pytest.approx(1.0 / np.linalg.eigvalsh(matrix)[1], rel=1e-8)
    assert chi_2 == pytest.approx(found.max() / 2, rel=1e-12)
    assert chi_2 <= chi_1 * (1 + 1e-9)
    twice = gossip_constants(peers, edges, [2 * r for r in rates])
    assert twice == pytest.approx((chi_1 / 2, chi_2 / 2), rel=1e-9)


def test_resistance_of_networks_in_series_and_in_parallel() -> None:
    assert effective_resistance(4, [(0, 1), (1, 2), (2, 3)], [1, 2, 4], [(0, 3)])[
        0
    ] == pytest.approx(1 + 1 / 2 + 1 / 4)
    cycle = [(0, 1), (1, 2), (0, 2)]
    np.testing.assert_allclose(effective_resistance(3, cycle), 2 / 3)
    known = networkx.resistance_distance(networkx.Graph(BARBELL), 0, 15)
    assert effective_resistance(16, BARBELL, between=[(0, 15)])[0] == pytest.approx(known)


@pytest.mark.parametrize(
    ("topology", "chi_1", "chi_2"),
    [
        (Full(16), 7.5, 7.5),
        (Full(9), 4.0, 4.0),
        (Star(16), 15.0, 7.5),
        (Star(5, hub=3), 4.0, 2.0),
        (Ring(16), 16 / (2 - 2 * math.cos(math.pi / 8)), 7.5),
        (FromEdges(16, tuple(BARBELL)), 279.1812, 28.5),
    ],
)
def test_constants_of_equal_rates(topology: Full, chi_1: float, chi_2: float) -> None:
    edges = gossip_edges(topology)
    found = gossip_constants(topology.peers, edges)
    assert found == pytest.approx((chi_1, chi_2), rel=1e-6)
    equal = gossip_rates(topology.peers, edges)
    assert equal.chi_1 * equal.chi_2 == pytest.approx(0.5)
    assert equal.total == pytest.approx(math.sqrt(2 * chi_1 * chi_2), rel=1e-6)
    assert gossip_constants(topology.peers, equal.edges, equal.rates) == pytest.approx(
        (equal.chi_1, equal.chi_2)
    )
    assert len(set(equal.of().values())) == 1


def product(peers: int, edges: Sequence[tuple[int, int]], shares: np.ndarray) -> float:
    chi_1, chi_2 = gossip_constants(peers, edges, shares)
    return chi_1 * chi_2


def test_the_best_rates_of_a_barbell() -> None:
    equal, best = gossip_rates(16, BARBELL), gossip_rates(16, BARBELL, "optimal")
    assert best.total / math.sqrt(2) == pytest.approx(23.2807, rel=1e-4)
    assert best.total / equal.total <= 0.3
    rates = best.of()
    assert rates[7, 8] / best.total == pytest.approx(0.206, abs=0.01)
    # Over the three kinds of edges (bridge, at its ends, the others) a plain search does no better.
    kinds = [0 if e == (7, 8) else 1 if 7 in e or 8 in e else 2 for e in rates]
    counts = np.bincount(kinds)

    def of(logits: np.ndarray) -> float:
        weight = np.exp([0.0, *logits])
        shares = (weight / (weight @ counts))[kinds]
        return math.log(product(16, list(rates), shares))

    starts = ([0.0, 0.0], [-2.0, -4.0], [-1.0, -2.0])
    found = min(minimize(of, start, method="Nelder-Mead", tol=1e-9).fun for start in starts)
    assert best.total == pytest.approx(math.sqrt(2 * math.exp(found)), rel=1e-4)
    # Edges that a symmetry exchanges have equal rates.
    for kind in range(3):
        same = [rate for k, rate in zip(kinds, rates.values(), strict=True) if k == kind]
        assert max(same) - min(same) <= 1e-4 * max(same)


@given(graphs(), st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_no_other_shares_are_better(
    graph: tuple[int, list[tuple[int, int]], list[float]], seed: int
) -> None:
    peers, edges, rates = graph
    best = gossip_rates(peers, edges, "optimal")
    assert best.chi_1 * best.chi_2 == pytest.approx(0.5)
    assert best.total <= gossip_rates(peers, edges).total * (1 + 1e-6)
    least = product(peers, best.edges, best.rates / best.total)
    random = np.random.default_rng(seed)
    others = [np.array(rates), *random.dirichlet(np.ones(len(edges)), 30)]
    near = [best.rates * np.exp(0.05 * random.standard_normal(len(edges))) for _ in range(30)]
    for shares in others + near:
        shares = np.maximum(shares, 1e-9)
        assert product(peers, best.edges, shares / shares.sum()) >= least * (1 - 1e-5)


def test_graphs_whose_edges_are_alike_want_equal_rates() -> None:
    for topology in (Full(6), Ring(7), Star(6)):
        edges = gossip_edges(topology)
        best = gossip_rates(topology.peers, edges, "optimal")
        assert best.total == pytest.approx(gossip_rates(topology.peers, edges).total, rel=1e-5)
        np.testing.assert_allclose(best.rates, best.total / len(edges), rtol=1e-2)


def test_large_graphs_by_subgradients(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gossip_rates(16, BARBELL, "optimal")
    monkeypatch.setattr(_gossip_rates, "INTERIOR_EDGES", 10)
    rough = gossip_rates(16, BARBELL, "optimal")
    assert exact.total <= rough.total * (1 + 1e-6)
    assert rough.total <= 1.005 * exact.total


def test_one_peer_and_two() -> None:
    alone = gossip_rates(1, np.empty((0, 2), dtype=np.int64))
    assert (alone.total, alone.chi_1, alone.chi_2) == (0.0, 0.0, 0.0)
    pair = gossip_rates(2, [(1, 0)], "optimal")
    assert pair.of() == {(0, 1): pytest.approx(math.sqrt(0.5))}
    assert (pair.chi_1, pair.chi_2) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("peers", "edges", "rates", "words"),
    [
        (3, [(0, 1)], None, "leave 2 components"),
        (3, [(0, 1), (1, 2)], [1.0, 0.0], "leave 2 components"),
        (3, [(0, 1), (1, 2)], [1.0, -2.0], "rate -2.0; need a finite number >= 0"),
        (3, [(0, 1), (1, 2)], [1.0, math.nan], "rate nan"),
        (3, [(0, 1), (1, 2)], [1.0], "1 rates for 2 edges"),
        (3, [(0, 1), (1, 3)], None, r"edge \(1, 3\)"),
        (3, [(0, 1), (1, 1)], None, r"edge \(1, 1\)"),
    ],
)
def test_what_cannot_gossip_is_refused(
    peers: int, edges: list[tuple[int, int]], rates: list[float] | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        gossip_constants(peers, edges, rates)


def test_wrong_words_and_one_way_graphs_are_refused() -> None:
    with pytest.raises(UsageError, match="rates='best'"):
        gossip_rates(3, [(0, 1), (1, 2)], "best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave 2 components"):
        gossip_rates(3, [(0, 1)], "optimal")
    with pytest.raises(UsageError, match="pairs gossip both ways"):
        gossip_edges(Exponential(8, directed=True))
