"""The order of a ring: exact and local search, and the long one beside the master's work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.event.simulation import EventSettings, simulate
from shoal.lab.explore import explore
from shoal.parts.collective._errors import CollectiveError
from shoal.parts.collective._orders import Orders
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.master import Master
from shoal.parts.collective.search import ELEMENT_S, Search
from shoal.parts.collective.tour import Tour, cheapest, done_here, improved, link_cost, tour_cost
from shoal.tensor.threads import one_thread
from shoal.world.device import Device
from shoal.world.faults import Crash, Fault, Slow
from shoal.world.links import Measured
from shoal.world.network import Network
from shoal.world.record import Run


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


def costs(peers: int, seed: int, most: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if most:
        return generator.integers(1, most + 1, (peers, peers)).astype(float)
    return generator.uniform(1.0, 100.0, (peers, peers))


@given(peers=st.integers(2, 7), seed=st.integers(0, 1000), most=st.sampled_from([0, 1, 3]))
@settings(max_examples=60)
def test_the_exact_tour_costs_what_the_cheapest_of_all_orders_does(
    peers: int, seed: int, most: int
) -> None:
    cost = costs(peers, seed, most)
    least = min(tour_cost(cost, (0, *way)) for way in itertools.permutations(range(1, peers)))
    order = done_here(cheapest(cost))
    assert order[0] == 0
    assert sorted(order) == list(range(peers))
    assert tour_cost(cost, order) == pytest.approx(least, rel=1e-12)


@given(peers=st.integers(2, 9), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_a_step_is_the_best_of_all_exchanges_and_reversals(peers: int, seed: int) -> None:
    cost = costs(peers, seed)
    tour = tuple(range(peers))
    ways = [tour]
    for i, j in itertools.combinations(range(1, peers + 1), 2):
        ways.append(tour[:i] + tour[i:j][::-1] + tour[j:])
        ways += [tour[:i] + tour[j:k] + tour[i:j] + tour[k:] for k in range(j + 1, peers + 1)]
    least = min(tour_cost(cost, way) for way in ways)
    after = improved(torch.from_numpy(cost), torch.arange(peers), 1)
    assert sorted(after.tolist()) == list(range(peers))
    assert tour_cost(cost, tuple(after.tolist())) == pytest.approx(least, rel=1e-12)


def test_blocks_of_moves_do_not_change_the_step() -> None:
    """60 peers make several blocks; the best exchange is planted in the last of them."""
    peers = 60
    cost = torch.full((peers, peers), 50.0, dtype=torch.float64)
    place = torch.arange(peers)
    cost[place, place.roll(-1)] = 10.0
    # Exchanging [50:53] and [53:57] makes three edges free of cost.
    for a, b in ((49, 53), (56, 50), (52, 57)):
        cost[a, b] = 0.0
    after = improved(cost, place, 1).tolist()
    assert after == [*range(50), 53, 54, 55, 56, 50, 51, 52, *range(57, peers)]


def test_a_long_search_finds_the_cheapest_tour_where_the_quick_one_does_not() -> None:
    better = 0
    for seed in range(4):
        cost = costs(14, seed)
        quick = Tour(exact=4).order(cost)
        kept: list[Any] = []
        found = done_here(Search().perturbed(cost, quick, kept.append))
        least = tour_cost(cost, done_here(cheapest(cost)))
        assert tour_cost(cost, found) == pytest.approx(least)
        assert all(sorted(order) == list(range(14)) and order[0] == 0 for order in kept)
        better += tour_cost(cost, quick) > least * (1 + 1e-9)
    assert better >= 1


def test_a_quick_tour_keeps_to_its_effort() -> None:
    cost = costs(100, 1)
    little, more = Tour(effort=1).order(cost), Tour().order(cost)
    assert sorted(little) == sorted(more) == list(range(100))
    assert tour_cost(cost, more) < tour_cost(cost, little)


# Beside a master.


@dataclass(frozen=True)
class Optimises:
    """Groups of `shard` peers; each optimises twice, `pause_s` apart, and between the two the peers
    in `goes` leave."""

    peers: int
    shard: int = 100
    pause_s: float = 5.0
    goes: tuple[int, ...] = ()
    end: dict[int, Any] = field(default_factory=dict, compare=False)

    async def run(self, peer: Any) -> None:
        async with Communicator(peer, 0, group=(peer.id - 1) // self.shard) as group:
            while group.everybody < self.peers and peer.now() < 5.0:
                await group.update_topology()
                await peer.sleep_until(peer.now() + 0.1)
            await group.optimize_topology(1 << 12)
            first = group.ring
            if peer.id in self.goes:
                return
            await peer.sleep_until(peer.now() + self.pause_s)
            await group.optimize_topology(1 << 12)
            self.end[peer.id] = (first, group.ring, group.rates)


def trips() -> tuple[tuple[float, ...], ...]:
    """One-way times of peers 1 to 14 and 15 to 28, in each of which the quick tour is some percent
    off, which a test checks; peer 0 is the master."""
    table = np.full((29, 29), 0.02)
    for start, seed in ((1, 0), (15, 5)):
        block = np.random.default_rng(seed).uniform(0.002, 0.06, (14, 14))
        table[start : start + 14, start : start + 14] = (block + block.T) / 2
    return tuple(map(tuple, table.tolist()))


LINKS = Measured(trips(), window_bytes=65536.0, uplink_bytes_per_s=1e9)


def optimise(program: Optimises, faults: tuple[Fault, ...] = (), seed: int = 0,
             **settings: float) -> Run:  # fmt: skip
    return simulate(
        lambda peer: program if peer else Master(**{"end_s": 200.0, **settings}),
        Network(program.peers + 1, links=LINKS, faults=faults, device=Device(flops_per_s=1e9)),
        seed=seed, settings=EventSettings(strict=True, horizon_s=300.0),
    )  # fmt: skip


def rings(program: Optimises, group: int = 0) -> tuple[float, float, float]:
    """Cost of the first ring and of the second, and of the cheapest one, by what was measured."""
    members = [p for p in sorted(program.end) if (p - 1) // program.shard == group]
    rate = np.zeros((len(members), len(members)))
    for row, peer in enumerate(members):
        for column, other in enumerate(members):
            rate[row, column] = program.end[peer][2].get(other, 0.0)
    cost = link_cost(rate)
    np.fill_diagonal(cost, 0.0)
    first, second, _ = program.end[members[0]]
    assert all(program.end[peer][:2] == (first, second) for peer in members)
    least = tour_cost(cost, done_here(cheapest(cost)))
    first, second = ([members.index(p) for p in ring if p in members] for ring in (first, second))
    return tour_cost(cost, tuple(first)), tour_cost(cost, tuple(second)), least


def test_the_next_call_adopts_what_was_found_meanwhile() -> None:
    program = Optimises(14)
    run = optimise(program)
    assert run.finished
    assert not run.series("dropped")
    first, second, least = rings(program)
    assert second == pytest.approx(least, rel=1e-9)
    assert first > least * 1.005
    assert [row.value for row in run.series("adopted")] == [0.0]


def test_without_a_search_or_with_other_members_nothing_is_adopted() -> None:
    program = Optimises(14)
    run = optimise(program, search_s=0.0)
    first, second, _ = rings(program)
    assert second == pytest.approx(first, rel=0.01)
    assert not run.series("adopted")
    fewer = optimise(Optimises(14, goes=(4,)))
    assert fewer.finished
    assert not fewer.series("adopted")
    died = optimise(Optimises(14, pause_s=8.0), (Crash(who=(4,), at=6.0),))
    assert died.finished
    assert not died.series("adopted")


def test_each_group_is_searched_for() -> None:
    program = Optimises(28, shard=14)
    run = optimise(program)
    assert run.finished
    assert sorted(row.value for row in run.series("adopted")) == [0.0, 1.0]
    for group in range(2):
        first, second, least = rings(program, group)
        assert first > second == pytest.approx(least, rel=1e-9)


def test_equal_seeds_give_equal_runs() -> None:
    runs, ends = [], []
    for _ in range(2):
        program = Optimises(14)
        runs.append(optimise(program, seed=3).trace_digest)
        ends.append(program.end)
    assert runs[0] == runs[1]
    assert ends[0] == ends[1]


def test_reports_are_heard_while_a_slow_master_searches() -> None:
    """A device a thousand times slower searches for long, and nobody is dropped for it."""
    slow = Slow(who=(0,), at=0.0, factor=1000.0)
    program = Optimises(14, pause_s=2.0)
    run = optimise(program, (slow,))
    assert run.finished
    assert not run.series("dropped")
    # Nothing was found in two seconds.
    assert not run.series("adopted")
    first, second, _ = rings(program)
    assert second == pytest.approx(first, rel=0.01)


@dataclass(frozen=True)
class Tolerant:
    """What may happen to a peer under faults is no failure."""

    program: Optimises

    async def run(self, peer: Any) -> None:
        try:
            await self.program.run(peer)
        except CollectiveError:
            peer.record("lost", 1.0)


def test_faults_in_the_midst_of_a_search_hang_nobody() -> None:
    """The master's death, restart and leave among them; its device is slow, so that it searches
    for seconds."""
    slow = Slow(who=(0,), at=0.0, factor=300.0)
    program = Optimises(14, pause_s=3.0)

    def make() -> Any:
        master = Master(end_s=40.0, diverged_s=5.0)
        return lambda peer: master if peer == 0 else Tolerant(program)

    network = Network(15, links=LINKS, faults=(slow,), device=Device(flops_per_s=1e9))
    found = explore(make, network, seeds=12, horizon_s=200.0, rounds=0, window_s=6.0)
    assert not found.failures, found.failures[0].to_data()
    assert not found.ended
    assert found.traces >= 8


@dataclass(frozen=True)
class Alone:
    """Searches, with nobody else there."""

    cost: Any
    search: Search
    stops_s: float = float("inf")
    end: list[Any] = field(default_factory=list, compare=False)

    async def run(self, peer: Any) -> None:
        known = tuple(range(len(self.cost)))
        found = await self.search.run(peer, self.cost, known, lambda: peer.now() < self.stops_s)
        self.end.extend((found, peer.now()))


def alone(peers: int, search: Search, stops_s: float = float("inf")) -> tuple[Any, float, float]:
    program = Alone(costs(peers, 5), search, stops_s)
    assert simulate(program, Network(1), settings=EventSettings(strict=True)).finished
    found, at_s = program.end
    return found, at_s, float("nan") if found is None else tour_cost(program.cost, found)


def test_time_runs_out_by_the_stated_cost() -> None:
    known = tour_cost(costs(40, 5), tuple(range(40)))
    found, at_s, short = alone(40, Search(seconds=0.1))
    assert found is not None
    assert 0.1 <= at_s <= 0.1 + 2 * (1 << 20) * ELEMENT_S
    _, later_s, long = alone(40, Search(seconds=1.0))
    assert 1.0 <= later_s <= 1.1
    assert long < short < known
    assert alone(40, Search(seconds=0.1)) == (found, at_s, short)
    # The exact search has nothing before its end.
    assert alone(15, Search(seconds=0.001))[0] is None
    assert alone(15, Search(seconds=10.0))[0] is not None
    # Not wanted any more.
    assert alone(40, Search(seconds=1.0), stops_s=0.2)[1] < 0.3


def test_an_answer_to_an_old_question_is_of_no_use() -> None:
    orders = Orders(searches=True)
    members = tuple((peer, 1) for peer in range(14))
    orders.best(0, members)
    asked = orders.open_question()
    assert asked is not None
    assert orders.wants(asked)
    orders.changed(0)
    assert not orders.wants(asked)
    orders.answered(asked, tuple(range(14)))
    assert orders.open_question() is None
    assert orders.best(0, members)[1] is False


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Search(seconds=0.0), "seconds=0.0"), (lambda: Search(exact=21), "exact=21"),
        (lambda: Search(kicks=0), "kicks=0"), (lambda: Tour(exact=21), "exact=21"),
        (lambda: Tour(effort=0), "effort=0"), (lambda: Master(search_s=-1.0), "search_s=-1.0"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()
