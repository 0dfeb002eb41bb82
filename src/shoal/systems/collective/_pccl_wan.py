"""What is claimed of measured links and of the order of the ring."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np

from shoal.base import keyed
from shoal.lab import discover
from shoal.lab.build import build
from shoal.lab.rows import Rows
from shoal.lab.scenario import Part, Scenario
from shoal.parts.collective.tour import Tour, link_cost, tour_cost

FAR_TRIP_S = 0.13
_RINGS = 100


def three_regions(scenario: Scenario) -> Scenario:
    """The wide area of this family in place of the scenario, with its number of connections."""
    world = discover.scenario("collective.three_regions")
    assert isinstance(scenario.links, Part)
    connections = dict(scenario.links.settings)["connections"]
    return replace(
        world.with_settings({"links.connections": connections}), seed=scenario.seed,
        engine=scenario.engine,
    )  # fmt: skip


def _rates(rows: Rows, arm: str, seed: int) -> np.ndarray:
    """Measured bit/s [peers, peers] of the peers that are in the ring; 0 where nothing is known."""
    run = rows.run(arm, seed)
    if run is None:
        return np.zeros((0, 0))
    rates = np.zeros((run.peers, run.peers))
    for row in run.series("bit_per_s"):
        rates[row.peer, int(dict(row.labels)["target"])] = row.value
    return rates[1:, 1:]


def _links(rows: Rows, arm: str, seed: int) -> Any:
    return build(rows.scenarios[arm, seed]).links


def _pairs(rates: np.ndarray) -> list[tuple[int, int]]:
    return [(a, b) for a in range(len(rates)) for b in range(len(rates)) if a != b]


def pool_gain(rows: Rows) -> dict[int, float]:
    """The least gain of 16 connections over 1 on a far pair that is not capped."""
    out = {}
    for seed in rows.seeds:
        one, pool = _rates(rows, "wan_1", seed), _rates(rows, "wan_16", seed)
        if not len(one) or not len(pool):
            out[seed] = math.nan
            continue
        links = _links(rows, "wan_16", seed)
        far = [
            (a, b)
            for a, b in _pairs(pool)
            if links.latency_of_s(a + 1, b + 1) + links.latency_of_s(b + 1, a + 1) > FAR_TRIP_S
            and links.path_of(a + 1, b + 1) > links.slow_bytes_per_s
        ]
        out[seed] = min(pool[pair] / one[pair] for pair in far)
    return out


def rate_error(rows: Rows) -> dict[int, float]:
    """The largest relative error of a measured rate against min(P W / RTT, cap, link)."""
    out = {}
    for seed in rows.seeds:
        worst = 0.0
        for arm in ("wan_1", "wan_16"):
            rates = _rates(rows, arm, seed)
            if not len(rates):
                worst = math.nan
                continue
            links = _links(rows, arm, seed)
            for a, b in _pairs(rates):
                ends = min(links.uplink_of(a + 1), links.downlink_of(b + 1))
                want = 8 * min(links.path_of(a + 1, b + 1), ends)
                worst = max(worst, abs(rates[a, b] / want - 1))
        out[seed] = worst
    return out


def _slowest(seconds: np.ndarray, order: tuple[int, ...]) -> float:
    place = np.array(order)
    return float(seconds[place, np.roll(place, -1)].max())


def _tour_time(rows: Rows, arm: str) -> dict[int, float]:
    """Time of the cheapest tour over that of the mean of 100 random rings, from measured rates;
    a ring takes 2 (n - 1) times its slowest edge."""
    out = {}
    for seed in rows.seeds:
        rates = _rates(rows, arm, seed)
        if not len(rates):
            out[seed] = math.nan
            continue
        cost = _costs(rates)
        drawn = [_slowest(cost, _random(len(rates), seed, k)) for k in range(_RINGS)]
        out[seed] = _slowest(cost, Tour().order(cost)) / float(np.mean(drawn))
    return out


def _costs(rates: np.ndarray) -> np.ndarray:
    cost = link_cost(rates)
    np.fill_diagonal(cost, 0.0)
    return cost


def _random(peers: int, seed: int, number: int) -> tuple[int, ...]:
    return tuple(sorted(range(peers), key=lambda p: keyed.uniform(seed, "random ring", number, p)))


def tour_time_pool(rows: Rows) -> dict[int, float]:
    """`_tour_time` with 16 connections."""
    return _tour_time(rows, "wan_16")


def tour_time_single(rows: Rows) -> dict[int, float]:
    """`_tour_time` with one connection."""
    return _tour_time(rows, "wan_1")


def reduce_time(rows: Rows) -> dict[int, float]:
    """All-reduce in the chosen order over the mean of the drawn orders, both as they ran."""
    out = {}
    for seed in rows.seeds:
        run = rows.run("wan_16", seed)
        if run is None:
            out[seed] = math.nan
            continue
        chosen = max(row.value for row in run.series("chosen_s"))
        drawn: dict[str, float] = {}
        for row in run.series("drawn_s"):
            draw = dict(row.labels)["draw"]
            drawn[draw] = max(drawn.get(draw, 0.0), row.value)
        out[seed] = chosen / float(np.mean(list(drawn.values()))) if drawn else math.nan
    return out


def tour_excess(rows: Rows) -> dict[int, float]:
    """How much more than the cheapest of all orders the tour over 2 to 8 peers costs, at most."""
    out = {}
    for seed in rows.seeds:
        rates = _rates(rows, "wan_16", seed)
        if not len(rates):
            out[seed] = math.nan
            continue
        worst = 0.0
        for peers in range(2, 9):
            some = sorted(range(len(rates)), key=lambda p: keyed.uniform(seed, "some", peers, p))[
                :peers
            ]
            cost = _costs(rates[np.ix_(some, some)])
            ways = np.array([(0, *way) for way in permutations(range(1, peers))])
            least = float(cost[ways, np.roll(ways, -1, axis=1)].sum(1).min())
            worst = max(worst, tour_cost(cost, Tour().order(cost)) / least - 1)
        out[seed] = worst
    return out
