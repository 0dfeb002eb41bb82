"""An honest graph with Sybils around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.topology.base import (
    GraphTopology,
    Mixing,
    both_ways,
    check_settings,
    components,
)
from shoal.parts.topology.random_regular import RandomRegular

if TYPE_CHECKING:
    from numpy.typing import NDArray

Density = Literal["dense", "distributed", "sparse"]
"""Attack edges per honest peer: dense more than 1, distributed more than 1/2 and at most 1, sparse
at most 1/2."""


@dataclass(frozen=True)
class SybilGraph(GraphTopology):
    """A random regular graph of honest peers, to whom Sybils have attached themselves.

    The last `sybils` peers are the Sybils; the others form a connected random graph of `degree`,
    the same one however many Sybils there are. Each Sybil has `edges_per_sybil` attack edges to
    different honest peers, and none to another Sybil. They are dealt out evenly: no honest peer has
    two more than another, so with at most one per honest peer no victim has two Sybils as
    neighbours. kind: what these numbers are meant to be; others are refused. sybils = 0: the honest
    graph alone, whatever the kind. Whom a scenario calls `byzantine` is its own matter.
    Source: Werthenbach and Pouwelse 2023, section 3 (arXiv 2306.15044), who name the numbers
    epsilon (attack edges per honest peer) and phi (edges per Sybil).

    >>> graph = SybilGraph(14, sybils=4, edges_per_sybil=5, kind="dense", degree=3, seed=1)
    >>> [sum(peer >= 10 for peer in graph.neighbors(victim)) for victim in range(10)]
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """

    peers: int
    sybils: int
    edges_per_sybil: int = 1
    kind: Density = "distributed"
    degree: int = 5
    seed: int = 0
    mixing: Mixing = "uniform"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 20, "sybils": 4, "edges_per_sybil": 6, "kind": "dense", "degree": 3},
        {"peers": 15, "sybils": 5, "edges_per_sybil": 2, "kind": "distributed", "degree": 4},
        {"peers": 22, "sybils": 2, "edges_per_sybil": 3, "kind": "sparse", "mixing": "metropolis"},
        {"peers": 10, "sybils": 0, "degree": 3, "seed": 4},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        honest = self.peers - self.sybils
        if self.sybils < 0 or honest < 2:
            raise UsageError(
                f"SybilGraph: peers={self.peers}, sybils={self.sybils}; need at least 2 honest "
                "peers (lower sybils)"
            )
        RandomRegular(honest, self.degree, self.seed)
        if self.sybils:
            check_density(honest, self.sybils, self.edges_per_sybil, self.kind)

    def arcs(self, period: int) -> NDArray[np.int64]:
        honest = RandomRegular(self.peers - self.sybils, self.degree, self.seed)
        dealt = attack_edges(honest.peers, self.sybils, self.edges_per_sybil, self.seed)
        return np.concatenate((honest.arcs(0), both_ways(dealt)))


def check_density(honest: int, sybils: int, edges_per_sybil: int, kind: str) -> None:
    """Raise UsageError unless so many Sybils can attack so many peers in this kind of way."""
    if kind not in get_args(Density):
        raise UsageError(f"sybils: kind={kind!r}; need one of {', '.join(get_args(Density))}")
    if not 1 <= edges_per_sybil <= honest:
        raise UsageError(
            f"sybils: edges_per_sybil={edges_per_sybil}; need 1 to {honest}, as many as there are "
            "honest peers"
        )
    each = sybils * edges_per_sybil / honest
    found = "dense" if each > 1 else "distributed" if each > 0.5 else "sparse"
    if found != kind:
        raise UsageError(
            f"sybils: {sybils} of {edges_per_sybil} edges are {each:.3g} for each of {honest} "
            f"honest peers, which is {found}, not {kind} (change one of them)"
        )


def attack_edges(honest: int, sybils: int, edges_per_sybil: int, seed: int) -> NDArray[np.int64]:
    """(honest peer, Sybil) int64 [edges, 2]; Sybils are numbered from `honest` on.

    Each Sybil takes those that have the fewest, ties by draw: different peers, dealt out evenly.
    """
    load = np.zeros(honest, np.int64)
    rng = np.random.default_rng(keyed.fold(0, seed, "sybils"))
    edges = np.empty((sybils, edges_per_sybil, 2), np.int64)
    for place in range(sybils):
        victims = np.lexsort((rng.random(honest), load))[:edges_per_sybil]
        load[victims] += 1
        edges[place, :, 0], edges[place, :, 1] = victims, honest + place
    return edges.reshape(-1, 2)


def attacked(
    graph: GraphTopology, sybils: int, edges_per_sybil: int, kind: Density, seed: int = 0
) -> tuple[tuple[int, int], ...]:
    """The edges of any fixed honest graph and of Sybils around it, for `from_edges`.

    Raises UsageError when the honest graph alone is not connected: Sybils would be the only way
    between its parts.

    >>> from shoal.parts.topology.ring import Ring
    >>> attacked(Ring(3), 1, 1, "sparse")[:3]
    ((0, 1), (0, 2), (1, 2))
    """
    parts = int(components(graph.adjacency()).max()) + 1
    if parts > 1:
        raise UsageError(
            f"sybils: the honest graph has {parts} components; need one (add edges between them)"
        )
    check_density(graph.peers, sybils, edges_per_sybil, kind)
    arcs = graph.arcs(0)
    own = {(int(min(a, b)), int(max(a, b))) for a, b in arcs}
    dealt = attack_edges(graph.peers, sybils, edges_per_sybil, seed)
    return (*sorted(own), *((int(a), int(b)) for a, b in dealt))
