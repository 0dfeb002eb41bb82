"""Measures of graphs and mixing matrices: connectedness, path length, spectral gap, resistance,
soundness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigvals, eigvalsh, inv
from scipy.sparse import csgraph
from scipy.sparse.linalg import ArpackError, LinearOperator, eigs, eigsh
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.tensor import keyed as stacked
from shoal.tensor.types import Index, Mask, Weight

Matrix = Tensor | sparse.sparray | np.ndarray
"""A square matrix in any of the usual forms; `Topology.weights()` is one."""

Edges = Sequence[tuple[int, int]] | NDArray[np.int64]
"""Undirected pairs of peers, each once: [edges, 2]."""
Numbers = Sequence[float] | NDArray[np.float64]

_DENSE_PEERS = 512
"""Up to here all eigenvalues at once are faster than an iteration for the largest few."""


def as_csr(matrix: Matrix) -> sparse.csr_array:
    """Any square matrix as a scipy CSR array of float64.

    >>> as_csr(torch.eye(2)).nnz
    2
    """
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().cpu()
        if matrix.layout == torch.sparse_csr:
            parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
            shape = (matrix.shape[0], matrix.shape[1])
            matrix = sparse.csr_array(tuple(part.numpy() for part in parts), shape=shape)
        else:
            matrix = (matrix.to_dense() if matrix.layout != torch.strided else matrix).numpy()
    csr = sparse.csr_array(matrix, dtype=np.float64)
    if csr.shape[0] != csr.shape[1]:
        raise UsageError(f"mixing matrix has shape {csr.shape}; need [peers, peers]")
    return csr


def components(matrix: Matrix) -> Index:
    """The component of each peer, int64 [peers], numbered from 0 by their lowest peer.

    Two peers share a component when news can travel both ways between them (strong components);
    entries that are not zero count as edges.

    >>> components(torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    tensor([0, 0, 1])
    """
    _, labels = csgraph.connected_components(as_csr(matrix), connection="strong")
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return torch.from_numpy(rank[inverse].astype(np.int64))


def average_path_length(matrix: Matrix, sample: int | None = None, seed: int = 0) -> float:
    """Mean number of hops over ordered pairs of distinct peers; inf when some pair has no path.

    With `sample`, over all targets of that many sources drawn by key: all pairs of 10,000 peers
    take minutes.

    >>> average_path_length(torch.ones(5, 5))
    1.0
    """
    graph = as_csr(matrix)
    peers = graph.shape[0]
    if peers < 2:
        return 0.0
    origins = np.arange(peers)
    if sample is not None and sample < peers:
        key = stacked.key_of(seed, "path")
        draws = stacked.uniform(key, torch.arange(peers, device=key.device))
        origins = torch.argsort(draws, stable=True)[:sample].sort().values.numpy()
    total = 0.0
    for start in range(0, len(origins), 256):
        part = origins[start : start + 256]
        total += csgraph.shortest_path(graph, unweighted=True, indices=part).sum()
    return float(total / (len(origins) * (peers - 1)))


def spectral_gap(weights: Matrix) -> float:
    """1 - |lambda_2|: how fast repeated mixing forgets differences; 1 = at once, 0 = never.

    weights: row-stochastic [peers, peers], symmetric or not. lambda_2 is the eigenvalue of second
    largest modulus; a disconnected or periodic graph has gap 0. For matrices that change from round
    to round the gap of one of them says nothing.

    >>> round(spectral_gap(torch.tensor([[0.75, 0.25], [0.25, 0.75]])), 12)
    0.5
    """
    matrix = as_csr(weights)
    peers = matrix.shape[0]
    if peers < 2:
        return 1.0
    symmetric = abs(matrix - matrix.T).max() <= 1e-12
    if peers <= _DENSE_PEERS:
        # Rows sum to 1, so taking 1/n from every entry turns the eigenvalue 1 of the constant
        # vector into 0 and keeps all others (Wielandt's deflation).
        deflated = matrix.toarray() - 1.0 / peers
        spectrum = eigvalsh(deflated) if symmetric else eigvals(deflated)
        second = float(np.abs(spectrum).max())
    else:
        second = _second_modulus(matrix, symmetric)
    return min(1.0, max(0.0, 1.0 - second))


def _second_modulus(matrix: sparse.csr_array, symmetric: bool) -> float:
    peers = matrix.shape[0]
    start = np.array([keyed.uniform(0, "lanczos", i) - 0.5 for i in range(peers)])
    start -= start.mean()

    def deflated(x: np.ndarray) -> np.ndarray:
        return matrix @ x - x.mean(axis=0)

    if np.linalg.norm(deflated(start)) <= 1e-12 * np.linalg.norm(start):
        return 0.0  # a full graph; the iteration cannot start from a null vector
    operator = LinearOperator(matrix.shape, matvec=deflated, dtype=np.float64)
    solve = eigsh if symmetric else eigs
    try:
        found = solve(
            operator, k=1, which="LM", v0=start, ncv=64, maxiter=40, return_eigenvectors=False
        )
        return float(np.abs(found).max())
    except ArpackError:
        return _second_modulus_near_one(matrix, start, solve)


def _second_modulus_near_one(
    matrix: sparse.csr_array, start: np.ndarray, solve: Callable[..., Any]
) -> float:
    # Graphs like large rings crowd their eigenvalues at 1, where iteration stalls; their few edges
    # make a factorisation cheap instead. By Gershgorin all eigenvalues lie in the disc that touches
    # the unit circle at 1 and reaches to 2 min(diagonal) - 1 on the other side, so one of second
    # largest modulus is near 1 or, if the diagonal allows it, near that other end.
    def nearest(shift: float, count: int) -> np.ndarray:
        found = solve(
            matrix.tocsc(), k=count, sigma=shift, v0=start + 1.0, return_eigenvectors=False
        )
        return np.sort(np.abs(found))[::-1]

    second = nearest(1.0 + 1e-6, 6)[1]  # the first is the eigenvalue 1 of the constant vector
    if 2.0 * matrix.diagonal().min() - 1.0 <= -second:
        second = max(second, nearest(-1.0 - 1e-6, 1)[0])
    return float(second)


def check_mixing(
    weights: Matrix,
    *,
    symmetric: bool = True,
    doubly_stochastic: bool = True,
    connected: bool = True,
    tolerance: float = 1e-9,
) -> None:
    """Raise UsageError with the first check that a mixing matrix fails.

    In order: finite, not negative, row sums 1, column sums 1, symmetric, connected.

    >>> check_mixing(torch.full((3, 3), 1 / 3, dtype=torch.float64))
    """
    matrix = as_csr(weights)
    if not np.isfinite(matrix.data).all():
        raise UsageError("mixing matrix: not finite (an entry is nan or inf)")
    if matrix.nnz and matrix.data.min() < 0.0:
        raise UsageError(f"mixing matrix: negative entry {matrix.data.min()} (need all >= 0)")
    sums = [("row", 1, "not stochastic")]
    if doubly_stochastic:
        sums.append(("column", 0, "not doubly stochastic"))
    for name, axis, failure in sums:
        total = np.asarray(matrix.sum(axis=axis)).ravel()
        worst = int(np.abs(total - 1.0).argmax())
        if abs(total[worst] - 1.0) > tolerance:
            raise UsageError(
                f"mixing matrix: {failure}: {name} {worst} sums to {total[worst]} (need 1)"
            )
    if symmetric:
        difference = abs(matrix - matrix.T).max()
        if difference > tolerance:
            raise UsageError(
                f"mixing matrix: not symmetric: entries (i, j) and (j, i) differ by {difference}"
            )
    if connected:
        count = int(components(matrix).max()) + 1
        if count > 1:
            raise UsageError(
                f"mixing matrix: disconnected: {count} components (add edges, or mix over rounds)"
            )


def metropolis_on_live_subgraph(sources: Index, alive: Mask) -> tuple[Weight, Weight]:
    """Metropolis weights of the peers that are there, so that they keep their own mean.

    sources: int64 [peers, k] padded with -1, of an undirected graph; alive: bool [..., peers].
    Result: weights float64 [..., peers, k] and own [..., peers]; a dead peer keeps its own value.
    Degrees are counted among the living, so this equals building the graph without the dead. Breaks
    (columns no longer sum to 1) when a peer hears one that does not hear it.
    Source: Xiao, Boyd and Kim 2007, section 2.2, on the induced subgraph.

    >>> line = torch.tensor([[1, -1], [0, 2], [1, -1]])
    >>> weights, own = metropolis_on_live_subgraph(line, torch.tensor([True, True, False]))
    >>> weights[1].tolist(), own.tolist()
    ([0.5, 0.0], [0.5, 0.5, 1.0])
    """
    index = sources.clamp_min(0)
    both = (sources >= 0) & alive.unsqueeze(-1) & alive[..., index]
    degree = both.sum(-1)
    larger = torch.maximum(degree.unsqueeze(-1), degree[..., index])
    weights = both.to(torch.float64) / (1.0 + larger)
    return weights, 1.0 - weights.sum(-1)


def laplacian(peers: int, edges: Edges, rates: Numbers | None = None) -> NDArray[np.float64]:
    """The weighted Laplacian of an undirected graph, float64 [peers, peers].

    edges: int [edges, 2], each pair once; rates: one number per edge, None = 1 each. Entry (i, i)
    is the sum of the rates at peer i, entry (i, j) minus that of the edge. Raises UsageError for
    edges that leave the peers, loops, and rates that are negative, not finite or of another number.

    >>> laplacian(3, [(0, 1), (1, 2)], [2.0, 3.0]).tolist()
    [[2.0, -2.0, 0.0], [-2.0, 5.0, -3.0], [0.0, -3.0, 3.0]]
    """
    pairs, weight = _weighted(peers, edges, rates)
    found = np.zeros((peers, peers))
    first, second = pairs.T
    for a, b, sign in (
        (first, first, 1.0), (second, second, 1.0), (first, second, -1.0), (second, first, -1.0)
    ):  # fmt: skip
        np.add.at(found, (a, b), sign * weight)
    return found


def effective_resistance(
    peers: int, edges: Edges, rates: Numbers | None = None, between: Edges | None = None
) -> NDArray[np.float64]:
    """What pairs of peers resist when every edge conducts its rate: float64 [pairs].

    between: pairs of peers, None = the edges themselves, of which the rates times the resistances
    then sum to peers - 1 (Foster 1949). Dense, O(peers^3). Raises UsageError when the graph is
    disconnected, since then some pair resists without bound.

    >>> effective_resistance(3, [(0, 1), (1, 2)], between=[(0, 2)]).tolist()
    [2.0]
    """
    pairs, _ = _weighted(peers, edges, rates)
    targets = pairs if between is None else _weighted(peers, between, None)[0]
    matrix = laplacian(peers, edges, rates)
    _algebraic_connectivity(matrix)
    # With the constant vector lifted out of the kernel the inverse exists, and differences of
    # entries do not see what was added.
    inverse = inv(matrix + np.trace(matrix) / peers**2)
    a, b = targets.T
    return inverse[a, a] + inverse[b, b] - 2.0 * inverse[a, b]


def gossip_constants(peers: int, edges: Edges, rates: Numbers | None = None) -> tuple[float, float]:
    """(chi_1, chi_2) of pairwise gossip whose edge e happens `rates[e]` times per unit of time.

    chi_1 = 1 / lambda_2 of the Laplacian: the time in which differences shrink by e; chi_2: half
    of the largest effective resistance of an edge. chi_2 <= chi_1; both scale as 1 / rates. Without
    rates the edges share one event per unit of time equally. Raises UsageError when the graph is
    disconnected. Source: Nabli and Oyallon 2023 (arXiv 2208.00779); Even et al. 2021, without the
    half (arXiv 2106.07644).

    >>> chi_1, chi_2 = gossip_constants(4, [(0, 1), (0, 2), (0, 3)])
    >>> round(chi_1, 12), round(chi_2, 12)
    (3.0, 1.5)
    """
    pairs, _ = _weighted(peers, edges, rates)
    if rates is None:
        rates = np.full(len(pairs), 1.0 / max(1, len(pairs)))
    if peers == 1:
        return 0.0, 0.0
    second = _algebraic_connectivity(laplacian(peers, edges, rates))
    return 1.0 / second, float(effective_resistance(peers, edges, rates).max()) / 2.0


def _algebraic_connectivity(matrix: NDArray[np.float64]) -> float:
    """lambda_2 of a Laplacian, positive."""
    peers = len(matrix)
    if peers < 2:
        return 1.0
    second = float(eigvalsh(matrix, subset_by_index=[1, 1])[0])
    if second <= 1e-12 * max(np.trace(matrix), 1e-300):
        count = int(components(np.abs(matrix)).max()) + 1
        raise UsageError(
            f"gossip: the edges with a rate leave {count} components (add edges, or raise rates)"
        )
    return second


def _weighted(
    peers: int, edges: Edges, rates: Numbers | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    pairs = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    outside = (pairs < 0) | (pairs >= peers)
    if outside.any() or (pairs[:, 0] == pairs[:, 1]).any():
        bad = pairs[outside.any(1) | (pairs[:, 0] == pairs[:, 1])][0]
        raise UsageError(
            f"gossip: edge {tuple(bad.tolist())}; need two different peers from 0 to {peers - 1}"
        )
    weight = np.ones(len(pairs)) if rates is None else np.asarray(rates, dtype=np.float64)
    if weight.shape != (len(pairs),):
        raise UsageError(f"gossip: {weight.size} rates for {len(pairs)} edges; need one each")
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        wrong = weight[~(np.isfinite(weight) & (weight >= 0))][0]
        raise UsageError(f"gossip: rate {wrong}; need a finite number >= 0")
    return pairs, weight
