"""What disruptions share: orders of peers by how central they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import networkx

from shoal.base import keyed


class Graph(Protocol):
    """What a disruption needs of a topology; `positions()` as well for discs."""

    @property
    def peers(self) -> int: ...

    def neighbors(self, peer: int, round: int = 0) -> tuple[int, ...]: ...


def by_degree(graph: Graph, seed: int) -> list[int]:
    """All peers, those with most neighbours first; ties in an order drawn by key."""
    return _ordered({p: len(graph.neighbors(p)) for p in range(graph.peers)}, seed)


def by_betweenness(graph: Graph, seed: int) -> list[int]:
    """All peers, those on most shortest paths first; ties in an order drawn by key."""
    drawn = networkx.Graph()
    drawn.add_nodes_from(range(graph.peers))
    drawn.add_edges_from((p, q) for p in range(graph.peers) for q in graph.neighbors(p))
    return _ordered(networkx.betweenness_centrality(drawn), seed)


def at_random(peers: Iterable[int], seed: int, word: str) -> list[int]:
    """The peers in an order drawn by key; another word, another order."""
    return sorted(peers, key=lambda p: (keyed.uniform(seed, word, p), p))


def _ordered(score: dict[int, float], seed: int) -> list[int]:
    return sorted(score, key=lambda p: (-score[p], keyed.uniform(seed, "tie", p), p))
