"""What the claims of `disaster_learning` measure: effects per seed, and who is cut off."""

from __future__ import annotations

from collections.abc import Collection

import torch

from shoal.lab.build import topology_of
from shoal.lab.rows import Rows
from shoal.parts.topology.base import GraphTopology, components
from shoal.world.record import Run

NAN = float("nan")


def _accuracy(rows: Rows, arm: str, seed: int) -> float:
    """Mean over all survivors at the end, fragments included."""
    return rows.value(arm, seed, "accuracy")


def _cost(rows: Rows, seed: int, calm: str, arm: str) -> float:
    return _accuracy(rows, calm, seed) - _accuracy(rows, arm, seed)


def removed(run: Run) -> frozenset[int]:
    """Who crashed in a run."""
    return frozenset(p for h in run.happenings if h.what == "crash" for p in h.peers)


def parts_of(graph: GraphTopology, gone: Collection[int]) -> list[list[int]]:
    """The survivors by component of what is left of a graph, largest first."""
    left = graph.adjacency().toarray().astype(int)
    left[list(gone), :] = 0
    left[:, list(gone)] = 0
    groups: dict[int, list[int]] = {}
    for peer, label in enumerate(components(torch.from_numpy(left)).tolist()):
        if peer not in gone:
            groups.setdefault(label, []).append(peer)
    return sorted(groups.values(), key=lambda group: (-len(group), group))


def _parts(rows: Rows, arm: str, seed: int) -> list[list[int]]:
    run = rows.run(arm, seed)
    return [] if run is None else parts_of(topology_of(rows.scenarios[arm, seed]), removed(run))


def _at(rows: Rows, arm: str, seed: int, peers: Collection[int], round: int) -> float:
    """Mean accuracy of some peers after a round (-1 = the last one)."""
    run = rows.run(arm, seed)
    if run is None or not peers:
        return NAN
    wanted = set(peers)
    found = [r for r in run.series("accuracy") if r.peer in wanted]
    last = max((r.round for r in found), default=-1) if round < 0 else round
    values = [r.value for r in found if r.round == last]
    return sum(values) / len(values) if len(values) == len(wanted) else NAN


def outside(rows: Rows) -> dict[int, float]:
    """Share of the survivors outside the giant component after the hubs are gone."""
    out = {}
    for seed in rows.seeds:
        groups = _parts(rows, "early C", seed)
        total = sum(map(len, groups))
        out[seed] = 1 - len(groups[0]) / total if total else NAN
    return out


def connectivity_effect(rows: Rows) -> dict[int, float]:
    """Undisturbed minus C, hubs, early."""
    return {s: _cost(rows, s, "calm C", "early C") for s in rows.seeds}


def data_effect(rows: Rows) -> dict[int, float]:
    """Undisturbed minus K, hubs, early."""
    return {s: _cost(rows, s, "calm D", "early K") for s in rows.seeds}


def connectivity_over_data(rows: Rows) -> dict[int, float]:
    """Connectivity effect minus twice the data effect."""
    connectivity, data = connectivity_effect(rows), data_effect(rows)
    return {s: connectivity[s] - 2 * data[s] for s in rows.seeds}


def rewired_over_early(rows: Rows) -> dict[int, float]:
    """Cost of the hubs' connections with new links minus half of that without."""
    return {
        s: _cost(rows, s, "calm C", "early C rewired") - 0.5 * _cost(rows, s, "calm C", "early C")
        for s in rows.seeds
    }


def asynchronous_effect(rows: Rows) -> dict[int, float]:
    """Connectivity effect without rounds and with lost messages: undisturbed minus C."""
    return {s: _cost(rows, s, "asynchronous calm C", "asynchronous early C") for s in rows.seeds}


def random_over_hubs(rows: Rows) -> dict[int, float]:
    """Cost of random relays minus half the cost of the hubs."""
    return {
        s: _cost(rows, s, "random calm C", "random C") - 0.5 * _cost(rows, s, "calm C", "early C")
        for s in rows.seeds
    }


def random_data_over_connectivity(rows: Rows) -> dict[int, float]:
    """Data effect minus connectivity effect, random positions."""
    return {
        s: _cost(rows, s, "random calm D", "random K") - _cost(rows, s, "random calm C", "random C")
        for s in rows.seeds
    }


def giant_kept(rows: Rows) -> dict[int, float]:
    """Accuracy in the giant component over the undisturbed accuracy of all, hubs lost late."""
    out = {}
    for s in rows.seeds:
        groups = _parts(rows, "late C", s)
        calm = _accuracy(rows, "calm C", s)
        out[s] = _at(rows, "late C", s, groups[0] if groups else (), -1) / calm
    return out


def all_kept(rows: Rows) -> dict[int, float]:
    """Accuracy of all survivors over the undisturbed one, hubs lost late."""
    return {s: _accuracy(rows, "late C", s) / _accuracy(rows, "calm C", s) for s in rows.seeds}


def late_over_early(rows: Rows) -> dict[int, float]:
    """Cost of losing the hubs late minus that of losing them early."""
    return {
        s: _cost(rows, s, "calm C", "late C") - _cost(rows, s, "calm C", "early C")
        for s in rows.seeds
    }


def isolated_change(rows: Rows) -> dict[int, float]:
    """Mean change in accuracy, from just before the hubs are lost late to the end, of survivors
    without a neighbour; of all outside the giant component in a seed that has no such peer."""
    out = {}
    for s in rows.seeds:
        groups = _parts(rows, "late C", s)
        alone = [group[0] for group in groups[1:] if len(group) == 1]
        alone = alone or [peer for group in groups[1:] for peer in group]
        run = rows.run("late C", s)
        crash = [h.time_s for h in run.happenings if h.what == "crash"] if run else []
        before = [r.round for r in run.series("accuracy") if r.time_s <= crash[0]] if run else []
        if not before:
            out[s] = NAN
            continue
        out[s] = _at(rows, "late C", s, alone, -1) - _at(rows, "late C", s, alone, max(before))
    return out


def over_isolated(rows: Rows) -> dict[int, float]:
    """Survivors after hubs are lost early minus holders that never exchange anything."""
    out = {}
    for s in rows.seeds:
        run = rows.run("isolated", s)
        if run is None:
            out[s] = NAN
            continue
        # Peers without data keep the initial model, which would flatter the comparison.
        values: dict[int, list[float]] = {}
        for row in run.series("accuracy"):
            values.setdefault(row.peer, []).append(row.value)
        alone = [own[-1] for own in values.values() if len(set(own)) > 1]
        out[s] = _accuracy(rows, "early C", s) - sum(alone) / len(alone) if alone else NAN
    return out


def last_round_of_server(rows: Rows) -> dict[int, float]:
    """The last round after which federated averaging has a model to show."""
    out = {}
    for s in rows.seeds:
        run = rows.run("server lost", s)
        rounds = [] if run is None else [r.round for r in run.series("accuracy")]
        out[s] = float(max(rounds)) if rounds else NAN
    return out
