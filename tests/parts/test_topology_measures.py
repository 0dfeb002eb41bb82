"""Measures of graphs and mixing matrices against closed forms and other libraries."""

from __future__ import annotations

import math

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from shoal.base.errors import UsageError
from shoal.parts.topology.base import (
    average_path_length,
    check_mixing,
    components,
    metropolis_on_live_subgraph,
    spectral_gap,
)
from shoal.parts.topology.erdos_renyi import ErdosRenyi
from shoal.parts.topology.exponential import Exponential
from shoal.parts.topology.full import Full
from shoal.parts.topology.random_regular import RandomRegular
from shoal.parts.topology.ring import Ring
from shoal.parts.topology.star import Star
from shoal.parts.topology.torus import Torus


def gap_by_numpy(weights: torch.Tensor) -> float:
    moduli = np.sort(np.abs(np.linalg.eigvals(weights.to_dense().numpy())))
    return 1 - float(moduli[-2])


@pytest.mark.parametrize(
    "graph",
    [
        Ring(17),
        Exponential(24, directed=True),
        ErdosRenyi(40, p=0.3, mixing="uniform"),
        RandomRegular(600, degree=4),
        Exponential(600, directed=True),
        ErdosRenyi(600, mean_degree=10.0, mixing="uniform"),
    ],
)
def test_spectral_gap_against_all_eigenvalues(graph: Ring) -> None:
    assert spectral_gap(graph.weights()) == pytest.approx(gap_by_numpy(graph.weights()), abs=1e-8)


@pytest.mark.parametrize("peers", [513, 3000])
def test_spectral_gap_of_rings_where_iteration_stalls(peers: int) -> None:
    expected = 2 / 3 * (1 - math.cos(2 * math.pi / peers))
    assert spectral_gap(Ring(peers).weights()) == pytest.approx(expected, rel=1e-6)


def test_spectral_gap_of_a_long_line_and_a_large_star() -> None:
    line = Torus(1500, rows=1, wrap=False)
    expected = 2 / 3 * (1 - math.cos(math.pi / 1500))
    assert spectral_gap(line.weights()) == pytest.approx(expected, rel=1e-6)
    assert spectral_gap(Star(1000).weights()) == pytest.approx(1e-3, rel=1e-6)
    assert spectral_gap(Full(520).weights()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("peers", [6, 600])
def test_gap_is_zero_without_mixing(peers: int) -> None:
    assert spectral_gap(sparse.eye_array(peers)) == pytest.approx(0.0, abs=1e-9)
    swap = sparse.csr_array(np.roll(np.eye(peers), 1, axis=0))
    # A permutation is periodic: all its eigenvalues have modulus 1.
    assert spectral_gap(swap) == pytest.approx(0.0, abs=1e-9)
    half = peers // 2
    pairs = sparse.block_diag([np.full((half, half), 1 / half)] * 2)
    assert spectral_gap(pairs) == pytest.approx(0.0, abs=1e-9)


def test_a_bipartite_graph_without_own_weight_is_periodic() -> None:
    ring = np.roll(np.eye(600), 1, axis=0)
    assert spectral_gap(sparse.csr_array((ring + ring.T) / 2)) == pytest.approx(0.0, abs=1e-6)


def test_spectral_gap_takes_any_format() -> None:
    weights = Ring(9).weights()
    expected = spectral_gap(weights)
    dense = weights.to_dense()
    for form in (dense, dense.to_sparse(), dense.numpy(), sparse.coo_array(dense.numpy())):
        assert spectral_gap(form) == pytest.approx(expected, abs=1e-14)
    assert spectral_gap(torch.ones(1, 1)) == 1.0
    with pytest.raises(UsageError, match=r"need \[peers, peers\]"):
        spectral_gap(torch.ones(2, 3))


def test_check_mixing_names_the_check() -> None:
    sound = Ring(5).weights().to_dense()
    check_mixing(sound)

    def broken(*entries: tuple[int, int, float]) -> torch.Tensor:
        matrix = sound.clone()
        for i, j, value in entries:
            matrix[i, j] += value
        return matrix

    with pytest.raises(UsageError, match="not finite"):
        check_mixing(broken((0, 1, math.nan)))
    with pytest.raises(UsageError, match="negative entry"):
        check_mixing(broken((0, 2, -0.1), (0, 0, 0.1)))
    with pytest.raises(UsageError, match="not stochastic: row 3 sums to"):
        check_mixing(broken((3, 3, 0.1)))
    drifting = broken((0, 1, -0.1), (0, 0, 0.1))
    with pytest.raises(UsageError, match=r"not doubly stochastic: column [01]"):
        check_mixing(drifting)
    with pytest.raises(UsageError, match="not symmetric"):
        check_mixing(drifting, doubly_stochastic=False)
    check_mixing(drifting, doubly_stochastic=False, symmetric=False)
    one_way = Exponential(8, directed=True).weights()
    with pytest.raises(UsageError, match="not symmetric"):
        check_mixing(one_way)
    check_mixing(one_way, symmetric=False)
    with pytest.raises(UsageError, match="disconnected: 4 components"):
        check_mixing(torch.eye(4))
    check_mixing(torch.eye(4), connected=False)
    # One-way reach is not enough: peer 0 never hears peer 1.
    with pytest.raises(UsageError, match="disconnected: 2 components"):
        check_mixing(
            torch.tensor([[1.0, 0.0], [0.5, 0.5]]), symmetric=False, doubly_stochastic=False
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 14), st.floats(0.0, 0.5), st.integers(0, 10**6))
def test_components_and_paths_agree_with_networkx(peers: int, p: float, seed: int) -> None:
    graph = networkx.gnp_random_graph(peers, p, seed=seed)
    matrix = networkx.to_scipy_sparse_array(graph)
    labels = components(matrix).tolist()
    groups = {frozenset(i for i in range(peers) if labels[i] == k) for k in set(labels)}
    assert groups == {frozenset(c) for c in networkx.connected_components(graph)}
    first = [labels.index(k) for k in range(max(labels) + 1)]
    assert first == sorted(first)
    if len(groups) == 1:
        expected = networkx.average_shortest_path_length(graph) if peers > 1 else 0.0
        assert average_path_length(matrix) == pytest.approx(expected, rel=1e-12)
    else:
        assert average_path_length(matrix) == math.inf


def test_path_length_from_a_sample_of_sources() -> None:
    # All sources of a ring are alike, so any sample gives the mean of all.
    ring = Ring(301).adjacency()
    expected = (301 + 1) / 4
    assert average_path_length(ring) == pytest.approx(expected)
    assert average_path_length(ring, sample=3, seed=8) == pytest.approx(expected)
    star = Star(50).adjacency()
    assert average_path_length(star, sample=5, seed=1) in (
        pytest.approx(97 / 49),
        pytest.approx((4 * 97 + 49) / (5 * 49)),
    )


def live_weights(graph: networkx.Graph, alive: list[bool]) -> np.ndarray:
    peers = graph.number_of_nodes()
    inner = graph.subgraph([i for i in range(peers) if alive[i]])
    matrix = np.eye(peers)
    for i, j in inner.edges():
        weight = 1 / (1 + max(inner.degree(i), inner.degree(j)))
        matrix[i, j] = matrix[j, i] = weight
        matrix[i, i] -= weight
        matrix[j, j] -= weight
    return matrix


def as_matrix(sources: torch.Tensor, weights: torch.Tensor, own: torch.Tensor) -> np.ndarray:
    matrix = torch.diag(own)
    row, column = (sources >= 0).nonzero(as_tuple=True)
    matrix[row, sources[row, column]] += weights[row, column]
    assert (weights[sources < 0] == 0).all()
    return matrix.numpy()


def test_metropolis_on_the_living() -> None:
    topology = ErdosRenyi(20, p=0.3, seed=4)
    graph = networkx.from_scipy_sparse_array(topology.adjacency())
    sources, full_weights, full_own = topology.sources()
    generator = torch.Generator().manual_seed(5)
    alive = torch.rand(3, 4, 20, generator=generator) < 0.6
    alive[0, 0] = True
    alive[0, 1] = False
    weights, own = metropolis_on_live_subgraph(sources, alive)
    assert weights.shape == (3, 4, 20, sources.shape[1])
    assert torch.allclose(weights[0, 0], full_weights)
    assert torch.allclose(own[0, 0], full_own)
    assert (own[0, 1] == 1).all()
    for a in range(3):
        for b in range(4):
            found = as_matrix(sources, weights[a, b], own[a, b])
            expected = live_weights(graph, alive[a, b].tolist())
            np.testing.assert_allclose(found, expected, atol=1e-15)
            np.testing.assert_allclose(found.sum(0), 1.0, atol=1e-14)
            single, _ = metropolis_on_live_subgraph(sources, alive[a, b])
            assert torch.equal(single, weights[a, b])
