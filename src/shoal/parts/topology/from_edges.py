"""A graph given edge by edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings, components

if TYPE_CHECKING:
    import networkx
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FromEdges(GraphTopology):
    """Undirected edges as they are given: measured overlays, drawn examples, other generators.

    edges: pairs of peers, each once and in either order, no loops; together they must connect all
    peers.

    >>> FromEdges(3, ((0, 1), (2, 1))).neighbors(1)
    (0, 2)
    """

    peers: int
    edges: tuple[tuple[int, int], ...]
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 5, "edges": ((0, 1), (1, 2), (2, 3), (3, 4), (4, 1))},
        {"peers": 4, "edges": ((3, 0), (3, 1), (3, 2), (0, 1)), "mixing": "uniform"},
        {"peers": 4, "edges": ((3, 0), (3, 1), (3, 2), (0, 1)), "mixing": "max_degree"},
        {"peers": 1, "edges": ()},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        # Settings read from JSON arrive as lists, which would not hash.
        edges = tuple((int(a), int(b)) for a, b in self.edges)
        object.__setattr__(self, "edges", edges)
        seen: set[tuple[int, int]] = set()
        for a, b in edges:
            if not (0 <= a < self.peers and 0 <= b < self.peers):
                raise UsageError(
                    f"FromEdges: edge {(a, b)} leaves the peers 0 to {self.peers - 1} (raise peers)"
                )
            if a == b:
                raise UsageError(
                    f"FromEdges: edge {(a, b)} is a loop; a peer always hears itself (drop it)"
                )
            if (min(a, b), max(a, b)) in seen:
                raise UsageError(
                    f"FromEdges: edge {(a, b)} is given twice; edges are undirected (drop one)"
                )
            seen.add((min(a, b), max(a, b)))
        count = int(components(self.adjacency()).max()) + 1
        if count > 1:
            raise UsageError(
                f"FromEdges: the edges leave {count} components; need one (add edges between them)"
            )

    def __hash__(self) -> int:
        # Every look-up in the graph cache hashes the settings; once through all edges is enough.
        held = self.__dict__.get("_hash")
        if held is None:
            held = self.__dict__["_hash"] = hash((self.peers, self.edges))
        return held

    @classmethod
    def of(cls, graph: networkx.Graph, mixing: Mixing = "metropolis") -> FromEdges:
        """The topology of a networkx graph; peers are its nodes in the graph's own order."""
        index: dict[Any, int] = {node: i for i, node in enumerate(graph)}
        edges = tuple((index[a], index[b]) for a, b in graph.edges() if a != b)
        return cls(len(index), edges, mixing)

    def arcs(self, period: int) -> NDArray[np.int64]:
        return both_ways(np.array(self.edges, dtype=np.int64))
