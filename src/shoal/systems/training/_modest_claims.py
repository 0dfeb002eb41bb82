"""How MoDeST's claims are measured: fault lists made from a scenario, numbers from its rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from shoal.base import keyed
from shoal.lab.faults import FaultSetting, Round
from shoal.lab.rows import Rows, curve
from shoal.lab.scenario import Scenario
from shoal.lab.statistics import median
from shoal.world.record import Run

TARGET = 0.85
FIRST_CRASH = 40
CRASH_S = 700.0
"""When most peers go silent at once: somewhere within round 40 or so, as a rule in training."""
JOIN_ROUND = 20
JOINERS = 20
GONE = 0.8
WINDOW = 20


def _victims(scenario: Scenario) -> list[int]:
    """80% of the peers, in the order in which they go."""
    order = sorted(
        range(scenario.peers), key=lambda p: (keyed.uniform(scenario.seed, "victim", p), p)
    )
    return order[: round(GONE * scenario.peers)]


def one_by_one(scenario: Scenario) -> Scenario:
    """From round 40 on a peer goes silent every second round, until 80% are gone."""
    faults = tuple(
        FaultSetting("crash", who=(peer,), at=Round(FIRST_CRASH + 2 * i))
        for i, peer in enumerate(_victims(scenario))
    )
    return replace(scenario, faults=faults)


def at_once(scenario: Scenario) -> Scenario:
    """80% go silent at the same moment."""
    who = tuple(sorted(_victims(scenario)))
    return replace(scenario, faults=(FaultSetting("crash", who=who, at=CRASH_S),))


def joining(scenario: Scenario) -> Scenario:
    """The last twenty of the peers join at round 20."""
    who = tuple(range(scenario.peers - JOINERS, scenario.peers))
    return replace(scenario, faults=(FaultSetting("join", who=who, at=Round(JOIN_ROUND)),))


# Measures: Rows -> one number per seed.


def _each(rows: Rows, arm: str, number: Callable[[Run], float]) -> dict[int, float]:
    runs = {seed: rows.run(arm, seed) for seed in rows.seeds}
    return {seed: math.nan if run is None else number(run) for seed, run in runs.items()}


def _arrival(rows: Rows, arm: str, seed: int, axis: str) -> float:
    return rows.reach(arm, seed, "accuracy", TARGET, axis=axis, window=3)


def rounds_over_fedavg(rows: Rows) -> dict[int, float]:
    """Rounds to 85% accuracy, as a multiple of FedAvg's."""
    return {
        seed: _arrival(rows, "modest", seed, "round") / _arrival(rows, "fedavg", seed, "round")
        for seed in rows.seeds
    }


def _bytes_over(rows: Rows, other: str) -> dict[int, float]:
    return {
        seed: _arrival(rows, "modest_fast", seed, "bytes") / _arrival(rows, other, seed, "bytes")
        for seed in rows.seeds
    }


def bytes_over_regular(rows: Rows) -> dict[int, float]:
    """Bytes to 85% accuracy, each at its best rate, over D-PSGD's on a random 10-regular graph."""
    return _bytes_over(rows, "dpsgd_regular")


def bytes_over_exponential(rows: Rows) -> dict[int, float]:
    """The same against D-PSGD on the one-peer exponential graph."""
    return _bytes_over(rows, "dpsgd_exponential")


def round_starts(run: Run) -> list[tuple[int, float]]:
    """(round, when the first participant began to train in it), rounds that came in order."""
    first: dict[int, float] = {}
    for row in run.series("training"):
        first.setdefault(int(row.value), row.time_s)
    return sorted(first.items())


def gaps(run: Run) -> dict[int, float]:
    """Seconds from the beginning of each round to that of the next one that took place."""
    starts = round_starts(run)
    return {k: later - at for (k, at), (_, later) in pairwise(starts)}


def _usual_s(run: Run) -> float:
    """The median round before anything happened."""
    return median([gap for k, gap in gaps(run).items() if k < FIRST_CRASH])


def _worst(run: Run, low: int, high: float) -> float:
    """The longest gap of rounds low <= k < high in usual rounds; without any, the run halted."""
    found = [gap for k, gap in gaps(run).items() if low <= k < high]
    if not found:
        return run.virtual_s / _usual_s(run)
    return max(found) / _usual_s(run)


def stall_while_dying(rows: Rows) -> dict[int, float]:
    """Peers die one by one: the longest round, pings included, in median rounds of before."""
    return _each(rows, "one_by_one", lambda run: _worst(run, FIRST_CRASH, _forgotten(run)))


def _forgotten(run: Run) -> int:
    """The round from which on nobody's view holds a dead peer any more."""
    crashes = sum(1 for each in run.happenings if each.what == "crash")
    return FIRST_CRASH + 2 * crashes + WINDOW


def stall_afterwards(rows: Rows) -> dict[int, float]:
    """The same once the views have dropped the dead."""
    return _each(rows, "one_by_one", lambda run: _worst(run, _forgotten(run), math.inf))


def _gain(run: Run) -> float:
    """Accuracy at the end minus accuracy before the first crash, means of three rounds."""
    crash_s = min((each.time_s for each in run.happenings if each.what == "crash"), default=0.0)
    points = curve(run, "accuracy")
    before = [row.value for row in points if row.time_s <= crash_s][-3:]
    after = [row.value for row in points][-3:]
    return math.fsum(after) / len(after) - math.fsum(before) / len(before)


def gain_one_by_one(rows: Rows) -> dict[int, float]:
    """Accuracy that was won, or lost, from the first crash to the end."""
    return _each(rows, "one_by_one", _gain)


def _halted(run: Run) -> float:
    """1 when no later round than three after the crash has begun, else 0."""
    crash_s = min(each.time_s for each in run.happenings if each.what == "crash")
    at_crash = max(k for k, at in round_starts(run) if at <= crash_s)
    return float(max(k for k, _ in round_starts(run)) <= at_crash + 3)


def halts_bare(rows: Rows) -> dict[int, float]:
    """Whether the bare protocol stands still after 80% went silent at once."""
    return _each(rows, "at_once", _halted)


def halts_with_restart(rows: Rows) -> dict[int, float]:
    """The same with the restart rule."""
    return _each(rows, "at_once_restart", _halted)


def gain_with_restart(rows: Rows) -> dict[int, float]:
    """Accuracy that was won, or lost, from the crash to the end, with the restart rule."""
    return _each(rows, "at_once_restart", _gain)


def waits_of_joiners(rows: Rows) -> dict[int, float]:
    """The longest that a joiner waited to be sampled, in units of 5 n / s rounds."""
    return _each(rows, "join", _longest_wait)


def _longest_wait(run: Run) -> float:
    starts = round_starts(run)
    last = starts[-1][0]
    waits = []
    for joiner in range(run.peers - JOINERS, run.peers):
        trained = [int(row.value) for row in run.series("training", joiner)]
        waits.append((min(trained) if trained else last + 1) - JOIN_ROUND)
    return max(waits) * 10 / (5 * run.peers)


def views_with_joiners(rows: Rows) -> dict[int, float]:
    """The share of live views that hold a joiner ten rounds after it came, the worst joiner's."""
    return _each(rows, "join", _known)


def _known(run: Run) -> float:
    limit_s = dict(round_starts(run)).get(JOIN_ROUND + 10, run.virtual_s)
    who = range(run.peers - JOINERS, run.peers)
    met = dict.fromkeys(who, 0)
    for row in run.series("met"):
        if row.value in met and row.time_s <= limit_s:
            met[int(row.value)] += 1
    return min(met.values()) / (run.peers - 1)


def _load(run: Run) -> float:
    """Bytes sent and received by the busiest peer, over the mean."""
    each = [up + down for up, down in zip(run.bytes_sent, run.bytes_received, strict=True)]
    return max(each) * len(each) / sum(each)


def load_of_modest(rows: Rows) -> dict[int, float]:
    """The busiest peer's bytes, over the mean."""
    return _each(rows, "modest", _load)


def load_of_fedavg(rows: Rows) -> dict[int, float]:
    """The server's bytes over the mean, in units of half the number of peers."""
    return _each(rows, "fedavg", lambda run: _load(run) * 2 / run.peers)


def stall_of_fragile(rows: Rows) -> dict[int, float]:
    """sf = 1 and one aggregator, peers die one by one: the longest stand-still, to the end."""
    return _each(rows, "fragile", _standstill)


def _standstill(run: Run) -> float:
    starts = [at for _, at in round_starts(run)]
    spans = [later - at for at, later in zip(starts, [*starts[1:], run.virtual_s], strict=True)]
    return max(spans) / _usual_s(run)


# Invariants of a single run.


def _histories(run: Run, name: str) -> dict[int, list[list[int]]]:
    """Values of a series by peer, cut where the peer began without a memory."""
    found: dict[int, list[list[int]]] = {peer: [[]] for peer in range(run.peers)}
    for row in run.rows:
        if row.name == "fresh":
            found[row.peer].append([])
        elif row.name == name:
            found[row.peer][-1].append(int(row.value))
    return found


def _ascends(run: Run, name: str, what: str) -> str | None:
    for peer, lives in _histories(run, name).items():
        for life in lives:
            for before, after in pairwise(life):
                if after <= before:
                    return f"peer {peer} {what} {after} after {before}"
    return None


def trains_once_per_round(run: Run) -> str | None:
    """A peer trains at most once in a round, and in no earlier one than before."""
    return _ascends(run, "training", "trained in round")


def averages_once_per_round(run: Run) -> str | None:
    """An aggregator averages for a round at most once, and for no earlier one than before."""
    return _ascends(run, "averaged", "averaged for round")


def counts_nobody_twice(run: Run) -> str | None:
    """Every contributor of an average is counted once."""
    for row in run.series("averaged"):
        sources = dict(row.labels)["sources"].split()
        if len(set(sources)) != len(sources):
            return f"peer {row.peer} counted a contributor twice for round {row.value:.0f}"
    return None


def trained_what_was_averaged(run: Run) -> str | None:
    """Whoever is counted for round k + 1 has trained in round k, and before that average."""
    trained = {(row.peer, int(row.value)): row.time_s for row in reversed(run.series("training"))}
    for row in run.series("averaged"):
        for source in map(int, dict(row.labels)["sources"].split()):
            began_s = trained.get((source, int(row.value) - 1), math.inf)
            if began_s > row.time_s:
                return f"round {row.value:.0f} counts peer {source}, which had not trained for it"
    return None
