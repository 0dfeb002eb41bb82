"""Pictures of Lattica's experiments, from the runs of the first seed."""

from __future__ import annotations

from collections import Counter

from shoal.lab.chart import Points
from shoal.lab.rows import Rows
from shoal.systems.network._lattica_claims import HEALED_S, matrix
from shoal.world.nat import CLASSIC


def pairs_by_kind(rows: Rows) -> Points:
    """The share of direct paths by the kinds of caller (rows) and called (columns)."""
    run = rows.run("punching", rows.seeds[0])
    if run is None:
        return {}
    cells = matrix(run, rows.scenarios["punching", rows.seeds[0]])
    return {
        one: [(other, cells[one, other][1] / cells[one, other][0]) for other in CLASSIC
              if (one, other) in cells]
        for one in CLASSIC
    }  # fmt: skip


def states_after_healing(rows: Rows) -> Points:
    """How many different states there are among honest replicas, by seconds after the healing."""
    lines = {}
    for arm in ("replicas", "broadcast"):
        run = rows.run(arm, rows.seeds[0])
        seen: dict[float, set[float]] = {}
        for row in () if run is None else run.series("digest"):
            seen.setdefault(round(row.time_s - HEALED_S, 3), set()).add(row.value)
        lines[arm] = [(at_s, float(len(states))) for at_s, states in sorted(seen.items())]
    return {name: points for name, points in lines.items() if points}


def searches_by_hops(rows: Rows) -> Points:
    """How many searches took how many rounds of queries, before and after the departure."""
    run = rows.run("table", rows.seeds[0])
    if run is None:
        return {}
    lines = {}
    for phase in ("before", "after"):
        counts = Counter(
            int(row.value) for row in run.series("hops") if ("phase", phase) in row.labels
        )
        lines[phase] = [(hops, float(count)) for hops, count in sorted(counts.items())]
    return {name: points for name, points in lines.items() if points}


def peers_with_model(rows: Rows) -> Points:
    """How many peers have the whole first version, by seconds after its publication."""
    lines = {}
    for arm in ("swarm", "server", "copies"):
        run = rows.run(arm, rows.seeds[0])
        took = sorted(
            row.value
            for row in (() if run is None else run.series("took_s"))
            if ("version", "0") in row.labels
        )
        lines[arm] = [(0.0, 0.0), *((at_s, float(n + 1)) for n, at_s in enumerate(took))]
    return {name: points for name, points in lines.items() if len(points) > 1}
