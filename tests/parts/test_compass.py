"""COMPASS: steps, groups and moments, checked on clients whose speeds are known exactly."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from math import inf, isclose
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.asynchronous.compass import Arrival, Assignment, Compass, CompassSettings

# Two clients whose numbers can be checked by hand: s = (1, 4) seconds per step.
FAST, SLOW = 0, 1


def pair(**changes: Any) -> Compass:
    """The slow one has created a group at 0, due at 400."""
    compass = Compass(CompassSettings(**changes), speeds={FAST: 1.0, SLOW: 4.0})
    made = compass.assign(SLOW, 0.0)
    assert (made.steps, made.group) == (100, 0)
    return compass


def test_the_first_group_is_due_after_all_steps_of_its_creator() -> None:
    group = pair(latest_factor=1.5).groups[0]
    assert (group.began_s, group.expected_s, group.latest_s) == (0.0, 400.0, 600.0)


def test_a_client_joins_if_it_can_make_enough_steps_and_creates_otherwise() -> None:
    joined = pair().assign(FAST, 300.0)
    assert (joined.steps, joined.group) == (100, 0)
    fewest = pair().assign(FAST, 380.0)
    assert (fewest.steps, fewest.group) == (20, 0)
    # At 390 there are 10 steps left; the group's next return would take 490, more than allowed.
    created = pair().assign(FAST, 390.0)
    assert (created.steps, created.group) == (100, 1)


def test_a_new_group_aims_at_the_next_return_of_an_older_one() -> None:
    """s = (1, 4); the fast client's group closes at 120 at the latest and is back 100 s later."""
    compass = Compass(CompassSettings(), speeds={FAST: 1.0, SLOW: 4.0})
    compass.assign(FAST, 0.0)
    made = compass.assign(SLOW, 30.0)
    # 70 s are left, 17 steps: too few. (120 + 100 * 1 - 30) / 4 = 47.5.
    assert (made.steps, made.group) == (47, 1)
    group = compass.groups[1]
    assert (group.expected_s, group.latest_s) == (30.0 + 188.0, 30.0 + 1.2 * 188.0)


def test_too_few_steps_until_the_next_return_are_raised_to_the_fewest() -> None:
    compass = Compass(CompassSettings(), speeds={FAST: 1.0, SLOW: 16.0})
    compass.assign(FAST, 0.0)
    # (120 + 100 - 10) / 16 = 13 steps.
    assert compass.assign(SLOW, 10.0).steps == 20


def test_the_group_with_the_most_steps_is_joined() -> None:
    compass = Compass(CompassSettings(), speeds={0: 1.0, 1: 4.0, 2: 2.0})
    compass.assign(0, 0.0)
    compass.assign(1, 30.0)
    # 70 s are left of the first group, 188 s of the second: 35 or 94 steps.
    made = compass.assign(2, 30.0)
    assert (made.steps, made.group) == (94, 1)


def test_speeds_are_smoothed_and_measured_per_step() -> None:
    compass = Compass(CompassSettings(momentum=0.9))
    assert compass.assign(5, 10.0) == Assignment(5, 100, 10.0, None)
    assert compass.returned(5, 60.0) is Arrival.SINGLE
    assert compass.speeds[5] == 0.5
    made = compass.assign(5, 60.0)
    compass.returned(5, 60.0 + made.steps * 0.6)
    assert isclose(compass.speeds[5], 0.1 * 0.5 + 0.9 * 0.6)


def test_who_comes_after_the_latest_moment_is_late_whether_or_not_the_timer_has_fired() -> None:
    for fired in (False, True):
        compass = pair()
        compass.assign(FAST, 300.0)
        assert compass.returned(FAST, 400.0) is Arrival.GROUPED
        assert (compass.full(), compass.due(479.9), compass.due_s) == ((), (), 480.0)
        if fired:
            assert compass.due(480.0) == (0,)
            assert compass.close(0) == (FAST,)
        assert compass.returned(SLOW, 500.0) is Arrival.LATE
        if not fired:
            # Nobody is missing any more.
            assert compass.full() == (0,)
            assert compass.close(0) == (FAST,)
        # A timer that fires on a closed group finds nothing to do.
        assert compass.close(0) == ()
        assert compass.due_s == inf


def test_a_dead_client_holds_up_nobody() -> None:
    compass = pair()
    compass.assign(FAST, 300.0)
    compass.returned(FAST, 400.0)
    compass.forget(SLOW)
    assert compass.full() == (0,)
    with pytest.raises(UsageError, match="client 1 returned, but has no assignment"):
        compass.returned(SLOW, 410.0)
    # Its speed is remembered for when it comes back.
    assert compass.speeds[SLOW] == 4.0


def test_a_client_that_begins_anew_leaves_its_group() -> None:
    compass = pair()
    made = compass.assign(SLOW, 100.0)
    assert made.group == 0
    assert made.steps == 75
    assert compass.groups[0].waiting == {SLOW}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"min_steps": 0}, "min_steps=0"),
        ({"min_steps": 101}, "min_steps=101, max_steps=100"),
        ({"latest_factor": 0.99}, "latest_factor=0.99"),
        ({"latest_factor": inf}, "latest_factor=inf"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"first_steps": 19}, "first_steps=19; need 20 to 100"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        CompassSettings(**changes)


@pytest.mark.parametrize("seconds", [0.0, -1.0, inf])
def test_speeds_that_cannot_be(seconds: float) -> None:
    with pytest.raises(UsageError, match="client 3 takes"):
        Compass(speeds={3: seconds})


def test_an_unknown_client_is_an_error() -> None:
    with pytest.raises(UsageError, match="client 9 returned"):
        Compass().returned(9, 1.0)


# A server around it, with clients of any speeds.


@dataclass
class World:
    """Clients that take `steps * speed * noise` seconds, and the server's rules."""

    speeds: tuple[float, ...]
    compass: Compass
    jitter: float = 0.0
    seed: int = 0
    now_s: float = 0.0
    assigned: list[Assignment] = field(default_factory=list)
    arrivals: list[tuple[Arrival, Assignment, float, float]] = field(default_factory=list)
    closed: list[tuple[int, ...]] = field(default_factory=list)
    queue: list[tuple[float, int]] = field(default_factory=list)

    def begin(self, client: int) -> None:
        made = self.compass.assign(client, self.now_s)
        self.assigned.append(made)
        noise = 1.0 + self.jitter * (2.0 * keyed.uniform(self.seed, client, len(self.assigned)) - 1)
        heapq.heappush(self.queue, (self.now_s + made.steps * self.speeds[client] * noise, client))

    def run(self, returns: int) -> None:
        for client in range(len(self.speeds)):
            self.begin(client)
        for _ in range(returns):
            while self.compass.due_s < self.queue[0][0]:
                self.now_s = self.compass.due_s
                self.close(self.compass.due(self.now_s))
            self.now_s, client = heapq.heappop(self.queue)
            made = self.compass.at_work[client]
            group = None if made.group is None else self.compass.groups.get(made.group)
            expected_s = inf if group is None else group.expected_s
            what = self.compass.returned(client, self.now_s)
            self.arrivals.append((what, made, self.now_s, expected_s))
            if what is not Arrival.GROUPED:
                self.begin(client)
            self.close(self.compass.full())

    def close(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            arrived = self.compass.close(number)
            self.closed.append(arrived)
            for client in arrived:
                self.begin(client)


speeds = st.lists(st.floats(0.05, 3.0), min_size=1, max_size=12).map(tuple)
rules = st.builds(
    CompassSettings,
    min_steps=st.integers(1, 20),
    max_steps=st.integers(20, 100),
    latest_factor=st.floats(1.01, 2.0),
)


@given(speeds=speeds, rule=rules)
@settings(max_examples=60, deadline=None)
def test_with_known_speeds_nobody_is_late_and_all_come_within_a_step(
    speeds: tuple[float, ...], rule: CompassSettings
) -> None:
    """Rounding down loses less than one of the client's own steps."""
    world = World(speeds, Compass(rule, speeds=dict(enumerate(speeds))))
    world.run(15 * len(speeds))
    for what, made, now_s, expected_s in world.arrivals:
        assert what is Arrival.GROUPED
        own_s = speeds[made.client]
        assert expected_s - own_s * (1 + 1e-6) < now_s <= expected_s * (1 + 1e-9)


@given(
    speeds=speeds, rule=rules, jitter=st.floats(0.0, 0.8), known=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_return_is_taken_once_and_every_client_goes_on(
    speeds: tuple[float, ...], rule: CompassSettings, jitter: float, known: bool, seed: int
) -> None:
    given_speeds = dict(enumerate(speeds)) if known else None
    world = World(speeds, Compass(rule, given_speeds), jitter, seed)
    world.run(12 * len(speeds))
    compass = world.compass
    assert all(rule.min_steps <= made.steps <= rule.max_steps for made in world.assigned)
    grouped = Counter(made.client for what, made, *_ in world.arrivals if what is Arrival.GROUPED)
    held = Counter(client for group in compass.groups.values() for client in group.arrived)
    assert Counter(client for group in world.closed for client in group) + held == grouped
    # Whoever is neither at work nor waiting in a group would be lost.
    assert sorted([*compass.at_work, *held]) == list(range(len(speeds)))
    for number, group in compass.groups.items():
        assert group.waiting == {c for c, made in compass.at_work.items() if made.group == number}
        assert group.waiting
    assert all(speed > 0 for speed in compass.speeds.values())


def test_equal_clients_settle_in_one_group() -> None:
    world = World((1.0,) * 6, Compass())
    world.run(6 * 8)
    assert {len(group) for group in world.closed} == {6}


def test_the_fastest_of_a_group_begin_again_first() -> None:
    compass = Compass(speeds={0: 1.0, 1: 0.5, 2: 0.5})
    compass.assign(0, 0.0)
    for client in (2, 1):
        assert compass.assign(client, 50.0).group == 0
    for client in (0, 2, 1):
        assert compass.returned(client, 100.0) is Arrival.GROUPED
    assert compass.close(0) == (1, 2, 0)


def test_it_goes_on_after_a_crash() -> None:
    compass = pair()
    compass.assign(FAST, 300.0)
    compass.returned(FAST, 400.0)
    restored = Compass(compass.settings)
    restored.load(compass.save())
    assert restored.save() == compass.save()
    assert restored.due_s == 480.0
    assert restored.close(0) == (FAST,)
    assert restored.returned(SLOW, 500.0) is Arrival.LATE
    # Numbers of groups do not begin anew.
    assert restored.assign(FAST, 500.0).group == 1
