"""How DADAO's claims are measured, and what every run of its peers keeps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from shoal.lab.card import Arm
from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.world.record import Run

CONDITIONS = (10.0, 30.0, 100.0, 300.0, 1000.0)
SIZES = (8, 16, 32)
GRAPHS = ("dadao", "star", "cycle", "grid", "barbell")
NEAR = 1e-5
"""Mean squared distance that counts as arrived on the event engine; a millionth of the start's."""
SLOWER = 10.0


def barbell(peers: int) -> tuple[tuple[int, int], ...]:
    """The edges of two full graphs of half of the peers each, and a bridge between them.

    >>> barbell(4)
    ((0, 1), (2, 3), (1, 2))
    """
    half = peers // 2
    sides = (range(half), range(half, peers))
    inside = [(a, b) for side in sides for a in side for b in side if a < b]
    return (*inside, (half - 1, half))


def one_slow(scenario: Scenario) -> Scenario:
    """Peer 0 computes ten times slower."""
    fault = FaultSetting("slow", who=(0,), settings={"factor": SLOWER})
    return replace(scenario, faults=(*scenario.faults, fault))


def counted(method: str = "dadao", peers: int = 16, **more: object) -> Arm:
    """An arm of `dadao-counted`; more: topology and condition of the scenario, settings.

    >>> counted(condition=10.0, slow=2.0).set
    {'method': 'dadao', 'slow': 2.0}
    """
    scenario: dict[str, object] = {"peers": peers}
    if "topology" in more:
        scenario["topology"] = more.pop("topology")
    if "condition" in more:
        scenario["task.condition"] = more.pop("condition")
    return Arm(system="dadao-counted", set={"method": method, **more}, scenario=scenario)


# Measures: Rows -> one number per seed.


def _exponent(
    rows: Rows, arms: Sequence[str], over: Sequence[float], metric: str
) -> dict[int, float]:
    """p of metric ~ over^p, by least squares in logarithms."""
    found = {}
    for seed in rows.seeds:
        values = [rows.value(arm, seed, metric) for arm in arms]
        sound = all(math.isfinite(value) and value > 0 for value in values)
        found[seed] = float(np.polyfit(np.log(over), np.log(values), 1)[0]) if sound else math.nan
    return found


def arms_over_condition(method: str) -> list[str]:
    """The arms of "dadao" or "tracking" in the order of CONDITIONS."""
    prefix = "condition" if method == "dadao" else method
    return [method if value == 30 else f"{prefix} {value:g}" for value in CONDITIONS]


def arms_over_peers(method: str) -> list[str]:
    """The arms of "dadao" or "ssda" in the order of SIZES."""
    prefix = "peers" if method == "dadao" else method
    return [method if size == 16 else f"{prefix} {size}" for size in SIZES]


def gradients_over_condition(rows: Rows) -> dict[int, float]:
    """Exponent of the condition number in DADAO's gradients."""
    return _exponent(rows, arms_over_condition("dadao"), CONDITIONS, "gradients")


def tracking_over_condition(rows: Rows) -> dict[int, float]:
    """The same of gradient tracking."""
    return _exponent(rows, arms_over_condition("tracking"), CONDITIONS, "gradients")


def exchanges_over_peers(rows: Rows) -> dict[int, float]:
    """Exponent of the number of peers of a full graph in DADAO's exchanges."""
    return _exponent(rows, arms_over_peers("dadao"), SIZES, "exchanges")


def ssda_over_peers(rows: Rows) -> dict[int, float]:
    """The same of SSDA."""
    return _exponent(rows, arms_over_peers("ssda"), SIZES, "exchanges")


PRIMAL = {
    "dadao": ("adom+",), "star": ("adom+ star", "consensus star"),
    "cycle": ("adom+ cycle", "consensus cycle"),
}  # fmt: skip


def exchanges_over_primal(rows: Rows) -> dict[int, float]:
    """DADAO's exchanges over those of the cheaper form of ADOM+, where that is most."""
    found = {}
    for seed in rows.seeds:
        ratios = [
            rows.value(arm, seed, "exchanges")
            / min(rows.value(other, seed, "exchanges") for other in others)
            for arm, others in PRIMAL.items()
        ]
        found[seed] = max(ratios) if all(map(math.isfinite, ratios)) else math.nan
    return found


def straightest(rows: Rows) -> dict[int, float]:
    """The least R^2 of log distance over time on any graph."""
    return {seed: min(rows.value(arm, seed, "fit") for arm in GRAPHS) for seed in rows.seeds}


def slowest_rate(rows: Rows) -> dict[int, float]:
    """The least rate on any graph, in units of sqrt(mu / 2L) / 8."""
    return {
        seed: min(rows.value(arm, seed, "rate_over_flow") for arm in GRAPHS) for seed in rows.seeds
    }


def root_of_optimal(rows: Rows) -> dict[int, float]:
    """sqrt(chi_1 chi_2) of the best rates on the barbell, over that of equal ones."""

    def root(arm: str, seed: int) -> float:
        return math.sqrt(rows.value(arm, seed, "chi_1") * rows.value(arm, seed, "chi_2"))

    return {seed: root("barbell optimal", seed) / root("barbell", seed) for seed in rows.seeds}


def arrival_with_slow_peer(rows: Rows) -> dict[int, float]:
    """Virtual time until all peers are near, with one ten times slower, over that without."""

    def arrival(arm: str, seed: int) -> float:
        return rows.reach(arm, seed, "distance", NEAR, axis="time_s", falling=True)

    return {seed: arrival("messages slow", seed) / arrival("messages", seed) for seed in rows.seeds}


# Invariants of a single run.

Ends = Mapping[tuple[int, int], list[list[int]]]


def _ends(run: Run) -> Ends:
    """(peer, other) -> numbers of its exchanges, cut where the peer began without a memory."""
    found: dict[tuple[int, int], list[list[int]]] = defaultdict(lambda: [[]])
    for row in run.rows:
        if row.name == "fresh":
            for key in found:
                if key[0] == row.peer:
                    found[key].append([])
        elif row.name == "exchanged":
            found[row.peer, int(dict(row.labels)["other"])][-1].append(int(row.value))
    return found


def exchanges_count_once(run: Run) -> str | None:
    """Nobody applies an exchange twice."""
    for (peer, other), lives in _ends(run).items():
        for life in lives:
            if len(set(life)) != len(life):
                return f"peer {peer} applied an exchange with {other} twice: {sorted(life)}"
    return None


def both_ends_apply(run: Run) -> str | None:
    """Where no message came to nothing and nobody went, both ends apply the same exchanges."""
    if run.happenings or any(run.dropped.values()) or run.messages_in_flight:
        return None
    ends = _ends(run)
    for (peer, other), lives in ends.items():
        mine, theirs = (sorted(n for life in part for n in life)
                        for part in (lives, ends.get((other, peer), [[]])))  # fmt: skip
        if mine != theirs:
            return f"peers {peer} and {other} applied {len(mine)} and {len(theirs)} exchanges"
    return None


def sums_are_kept(run: Run) -> str | None:
    """Where both ends of every edge applied the same, dual vectors sum to 0 at a common date."""
    ends = _ends(run)
    if any(len(lives) > 1 for lives in ends.values()):
        return None
    if any(sorted(lives[0]) != sorted(ends.get((b, a), [[]])[0]) for (a, b), lives in ends.items()):
        return None
    told = {name: run.series(name) for name in ("dual_sum", "fast_dual_sum", "dual_size")}
    if any(len({row.peer for row in rows}) != run.peers for rows in told.values()):
        return None
    size = math.fsum(row.value for row in told["dual_size"])
    for name in ("dual_sum", "fast_dual_sum"):
        total = abs(math.fsum(row.value for row in told[name]))
        if total > 1e-9 * max(size, 1.0):
            return f"{name} is {total:.3g} over all peers, whose numbers sum to {size:.3g}"
    return None
