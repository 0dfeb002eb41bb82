"""How Lattica's claims are measured, and what must hold under any faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.lab.statistics import quantile
from shoal.systems.network._lattica_models import QUIET_S
from shoal.systems.network._lattica_paths import RELAYS
from shoal.systems.network._lattica_state import GONE_S, PERIOD_S
from shoal.world.nat import PUBLIC, placed
from shoal.world.record import Run

# Worlds.

_PARTS = ((8.0, 28.0), (40.0, 60.0))
HEALED_S = _PARTS[-1][1]


def partitioned(scenario: Scenario) -> Scenario:
    """Two partitions of 20 s: the first half against the second, then even against odd peers."""
    first = tuple(range(scenario.peers // 2))
    second = tuple(range(0, scenario.peers, 2))
    faults = tuple(
        FaultSetting("partition", who=who, at=at_s, until=until_s)
        for who, (at_s, until_s) in zip((first, second), _PARTS, strict=True)
    )
    return replace(scenario, faults=faults)


def departed(scenario: Scenario) -> Scenario:
    """Every fifth peer stops at the same moment."""
    gone = FaultSetting("crash", who=tuple(range(0, scenario.peers, 5)), at=GONE_S)
    return replace(scenario, faults=(gone,))


# Paths.


def kinds_of(scenario: Scenario) -> dict[int, str]:
    """The kind of NAT box of every peer."""
    boxes = placed(dict(scenario.nats), scenario.seed)
    known = {peer: box.name for box in boxes for peer in box.who}
    return {peer: known.get(peer, PUBLIC) for peer in range(scenario.peers - RELAYS)}


def predicted(one: str, other: str) -> bool:
    """Whether a punch can work: a symmetric box shows every endpoint another port, which a filter
    by ports does not know (Ford et al. 2005, section 5.1)."""
    return "symmetric" not in (one, other) or not {one, other} <= {"symmetric", "port-restricted"}


def _of(rows: Rows, arm: str, number: Callable[[Run], float]) -> dict[int, float]:
    found = {}
    for seed in rows.seeds:
        run = rows.run(arm, seed)
        found[seed] = math.nan if run is None else number(run)
    return found


def _share_direct(run: Run) -> float:
    paths = run.series("path")
    return sum(row.value > 0 for row in paths) / len(paths)


def direct_rate(rows: Rows) -> dict[int, float]:
    """The share of pairs with a direct path."""
    return _of(rows, "punching", _share_direct)


def matrix(run: Run, scenario: Scenario) -> dict[tuple[str, str], tuple[int, int]]:
    """(pairs, direct ones) by the kinds of caller and called."""
    kinds = kinds_of(scenario)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in run.series("path"):
        cell = kinds[row.peer], kinds[int(dict(row.labels)["called"])]
        pairs, direct = found.get(cell, (0, 0))
        found[cell] = pairs + 1, direct + (row.value > 0)
    return found


def pairs_not_as_predicted(rows: Rows) -> dict[int, float]:
    """Pairs that are direct and should not be, or the reverse, over all cells of the matrix."""
    out = {}
    for seed in rows.seeds:
        run = rows.run("punching", seed)
        if run is None:
            out[seed] = math.nan
            continue
        cells = matrix(run, rows.scenarios["punching", seed]).items()
        out[seed] = float(
            sum(n - direct if predicted(*kinds) else direct for kinds, (n, direct) in cells)
        )
    return out


def reached(rows: Rows) -> dict[int, float]:
    """The share of pairs that are connected at all."""
    return _of(
        rows, "punching",
        lambda run: sum(r.value >= 0 for r in run.series("path")) / len(run.series("path")),
    )  # fmt: skip


def direct_of_public_only(rows: Rows) -> dict[int, float]:
    """The share of direct paths when nobody punches and nobody dials back."""
    return _of(rows, "public only", _share_direct)


def direct_of_reversal(rows: Rows) -> dict[int, float]:
    """The share of direct paths when callers that can be reached are dialled back."""
    return _of(rows, "reversal", _share_direct)


# State.


def _converged(run: Run) -> float:
    seen: dict[float, set[float]] = {}
    for row in run.series("digest"):
        seen.setdefault(round(row.time_s, 3), set()).add(row.value)
    late = max((at for at, digests in seen.items() if len(digests) > 1), default=-1.0)
    agreed = min((at for at in seen if at > late), default=math.inf)
    return (agreed - HEALED_S) / PERIOD_S


def converged_periods(rows: Rows) -> dict[int, float]:
    """From the healing until all honest replicas have one digest, in anti-entropy periods."""
    return _of(rows, "replicas", _converged)


def forged(rows: Rows) -> dict[int, float]:
    """Forged changes in honest replicas."""
    return _of(rows, "replicas", lambda run: sum(row.value for row in run.series("forged")))


def states_of_broadcast(rows: Rows) -> dict[int, float]:
    """How many different states the baseline's replicas end in."""
    return _of(rows, "broadcast", lambda run: float(len({r.value for r in run.series("final")})))


# The table.


def _phase(run: Run, name: str, phase: str) -> list[float]:
    return [row.value for row in run.series(name) if ("phase", phase) in row.labels]


def median_hops(rows: Rows) -> dict[int, float]:
    """Rounds of queries until a holder answered, the median search."""
    return _of(rows, "table", lambda run: quantile(_phase(run, "hops", "before"), 0.5))


def late_hops(rows: Rows) -> dict[int, float]:
    """The same, 95th percentile."""
    return _of(rows, "table", lambda run: quantile(_phase(run, "hops", "before"), 0.95))


def _found(run: Run, phase: str) -> float:
    found = _phase(run, "found", phase)
    return sum(found) / len(found)


def found_before(rows: Rows) -> dict[int, float]:
    """The share of searches that find what was stored."""
    return _of(rows, "table", lambda run: _found(run, "before"))


def found_after(rows: Rows) -> dict[int, float]:
    """The same from three seconds after a fifth of the nodes left."""
    return _of(rows, "table", lambda run: _found(run, "after"))


# Models.


def _last_s(run: Run) -> float:
    """Until the last peer has the first version; nan unless all have it right."""
    took = [row.value for row in run.series("took_s") if ("version", "0") in row.labels]
    right = [row.value for row in run.series("right")]
    whole = len(took) == run.peers - 1 and len(right) == 2 * len(took) and all(right)
    return max(took) if whole else math.nan


def time_over_server(rows: Rows) -> dict[int, float]:
    """Until the last peer has the model, as a multiple of the time with one server."""
    swarm, server = _of(rows, "swarm", _last_s), _of(rows, "server", _last_s)
    return {seed: swarm[seed] / server[seed] for seed in rows.seeds}


def _moved_again(run: Run) -> float:
    """All bytes on all links but those of the first version's blocks, over those: what the second
    version moved, with every question and all upkeep of the whole run."""
    if math.isnan(_last_s(run)):
        return math.nan
    first = sum(row.value for row in run.series("blob_bytes") if ("version", "0") in row.labels)
    return (sum(run.bytes_sent) - first) / first


def bytes_of_update(rows: Rows) -> dict[int, float]:
    """Bytes on all links for the second version, over those of the blob to everybody."""
    return _of(rows, "swarm", _moved_again)


def bytes_of_copies(rows: Rows) -> dict[int, float]:
    """The same when the second version is sent as a whole."""
    return _of(rows, "copies", _moved_again)


# Calls.


def small_calls(rows: Rows) -> dict[int, float]:
    """Calls of 128 B per second, 16 at once."""

    def rate(run: Run) -> float:
        found = [
            row.value
            for row in run.series("calls_per_s")
            if {("size", "128"), ("delay_ms", "0")} <= set(row.labels)
        ]
        return found[0] if found else math.nan

    return _of(rows, "calls", rate)


def off_little(rows: Rows) -> dict[int, float]:
    """How far throughput is from calls at once over 150 ms, the worse of 8 and 32 at once."""

    def worst(run: Run) -> float:
        found = [
            abs(row.value - 1.0)
            for row in run.series("of_little")
            if ("delay_ms", "150") in row.labels
        ]
        return max(found, default=math.nan)

    return _of(rows, "calls", worst)


# Invariants of a single run, for any faults.

_LASTING = ("partition", "loss", "hold", "corrupt", "skew", "slow")
_CALM_S = 11.0
"""How long before the end the last fault must be over, for what must hold then."""


def _calm(run: Run) -> bool:
    """Whether the last seconds were without faults; who is gone may be gone."""
    active: dict[tuple[str, tuple[int, ...]], int] = {}
    for mark in run.happenings:
        what = mark.what
        if mark.time_s > QUIET_S - _CALM_S:
            return False
        if what in _LASTING:
            active[what, mark.peers] = active.get((what, mark.peers), 0) + 1
        elif what.endswith(" ends"):
            key = what.removesuffix(" ends"), mark.peers
            active[key] = active.get(key, 0) - 1
    return not any(count > 0 for count in active.values())


def _there(run: Run) -> set[int]:
    """Who was there all the time: nothing was lost with them."""
    away = {
        peer
        for mark in run.happenings
        if mark.what in ("crash", "leave", "join", "restart")
        for peer in mark.peers
    }
    return set(range(run.peers)) - away


def nothing_forged_is_accepted(run: Run) -> str | None:
    """No honest replica holds a change that a liar made up."""
    bad = [row for row in run.series("forged") if row.value]
    return f"peer {bad[0].peer} holds {bad[0].value:g} forged changes" if bad else None


def only_verified_blobs(run: Run) -> str | None:
    """Whoever has a model has exactly the bytes that were published."""
    bad = [row for row in run.series("verified") if not row.value]
    return f"peer {bad[0].peer} took a wrong model at {bad[0].time_s} s" if bad else None


def nothing_is_invented(run: Run) -> str | None:
    """No search returns what nobody stored."""
    bad = [row for row in run.series("invented") if row.value]
    return f"peer {bad[0].peer} found an invented value at {bad[0].time_s} s" if bad else None


def replicas_agree_once_it_is_quiet(run: Run) -> str | None:
    """All honest replicas that are there at the end hold one state."""
    finals = {row.peer: row.value for row in run.series("final")}
    if _calm(run) and len(set(finals.values())) > 1:
        return f"{len(set(finals.values()))} states among {len(finals)} replicas"
    return None


def keys_are_found_once_it_is_quiet(run: Run) -> str | None:
    """What a peer that is there keeps under a key is found."""
    there = _there(run)
    if not _calm(run):
        return None
    for row in run.series("found"):
        labels = dict(row.labels)
        if labels["phase"] == "after" and int(labels["other"]) in there and not row.value:
            return f"peer {row.peer} did not find the key of {labels['other']}"
    return None


def models_arrive_once_it_is_quiet(run: Run) -> str | None:
    """Who is there at the end has the last model that its trainer published."""
    there = _there(run)
    if not _calm(run) or 0 not in there:
        return None
    last = {row.peer: row.value for row in run.series("version")}
    behind = [peer for peer in sorted(there - {0}) if last.get(peer) != 2]
    return f"peer {behind[0]} has version {last.get(behind[0])}" if behind else None
