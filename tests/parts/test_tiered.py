"""Tiers: who waits for whom, what a tier counts, and what outlives a crash."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.lab.explore import explore
from shoal.parts import find
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous.learning import Even, Learning, Terms
from shoal.parts.asynchronous.local import Displacement
from shoal.parts.asynchronous.participation import Habits
from shoal.parts.asynchronous.rule import Advance, Delta, Moment, Send
from shoal.parts.asynchronous.tiered import PROFILE, Tiered, TieredCourse
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload
from shoal.testing.ladder import check_program
from shoal.world.faults import Crash, Fault, Slow
from shoal.world.links import Links
from shoal.world.network import Network

LINKS = Links(latency_s=0.05)
CLIENTS = (1, 2, 3, 4)


def delta(client: int, number: int = 1, version: int = 0) -> Delta:
    return Delta(9, client, number, version, 5, 1.0, 0.0, torch.ones(1))


def sent(actions: Any) -> list[int]:
    return [each.client for each in actions if isinstance(each, Send)]


def advances(actions: Any) -> list[Advance]:
    return [each for each in actions if isinstance(each, Advance)]


def hand_in(course: TieredCourse, client: int, at: Moment, number: int = 1) -> list[Any]:
    """A work and a request in one message, as clients do."""
    made = list(course.arrived(delta(client, number, at.version), at))
    return made + list(course.asked(client, Moment(at.now_s, at.version + len(advances(made)))))


def profiled(times: dict[int, float], tiers: int = 2) -> TieredCourse:
    course = Tiered(tiers=tiers).course(CLIENTS)
    for client in CLIENTS:
        assert sent(course.asked(client, Moment(0.0, 0))) == [client]
    order = sorted(times, key=times.__getitem__)
    for client in order[:-1]:
        assert hand_in(course, client, Moment(times[client], 0)) == []
    made = hand_in(course, order[-1], Moment(times[order[-1]], 0))
    (first,) = advances(made)
    assert sorted(each.client for each in first.deltas) == list(CLIENTS)
    assert first.weights == [0.25] * 4
    assert sorted(sent(made)) == list(CLIENTS)
    return course


def test_tiers_are_quantiles_of_speed_and_wait_for_themselves_alone() -> None:
    course = profiled({1: 8.0, 2: 1.0, 3: 2.0, 4: 9.0})
    assert course.tiers == ((2, 3), (1, 4))
    assert hand_in(course, 2, Moment(10.0, 1), 2) == []
    made = hand_in(course, 3, Moment(11.0, 1), 2)
    (version,) = advances(made)
    assert [each.client for each in version.deltas] == [2, 3]
    # Both tiers count the same as long as neither has made a version.
    assert version.weights == [0.25, 0.25]
    assert sorted(sent(made)) == [2, 3]


def test_slow_tiers_count_for_more() -> None:
    course = profiled({1: 8.0, 2: 1.0, 3: 2.0, 4: 9.0})
    for number in range(2, 5):
        hand_in(course, 2, Moment(10.0 + number, number), number)
        made = hand_in(course, 3, Moment(10.0 + number, number), number)
    (version,) = advances(made)
    # Two versions of the fast tier and none of the slow one: (0 + 1) / (2 + 2), halved.
    assert version.weights == [0.125, 0.125]
    hand_in(course, 1, Moment(17.0, 5), 2)
    (version,) = advances(hand_in(course, 4, Moment(18.0, 5), 2))
    assert version.weights == [0.5 * 4 / 5] * 2


def test_a_tier_goes_on_without_the_dead() -> None:
    course = profiled({1: 8.0, 2: 1.0, 3: 2.0, 4: 9.0})
    assert course.due_s == math.inf
    hand_in(course, 2, Moment(10.0, 1), 2)
    assert course.due_s == pytest.approx(10.0 + 2.0 * 2.0)
    made = list(course.timed(Moment(course.due_s, 1)))
    assert [each.client for each in advances(made)[0].deltas] == [2]
    assert sent(made) == [2]
    assert course.due_s == math.inf


def test_the_first_round_ends_without_the_dead() -> None:
    course = Tiered(tiers=2).course(CLIENTS)
    for client in CLIENTS:
        course.asked(client, Moment(0.0, 0))
    hand_in(course, 2, Moment(1.0, 0))
    assert course.due_s == 1.0 + PROFILE**2
    hand_in(course, 3, Moment(2.0, 0))
    assert course.due_s == pytest.approx(2.0 + PROFILE * 2.0)
    made = list(course.timed(Moment(course.due_s, 0)))
    assert len(advances(made)) == 1
    # Whose time is not known is among the slowest.
    assert course.tiers == ((2, 3), (1, 4))


def test_a_crash_forgets_nothing_but_who_waits() -> None:
    course = profiled({1: 8.0, 2: 1.0, 3: 2.0, 4: 9.0})
    hand_in(course, 2, Moment(10.0, 1), 2)
    again = Tiered(tiers=2).course(CLIENTS)
    again.load(course.save(), [delta(2, 2, 1)])
    assert (again.tiers, again.made, again.due) == (course.tiers, course.made, course.due)
    assert again.asked(2, Moment(10.5, 1)) == []
    made = hand_in(again, 3, Moment(11.0, 1), 2)
    assert len(advances(made)) == 1
    assert sorted(sent(made)) == [2, 3]


@given(st.lists(st.tuples(st.sampled_from(CLIENTS), st.floats(0.0, 30.0)), max_size=60))
@settings(max_examples=80, deadline=None)
def test_each_work_is_used_once_whatever_the_order(events: list[tuple[int, float]]) -> None:
    course = Tiered(tiers=2).course(CLIENTS)
    at, numbers, used, made = Moment(0.0, 0), dict.fromkeys(CLIENTS, 0), [], 0
    for client, later_s in events:
        now_s = at.now_s + later_s
        while course.due_s <= now_s:
            due_s = course.due_s
            actions = course.timed(Moment(due_s, at.version))
            used += [each.name for version in advances(actions) for each in version.deltas]
            at = Moment(due_s, at.version + len(advances(actions)))
            assert course.due_s > due_s
        numbers[client] += 1
        made += 1
        actions = hand_in(course, client, Moment(now_s, at.version), numbers[client])
        used += [each.name for version in advances(actions) for each in version.deltas]
        at = Moment(now_s, at.version + len(advances(actions)))
    assert len(set(used)) == len(used)
    assert len(used) + len(course.held) == made


# As a program.


def learning(tiers: int = 2, versions: int = 12, peers: int = 6) -> Learning:
    task = find("tasks", "quadratics")(peers=peers)
    codec = find("transform", "identity")().bind(task.spec)
    load = Workload(task, find("aggregate", "mean")(), codec, versions, None, seed=3)
    return Learning(
        load, Tiered(tiers=tiers), Displacement(SGD(lr=0.1)), Habits(4), pace=Even(0.02),
        terms=Terms(patience_s=2.0, give_up_s=60.0),
    )  # fmt: skip


def run(*faults: Fault, **settings_: Any) -> Any:
    program = learning(**settings_)
    network = Network(6, links=LINKS, faults=faults)
    return simulate(program, network, seed=1, settings=EventSettings(horizon_s=2000.0))


def test_fast_tiers_make_more_versions_than_the_slow_one() -> None:
    found = run(Slow(who=(4, 5), at=0.0, factor=20.0), versions=20)
    assert found.finished
    works = [dict(row.labels)["works"].split() for row in found.series("applied")]
    counts = Counter(int(name.split(".")[1]) for names in works for name in names)
    assert counts[4] + counts[5] < 0.25 * (counts[1] + counts[2])
    assert [rule(found) for rule in audit.INVARIANTS] == [None] * len(audit.INVARIANTS)


def test_a_dead_client_holds_its_tier_up_for_a_while_alone() -> None:
    found = run(Crash(who=(3,), at=0.3), versions=10)
    assert found.finished
    assert len(found.series("applied")) == 10


def test_generated_faults_break_nothing() -> None:
    program = learning(versions=8)
    found = explore(
        lambda: program, Network(6, links=LINKS), seeds=24, horizon_s=1500.0,
        invariants=audit.INVARIANTS,
    )  # fmt: skip
    assert found.failures == ()


def test_the_ladder_of_programs() -> None:
    check_program(learning(), Network(6, links=LINKS), seed=3)


# Errors.


@pytest.mark.parametrize("bad", [{"tiers": 0}, {"lr": 0.0}, {"wait": 0.5}])
def test_wrong_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Tiered(**bad)


def test_more_tiers_than_clients_are_refused() -> None:
    with pytest.raises(UsageError, match="for 4 clients"):
        Tiered(tiers=5).course(CLIENTS)
