"""Graphs that lose peers: who finds whom."""

from __future__ import annotations

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.topology.barabasi_albert import BarabasiAlbert
from shoal.parts.topology.rewired import Rewired


@given(st.integers(4, 30), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_new_links_replace_lost_ones_at_two_hops(peers: int, lost: int, seed: int) -> None:
    before = networkx.barabasi_albert_graph(peers, 2, seed=seed)
    hubs = sorted(before, key=lambda p: -before.degree(p))[: min(lost, peers - 2)]
    graph = Rewired(peers, tuple(before.edges()), tuple(hubs), at_round=3, seed=seed)
    for peer in range(peers):
        assert graph.neighbors(peer, 2) == tuple(sorted(before[peer]))
    kept = before.subgraph(set(before) - set(hubs))
    found = graph.found()
    for a, b in found:
        assert not before.has_edge(a, b)
        assert set(before[a]) & set(before[b]) & set(hubs)
    after = {frozenset((p, q)) for p in range(peers) for q in graph.neighbors(p, 3)}
    assert after == {frozenset(e) for e in kept.edges()} | {frozenset(e) for e in found}
    for peer in kept:
        # A link for each neighbour lost that had somebody else to offer.
        offers = [
            hub for hub in set(before[peer]) & set(hubs)
            if set(before[hub]) - set(hubs) - set(before[peer]) - {peer}
        ]  # fmt: skip
        mine = [pair for pair in found if peer in pair]
        assert bool(mine) >= bool(offers)


def test_a_star_that_loses_its_centre_holds_together_again_mostly() -> None:
    star = tuple((0, p) for p in range(1, 12))
    graph = Rewired(12, star, gone=(0,), at_round=1, seed=3)
    assert all(graph.neighbors(p, 1) for p in range(1, 12))
    assert graph.neighbors(0, 1) == ()


def test_nothing_lost_is_the_graph_itself() -> None:
    base = BarabasiAlbert(12, attach=2, seed=1)
    edges = tuple((p, q) for p in range(12) for q in base.neighbors(p) if p < q)
    graph = Rewired(12, edges)
    assert not graph.time_varying
    assert all(graph.neighbors(p, 9) == base.neighbors(p) for p in range(12))


def test_misuse() -> None:
    for settings_, message in (
        ({"edges": ((0, 1),)}, "components"),
        ({"edges": ((0, 1), (1, 2)), "gone": (3,)}, "gone"),
        ({"edges": ((0, 1), (1, 2)), "at_round": 0}, "at_round"),
    ):
        with pytest.raises(UsageError, match=message):
            Rewired(3, **settings_)  # type: ignore[arg-type]
