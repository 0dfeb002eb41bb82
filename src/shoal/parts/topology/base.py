"""What the topologies share: from edges to neighbours, mixing weights and their measures.

A topology is a frozen dataclass of settings whose own work is `arcs(period)`: who is heard by
whom. `GraphTopology` turns that into the contract of `shoal.world.topology`. Graphs and weights are
built once per topology and period and then shared, so the tensors handed out must not be written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.topology._measures import (
    as_csr,
    average_path_length,
    check_mixing,
    components,
    metropolis_on_live_subgraph,
    spectral_gap,
)
from shoal.tensor.types import Index, Weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "GraphTopology",
    "Mixing",
    "as_csr",
    "average_path_length",
    "both_ways",
    "check_mixing",
    "check_settings",
    "circulant",
    "components",
    "connected",
    "metropolis_on_live_subgraph",
    "spectral_gap",
]

Mixing = Literal["metropolis", "uniform", "max_degree"]
"""How weights follow from a graph; d is the number of peers that a peer hears.

metropolis: 1 / (1 + max(d_i, d_j)), doubly stochastic on any undirected graph (Xiao, Boyd and Kim
2007, section 2.2); uniform: 1 / (1 + d_i), what plain averaging of all that was heard does, doubly
stochastic on regular graphs only; max_degree: 1 / (1 + max d), doubly stochastic, needs to know
the whole graph.
"""

ATTEMPTS = 100
"""How many random graphs are drawn before a setting counts as unable to give a connected one."""


class GraphTopology:
    """Neighbours and weights from `arcs`. Subclasses are frozen dataclasses with `peers` first."""

    peers: int
    mixing: Mixing

    @property
    def symmetric(self) -> bool:
        """Whether the mixing matrix equals its transpose."""
        return self.mixing != "uniform"

    @property
    def doubly_stochastic(self) -> bool:
        """Whether columns are promised to sum to 1, that is, whether mixing keeps the mean."""
        return self.mixing != "uniform"

    @property
    def time_varying(self) -> bool:
        """Whether rounds differ; a single round's graph may then be disconnected."""
        return False

    def period(self, round: int) -> int:
        """Which graph is in force in a round: equal periods, equal graphs."""
        return 0

    def arcs(self, period: int) -> NDArray[np.int64]:
        """(source, target) int64 [arcs, 2]: the target hears the source. Any order, no repeats."""
        raise NotImplementedError

    def neighbors(self, peer: int, round: int = 0) -> tuple[int, ...]:
        """Whom `peer` may send to, ascending, itself not included."""
        graph = _graph(self, self.period(round))
        if not 0 <= peer < self.peers:
            raise UsageError(f"topology: no peer {peer}; there are 0 to {self.peers - 1}")
        return tuple(graph.told[graph.told_start[peer] : graph.told_start[peer + 1]].tolist())

    def sources(self, round: int = 0) -> tuple[Index, Weight, Weight]:
        """(sources int64 [peers, k] padded with -1, weights [peers, k], own [peers]), float64."""
        return _sources(self, self.period(round))

    def weights(self, round: int = 0) -> Tensor:
        """Mixing matrix, sparse CSR float64 [peers, peers], the diagonal stored in every row."""
        return _weights(self, self.period(round))

    def adjacency(self, round: int = 0) -> sparse.csr_array:
        """Who hears whom, bool [peers, peers]: entry (i, j) is set where i hears j."""
        graph = _graph(self, self.period(round))
        ones = np.ones(len(graph.heard), dtype=bool)
        shape = (self.peers, self.peers)
        return sparse.csr_array((ones, graph.heard, graph.heard_start), shape=shape)


@dataclass(frozen=True, eq=False)
class _Graph:
    """Arcs by receiver and by sender, as offsets and ascending peers; weights by receiver."""

    heard_start: NDArray[np.int64]
    heard: NDArray[np.int64]
    told_start: NDArray[np.int64]
    told: NDArray[np.int64]
    weight: NDArray[np.float64]
    own: NDArray[np.float64]


@lru_cache(maxsize=16)
def _graph(topology: GraphTopology, period: int) -> _Graph:
    peers = topology.peers
    arcs = topology.arcs(period)
    source, target = arcs[:, 0], arcs[:, 1]
    by_receiver = np.lexsort((source, target))
    by_sender = np.lexsort((target, source))
    receiver, heard = target[by_receiver], source[by_receiver]
    degree = np.bincount(receiver, minlength=peers)
    weight = _mixing_weight(topology.mixing, degree, receiver, heard)
    return _Graph(
        heard_start=_starts(degree),
        heard=heard,
        told_start=_starts(np.bincount(source, minlength=peers)),
        told=target[by_sender],
        weight=weight,
        own=1.0 - np.bincount(receiver, weight, minlength=peers),
    )


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def _mixing_weight(
    mixing: Mixing,
    degree: NDArray[np.int64],
    receiver: NDArray[np.int64],
    heard: NDArray[np.int64],
) -> NDArray[np.float64]:
    if mixing == "metropolis":
        return 1.0 / (1.0 + np.maximum(degree[receiver], degree[heard]))
    if mixing == "uniform":
        return 1.0 / (1.0 + degree[receiver])
    return np.full(len(heard), 1.0 / (1.0 + degree.max(initial=0)))


@lru_cache(maxsize=16)
def _sources(topology: GraphTopology, period: int) -> tuple[Index, Weight, Weight]:
    graph = _graph(topology, period)
    degree = np.diff(graph.heard_start)
    row = np.repeat(np.arange(topology.peers), degree)
    column = np.arange(len(graph.heard)) - np.repeat(graph.heard_start[:-1], degree)
    shape = (topology.peers, int(degree.max(initial=0)))
    sources = np.full(shape, -1, dtype=np.int64)
    weights = np.zeros(shape)
    sources[row, column] = graph.heard
    weights[row, column] = graph.weight
    own = torch.from_numpy(graph.own.copy())
    return torch.from_numpy(sources), torch.from_numpy(weights), own


@lru_cache(maxsize=16)
def _weights(topology: GraphTopology, period: int) -> Tensor:
    graph = _graph(topology, period)
    shape = (topology.peers, topology.peers)
    off_diagonal = sparse.csr_array((graph.weight, graph.heard, graph.heard_start), shape=shape)
    matrix = (off_diagonal + sparse.diags_array(graph.own, format="csr")).tocsr()
    matrix.sort_indices()
    with warnings.catch_warnings():
        # torch announces once per process that its CSR format is in beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data),
            size=shape,
            check_invariants=True,
        )


def check_settings(topology: GraphTopology) -> None:
    """Raise UsageError unless `peers` and `mixing` are sound; each part calls it first."""
    name = type(topology).__name__
    if topology.peers < 1:
        raise UsageError(f"{name}: peers={topology.peers}; need at least 1 (raise it)")
    if topology.mixing not in get_args(Mixing):
        raise UsageError(
            f"{name}: mixing={topology.mixing!r}; need one of {', '.join(get_args(Mixing))}"
        )


def both_ways(pairs: Iterable[tuple[int, int]] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Undirected pairs [edges, 2] as arcs [2 edges, 2]; loops are dropped."""
    array = pairs if isinstance(pairs, np.ndarray) else np.array(list(pairs), dtype=np.int64)
    array = array.reshape(-1, 2)
    array = array[array[:, 0] != array[:, 1]]
    return np.concatenate((array, array[:, ::-1]))


def circulant(peers: int, offsets: Iterable[int]) -> NDArray[np.int64]:
    """Arcs from every peer i to i + offset (modulo peers), for each distinct offset but 0.

    >>> circulant(3, (1, 4, 3)).tolist()
    [[0, 1], [1, 2], [2, 0]]
    """
    steps = np.array(sorted({offset % peers for offset in offsets} - {0}), dtype=np.int64)
    source = np.repeat(np.arange(peers, dtype=np.int64), len(steps))
    return np.stack((source, (source + np.tile(steps, peers)) % peers), axis=1)


def connected(
    draw: Callable[[int], NDArray[np.int64]], peers: int, failure: str
) -> tuple[NDArray[np.int64], int]:
    """The first connected graph among `draw(0)`, `draw(1)`, ..., and its number.

    Drawing again until connected is the random graph conditioned on being connected. After 100
    attempts the setting counts as impossible: UsageError, with `failure` as the reason and repair.
    """
    for attempt in range(ATTEMPTS):
        arcs = draw(attempt)
        if len(arcs) < 2 * (peers - 1):
            continue  # fewer edges than a tree
        ones = np.ones(len(arcs), dtype=bool)
        matrix = sparse.csr_array((ones, (arcs[:, 1], arcs[:, 0])), shape=(peers, peers))
        if int(components(matrix).max()) == 0:
            return arcs, attempt
    raise UsageError(f"{failure}; none of {ATTEMPTS} draws was connected")
