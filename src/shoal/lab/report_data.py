"""The condensed data of a report, and their plain form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shoal.base.errors import ShoalError
from shoal.lab.build import edges
from shoal.lab.card import Plot
from shoal.lab.chart import Drawn
from shoal.lab.judge import Verdict
from shoal.lab.rows import TOTALS, curve, metrics, moments, spread, total
from shoal.lab.scenario import Scenario
from shoal.lab.statistics import Interval

if TYPE_CHECKING:
    from shoal.lab.cell import Cell
    from shoal.lab.jobs import Outcome
    from shoal.lab.store import Store

Point = tuple[float, int, float]
"""(virtual seconds, round or -1, value)"""
# Beyond this many edges a graph is reported by its degrees only.
EDGES_MAX = 4000
# Beyond this many peers the bytes of single peers are left out.
PEERS_MAX = 10_000


@dataclass
class CellResult:
    """One run, condensed. `cell` is the data to run it again; None when it held live objects.

    curves: metric -> points over all peers; spreads: metric -> (seconds, round, 5th, 25th, 50th,
    75th, 95th percentile over the peers); finals: metric -> peers' values at the end, ascending.
    happenings: (seconds, what, peers). faults: the explicit list.
    """

    arm: str
    seed: int
    cell: dict[str, Any] | None
    live: tuple[str, ...] = ()
    error: str = ""
    key: str | None = None
    params_file: str = ""
    engine: str = ""
    peers: int = 0
    byzantine: tuple[int, ...] = ()
    finished: bool = True
    totals: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    spreads: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    finals: dict[str, list[float]] = field(default_factory=dict)
    happenings: list[tuple[float, str, tuple[int, ...]]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    peer_bytes: list[int] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    trace_digest: str = ""
    state_digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Who is linked with whom in round 0 of these arms; no `edges` when there are too many."""

    arms: tuple[str, ...]
    peers: int
    edges: tuple[tuple[int, int], ...]
    degrees: tuple[int, ...]
    hub: int | None = None


def condense(outcome: Outcome, store: Store | None) -> CellResult:
    """The report's part of an outcome."""
    cell, run = outcome.cell, outcome.run
    result = CellResult(
        cell.arm, cell.seed, None if cell.live else cell.to_json(), cell.live, outcome.error,
        outcome.key, peers=cell.scenario.peers, byzantine=cell.scenario.byzantine_peers(),
        faults=[fault.to_json() for fault in cell.scenario.explicit_faults()],
    )  # fmt: skip
    if run is None:
        return result
    if store is not None and outcome.key is not None:
        path = store.params_path(outcome.key)
        result.params_file = str(path) if path.exists() else ""
    result.engine, result.peers, result.finished = run.engine, run.peers, run.finished
    result.totals = {name: total(run, name) for name in TOTALS}
    for name in metrics(run):
        result.curves[name] = [(row.time_s, row.round, row.value) for row in curve(run, name)]
        bands = spread(run, name)
        if bands:
            result.spreads[name] = [(time_s, round, *marks) for time_s, round, marks in bands]
            result.finals[name] = sorted(filter(math.isfinite, moments(run, name)[-1].values))
    result.happenings = [(h.time_s, h.what, tuple(h.peers)) for h in run.happenings]
    result.peer_bytes = list(run.bytes_sent) if run.peers <= PEERS_MAX else []
    result.dropped, result.bytes_by_kind = dict(run.dropped), dict(run.bytes_by_kind)
    result.trace_digest, result.state_digest = run.trace_digest, run.state_digest
    result.settings = {key: _simple(value) for key, value in run.settings.items()}
    return result


def _simple(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def graphs_of(cells: Sequence[Cell]) -> tuple[Graph, ...]:
    """One graph per distinct communication structure, of the first seed; arms share equal ones."""
    found: dict[Any, Graph] = {}
    done: set[str] = set()
    for cell in cells:
        if cell.arm in done:
            continue
        done.add(cell.arm)
        try:
            pairs, hub = edges(_network_only(cell.scenario))
        except ShoalError:
            # A scenario that cannot be built has failed already, and its cells say why.
            continue
        if not pairs:
            continue
        key = (cell.scenario.peers, hub, tuple(pairs))
        if key in found:
            found[key] = replace(found[key], arms=(*found[key].arms, cell.arm))
            continue
        degrees = [0] * cell.scenario.peers
        for first, second in pairs:
            degrees[first] += 1
            degrees[second] += 1
        kept = tuple(pairs) if len(pairs) <= EDGES_MAX else ()
        found[key] = Graph((cell.arm,), cell.scenario.peers, kept, tuple(degrees), hub)
    return tuple(found.values())


def _network_only(scenario: Scenario) -> Scenario:
    return replace(scenario, task=None, aggregator=None, transform=None, attack=None)


def to_plain(value: Any) -> Any:
    """JSON without NaN: floats that are no numbers become the strings nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        return {key: _revive(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_revive(each) for each in value]
    return value


def from_plain(data: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Report` from its plain form."""
    data = _revive(data)
    data["arms"], data["seeds"] = tuple(data["arms"]), tuple(data["seeds"])
    data["cells"] = [_cell(each) for each in data["cells"]]
    data["verdicts"] = tuple(_verdict(each) for each in data["verdicts"])
    data["graphs"] = tuple(_graph(each) for each in data["graphs"])
    data["plots"] = tuple(_plot(each) for each in data.get("plots", ()))
    data["charts"] = tuple(Drawn(**each) for each in data.get("charts", ()))
    return data


def _cell(plain: dict[str, Any]) -> CellResult:
    for name in ("curves", "spreads"):
        plain[name] = {
            key: [tuple(point) for point in points] for key, points in plain[name].items()
        }
    plain["happenings"] = [(t, what, tuple(peers)) for t, what, peers in plain["happenings"]]
    plain["live"], plain["byzantine"] = tuple(plain["live"]), tuple(plain["byzantine"])
    return CellResult(**plain)


def _verdict(plain: dict[str, Any]) -> Verdict:
    interval = plain["interval"]
    plain["interval"] = Interval(**interval) if interval is not None else None
    plain["values"] = tuple((seed, value) for seed, value in plain["values"])
    return Verdict(**plain)


def _plot(plain: dict[str, Any]) -> Plot:
    lines = {name: tuple((x, arm) for x, arm in points) for name, points in plain["lines"].items()}
    return Plot(**{**plain, "lines": lines})


def _graph(plain: dict[str, Any]) -> Graph:
    return Graph(
        tuple(plain["arms"]),
        plain["peers"],
        tuple((a, b) for a, b in plain["edges"]),
        tuple(plain["degrees"]),
        plain["hub"],
    )
