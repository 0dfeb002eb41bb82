"""The topology picture of a report: peers, links, the hub, and who is Byzantine or struck."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.lab.plot import GRID, INK, MUTED, PALETTE, PAPER, svg
from shoal.lab.report_data import Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A drawing of more peers is a ball of wool; their degrees say more.
DRAWN_MAX = 400


def picture(
    graph: Graph, byzantine: tuple[int, ...] = (), faults: Mapping[int, str] | None = None
) -> str:
    """A graph with its special peers marked, or (many peers or links) its degrees."""
    struck = dict(faults or {})
    drawn = bool(graph.edges) and graph.peers <= DRAWN_MAX

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        if drawn:
            _draw_graph(panel, graph, byzantine, struck)
        else:
            _draw_degrees(panel, graph)

    name = "links of " + ", ".join(graph.arms)
    return svg(5.4, 4.4 if drawn else 3.0, draw, name)


def layout(graph: Graph) -> np.ndarray:
    """Positions [peers, 2]: circles for regular, small graphs; forces otherwise; a hub central."""
    import networkx

    peers = graph.peers
    angle = 2 * math.pi * np.arange(peers) / max(peers, 1)
    circle = np.stack((np.sin(angle), np.cos(angle)), 1)
    if graph.hub is not None:
        circle[graph.hub] = 0.0
        return circle
    ring = all((b - a) % peers in (1, 2, peers - 1, peers - 2) for a, b in graph.edges)
    if ring or 2 * len(graph.edges) >= 0.8 * peers * (peers - 1):
        return circle
    net = networkx.Graph()
    net.add_nodes_from(range(peers))
    net.add_edges_from(graph.edges)
    # Started from a circle, the layout needs no random numbers.
    start = {peer: circle[peer] for peer in range(peers)}
    steps = 80 if peers <= 150 else 40
    placed: Mapping[Any, Any] = networkx.spring_layout(
        net, pos=start, k=1.6 / math.sqrt(peers), iterations=steps, seed=0
    )
    return np.array([placed[peer] for peer in range(peers)])


def _draw_graph(
    panel: Axes, graph: Graph, byzantine: tuple[int, ...], struck: Mapping[int, str]
) -> None:
    from matplotlib.collections import LineCollection

    place = layout(graph)
    ends = np.array(graph.edges, dtype=int)
    strong = 0.9 if len(graph.edges) < 300 else 0.55
    panel.add_collection(
        LineCollection(list(place[ends]), colors=MUTED, linewidths=strong, alpha=0.45, zorder=1)
    )
    size = max(14.0, min(90.0, 3600.0 / graph.peers))
    bad = set(byzantine)
    groups = {
        "peer": [p for p in range(graph.peers) if p not in bad and p not in struck],
        "struck by a fault": [p for p in struck if p not in bad],
        "Byzantine": sorted(bad),
    }
    styles: dict[str, dict[str, Any]] = {
        "peer": {"color": PALETTE[0], "edgecolors": PAPER, "linewidths": 0.8},
        "struck by a fault": {"color": PAPER, "edgecolors": PALETTE[1], "linewidths": 1.4},
        "Byzantine": {"color": INK, "marker": "X", "edgecolors": PAPER, "linewidths": 0.8},
    }
    for name, members in groups.items():
        rest = [p for p in members if p != graph.hub]
        if rest:
            panel.scatter(*place[rest].T, s=size, zorder=3, label=name, **styles[name])
    if graph.hub is not None:
        style = "struck by a fault" if graph.hub in struck else "peer"
        panel.scatter(
            *place[[graph.hub]].T, s=4 * size + 60, marker="*", zorder=4,
            label="hub (struck by a fault)" if graph.hub in struck else "hub", **styles[style],
        )  # fmt: skip
    panel.set_axis_off()
    panel.set_aspect("equal")
    panel.margins(0.06)
    panel.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False, fontsize=8.5,
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip


def _draw_degrees(panel: Axes, graph: Graph) -> None:
    values, counts = np.unique(np.array(graph.degrees), return_counts=True)
    if len(values) > 60:
        panel.hist(graph.degrees, bins=50, color=PALETTE[0], edgecolor=GRID)
    else:
        panel.bar(values, counts, width=0.8, color=PALETTE[0])
    panel.set_xlabel("links of a peer")
    panel.set_ylabel("peers")
