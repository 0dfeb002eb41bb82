"""The contract of a topology, for the library's own and for yours.

    def test_my_topology():
        check_topology(MyTopology(peers=20))

A class may declare `doubly_stochastic = False`, `symmetric = False` or `time_varying = True`
(attributes or properties); whatever it does not declare away is checked.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from shoal.parts.topology.base import GraphTopology, as_csr, check_mixing, spectral_gap
from shoal.world.topology import Topology


def check_topology(topology: Topology, rounds: int = 3) -> None:
    """Raise AssertionError (or UsageError from `check_mixing`) where the contract is broken.

    Checks, in each of the first `rounds` rounds: shapes and types, padding, `neighbors` against
    `sources`, `weights` against `sources`, row sums, column sums, symmetry, connectedness, spectral
    gap in (0, 1]; that a fixed topology stays fixed; that an equal topology gives equal graphs.

    >>> from shoal.parts import find
    >>> check_topology(find("topology", "ring")(8))
    """
    name = repr(topology)
    time_varying = getattr(topology, "time_varying", False)
    hash(topology)
    _require(topology.peers >= 1, f"{name}: peers={topology.peers}")
    for round in range(rounds):
        label = f"{name}, round {round}"
        sources, weights, own = topology.sources(round)
        _check_sources(label, topology.peers, sources, weights, own)
        _check_neighbors(label, topology, round, sources)
        _check_weights(label, topology, round)
        if round and not time_varying:
            pairs = zip(topology.sources(round), topology.sources(0), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
            _require(same, f"{label}: differs from round 0 but does not declare time_varying")
    _check_repeatable(name, topology, rounds)


def _require(condition: bool, failure: str) -> None:
    # Not `assert`: the suite is for users too, and must hold under python -O.
    if not condition:
        raise AssertionError(failure)


def _check_sources(label: str, peers: int, sources: Tensor, weights: Tensor, own: Tensor) -> None:
    degree = sources.shape[-1]
    _require(sources.dtype == torch.int64, f"{label}: sources are {sources.dtype}, not int64")
    _require(sources.shape == (peers, degree), f"{label}: sources have shape {sources.shape}")
    _require(weights.shape == sources.shape, f"{label}: weights have shape {weights.shape}")
    _require(own.shape == (peers,), f"{label}: own has shape {own.shape}")
    for part in (weights, own):
        _require(part.dtype == torch.float64, f"{label}: weights are {part.dtype}, not float64")
        _require(bool((part >= 0).all()), f"{label}: a weight is negative or nan")
    padding = sources < 0
    _require(bool((sources[padding] == -1).all()), f"{label}: padding is not -1")
    _require(bool((sources < peers).all()), f"{label}: a source is no peer")
    _require(bool((weights[padding] == 0).all()), f"{label}: padding has weight")
    _require(bool((weights[~padding] > 0).all()), f"{label}: a source has no weight")
    itself = torch.arange(peers, device=sources.device).unsqueeze(-1)
    _require(not bool((sources == itself).any()), f"{label}: a peer is its own source")
    ordered = sources.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _require(not bool(repeated.any()), f"{label}: a source is listed twice")
    total = weights.sum(-1) + own
    _require(
        torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12),
        f"{label}: weights and own of a row do not sum to 1",
    )


def _check_neighbors(label: str, topology: Topology, round: int, sources: Tensor) -> None:
    heard_by: list[list[int]] = [[] for _ in range(topology.peers)]
    for receiver, row in enumerate(sources.tolist()):
        for source in row:
            if source >= 0:
                heard_by[source].append(receiver)
    for peer, expected in enumerate(heard_by):
        told = topology.neighbors(peer, round)
        _require(isinstance(told, tuple), f"{label}: neighbors({peer}) is no tuple")
        _require(
            told == tuple(expected),
            f"{label}: neighbors({peer}) is {told}, but sources say {tuple(expected)}",
        )


def _check_weights(label: str, topology: Topology, round: int) -> None:
    sources, weights, own = topology.sources(round)
    matrix = topology.weights(round)
    _require(matrix.layout == torch.sparse_csr, f"{label}: weights() is {matrix.layout}, not CSR")
    _require(matrix.dtype == torch.float64, f"{label}: weights() is {matrix.dtype}, not float64")
    csr = as_csr(matrix)
    dense = np.zeros((topology.peers, topology.peers))
    np.fill_diagonal(dense, own.numpy())
    row, column = (sources >= 0).nonzero(as_tuple=True)
    dense[row.numpy(), sources[row, column].numpy()] = weights[row, column].numpy()
    _require(np.array_equal(csr.toarray(), dense), f"{label}: weights() differs from sources()")
    time_varying = getattr(topology, "time_varying", False)
    check_mixing(
        matrix,
        symmetric=getattr(topology, "symmetric", True),
        doubly_stochastic=getattr(topology, "doubly_stochastic", True),
        connected=not time_varying,
    )
    if not time_varying:
        gap = spectral_gap(matrix)
        _require(0.0 < gap <= 1.0, f"{label}: spectral gap is {gap}, not in (0, 1]")


def _check_repeatable(name: str, topology: Topology, rounds: int) -> None:
    twin = copy.deepcopy(topology)
    _require(twin == topology, f"{name}: a copy is not equal to it (is it a frozen dataclass?)")
    _require(hash(twin) == hash(topology), f"{name}: a copy has another hash")
    for round in range(rounds):
        pairs = zip(twin.sources(round), topology.sources(round), strict=True)
        _require(all(torch.equal(a, b) for a, b in pairs), f"{name}: a copy has another graph")
        # The graphs of equal settings are cached, so ask for the edges themselves as well.
        if isinstance(topology, GraphTopology):
            period = topology.period(round)
            same = np.array_equal(topology.arcs(period), topology.arcs(period))
            _require(same, f"{name}: round {round} draws another graph each time")
