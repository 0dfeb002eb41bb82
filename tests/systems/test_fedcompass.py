"""FedCompass: buffers around the scheduler, a single client, crashes, and real processes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from math import inf, isnan
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.cell import Cell
from shoal.lab.explore import explore
from shoal.lab.faults import FaultSetting
from shoal.lab.processes import run_processes
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts import find
from shoal.parts.asynchronous.compass import CompassSettings
from shoal.parts.asynchronous.local import Displacement
from shoal.parts.asynchronous.rule import Advance, Delta, Moment, Send
from shoal.parts.asynchronous.staleness import Staleness
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload
from shoal.systems.baselines.fedasync import FedAsync
from shoal.systems.training import _fedcompass_claims as measured
from shoal.systems.training._fedcompass_rule import CompassCourse, CompassRule
from shoal.systems.training.fedcompass import INVARIANTS, SYSTEM, FedCompass
from shoal.tensor import keyed
from shoal.testing.ladder import check_program
from shoal.world.device import Device
from shoal.world.faults import Crash, Slow
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

PEERS = 6
SPEEDS = {1: 1.0, 2: 1.1, 3: 2.0, 4: 3.3, 5: 4.0}
"""Times per step, in units of 0.01 s."""
STEP_S = 0.01
FEW: dict[str, Any] = {"min_steps": 4, "max_steps": 20, "batch_size": 4}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As engines compute; more threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def workload(
    peers: int = PEERS, seconds: float | None = 6.0, rounds: int | None = None
) -> Workload:
    task = find("tasks", "digits")(
        peers=peers, split="dirichlet", alpha=0.5, hidden=(), train_samples=300, seed=3
    )
    transform = find("transform", "identity")().bind(task.spec)
    return Workload(task, find("aggregate", "mean")(), transform, rounds, seconds, 3)


def world(program: Any, speeds: dict[int, float] | None = None) -> Network:
    slow = tuple(Slow(who=(c,), factor=f) for c, f in (speeds or SPEEDS).items())
    rate = program.step_cost.flops / STEP_S
    return Network(
        program.workload.task.peers, links=Links(latency_s=1e-6), device=Device(flops_per_s=rate),
        faults=slow,
    )  # fmt: skip


def run(what: Any, faults: tuple[Any, ...] = (), observer: Any = None, **changes: Any) -> Run:
    program = what.bind(workload(**changes))
    network = world(program)
    return simulate(
        program, replace(network, faults=(*network.faults, *faults)), seed=3, observer=observer,
        settings=EventSettings(batching="off", horizon_s=(program.workload.seconds or inf) + 60.0),
    )  # fmt: skip


def versions(found: Run) -> list[list[int]]:
    """The clients of every version."""
    return [
        [int(name.split(".")[1]) for name in dict(row.labels)["works"].split()]
        for row in found.series("applied")
    ]


# The course, without an engine: s = (1, 4), 20 to 100 steps.


def delta(client: int, number: int, version: int, steps: int = 100) -> Delta:
    return Delta(1, client, number, version, steps, 1.0, 0.0, torch.zeros(1))


def told(actions: Any) -> list[Any]:
    """Actions, and of versions (works, weights)."""
    return [
        ([each.number for each in action.deltas], list(action.weights))
        if isinstance(action, Advance) else action
        for action in actions
    ]  # fmt: skip


def measured_pair(**changes: Any) -> CompassCourse:
    """Both were measured: client 1 takes 1 s per step, client 4 takes 4. The slow one is in a
    group from 400 on, due at 800, the fast one joined at 700."""
    course = CompassRule(staleness=Staleness(decay="polynomial"), **changes).course((1, 4))
    for client in (1, 4):
        assert list(course.asked(client, Moment(0.0, 0))) == [Send(client, 100)]
    assert told(course.arrived(delta(1, 1, 0), Moment(100.0, 0))) == [([1], [0.5])]
    assert told(course.arrived(delta(4, 1, 0), Moment(400.0, 1)))[0][0] == [1]
    assert list(course.asked(4, Moment(400.0, 2))) == [Send(4, 100)]
    assert list(course.asked(1, Moment(700.0, 2))) == [Send(1, 100)]
    return course


def test_a_group_is_one_version_and_the_fastest_begin_again_first() -> None:
    course = measured_pair()
    assert course.arrived(delta(4, 2, 2), Moment(800.0, 2)) == []
    assert course.asked(4, Moment(800.0, 2)) == []
    actions = told(course.arrived(delta(1, 2, 2), Moment(800.0, 2)))
    assert actions[0] == ([2, 2], [0.5, 0.5])
    # The first creates a group of 100 s; in it the second has 25 steps.
    assert actions[1:] == [Send(1, 100), Send(4, 25)]
    assert course.due_s == 800.0 + 1.2 * 100


def test_a_late_work_waits_for_the_next_version_and_its_client_does_not() -> None:
    course = measured_pair()
    course.arrived(delta(1, 2, 2), Moment(800.0, 2))
    course.asked(1, Moment(800.0, 2))
    assert course.due_s == 400.0 + 1.2 * 400
    actions = told(course.timed(Moment(880.0, 2)))
    assert actions == [([2], [0.5]), Send(1, 100)]
    assert course.arrived(delta(4, 2, 2), Moment(900.0, 3)) == []
    (send,) = course.asked(4, Moment(900.0, 3))
    assert isinstance(send, Send)
    assert send.client == 4
    assert [each.number for each in course.general] == [2]
    # It is one version old when it counts.
    actions = told(course.arrived(delta(1, 3, 3), Moment(980.0, 3)))
    if actions == []:
        actions = told(course.timed(Moment(course.due_s, 3)))
    assert actions[0] == ([2, 3], [0.5 * 2**-0.5, 0.5])
    assert course.general == []


def test_a_timer_of_a_group_without_works_makes_no_version() -> None:
    course = measured_pair()
    assert list(course.timed(Moment(880.0, 2))) == []
    assert course.due_s == inf
    # Both come late now, and nobody waits for them.
    assert course.arrived(delta(1, 2, 2), Moment(881.0, 2)) == []
    assert [type(each) for each in course.asked(1, Moment(881.0, 2))] == [Send]


def test_works_per_step_with_the_variant_n() -> None:
    course = CompassRule(normalise=True).course((1, 4))
    for client in (1, 4):
        course.asked(client, Moment(0.0, 0))
    course.arrived(delta(1, 1, 0), Moment(100.0, 0))
    course.arrived(delta(4, 1, 0), Moment(400.0, 1))
    course.asked(4, Moment(400.0, 2))
    course.asked(1, Moment(700.0, 2))
    course.arrived(delta(4, 2, 2, steps=25), Moment(800.0, 2))
    actions = told(course.arrived(delta(1, 2, 2, steps=75), Moment(800.0, 2)))
    # The fast one's first.
    assert actions[0] == ([2, 2], [0.5 * 50 / 75, 0.5 * 50 / 25])


def test_momentum_of_the_server() -> None:
    rule = CompassRule(alpha=0.5, momentum=0.9)
    params, vectors = torch.zeros(2), torch.ones(1, 2)
    weight, clients = torch.ones(1, dtype=torch.float64), torch.tensor([1])
    state = rule.init(params, (1,))
    first, state = rule.step(params, state, vectors, weight, clients)
    second, _ = rule.step(first, state, vectors, weight, clients)
    assert first.tolist() == [0.5, 0.5]
    torch.testing.assert_close(second, torch.full((2,), 0.5 + 0.5 * 1.9))
    assert CompassRule().init(params, (1,)) is None


def test_it_goes_on_after_a_crash_with_what_it_kept() -> None:
    course = measured_pair()
    early, late = delta(4, 2, 2), delta(1, 9, 0)
    course.arrived(early, Moment(800.0, 2))
    course.general.append(late)
    again = CompassRule(staleness=Staleness(decay="polynomial")).course((1, 4))
    again.load(course.save(), [late, early])
    assert again.general == [late]
    assert again.asked(4, Moment(801.0, 2)) == []
    actions = told(again.arrived(delta(1, 2, 2), Moment(810.0, 2)))
    assert actions[0][0] == [9, 2, 2]
    assert again.save() != course.save()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FedCompass(min_steps=101), "min_steps=101, max_steps=100"),
        (lambda: FedCompass(latest_factor=0.9), "latest_factor=0.9"),
        (lambda: FedCompass(speed_momentum=0.0), "momentum=0.0"),
        (lambda: FedCompass(first_steps=5), "first_steps=5; need 20 to 100"),
        (lambda: FedCompass(alpha=0.0), "alpha=0.0"),
        (lambda: FedCompass(server_momentum=1.0), "momentum=1.0"),
        (lambda: CompassRule(importances=(0.5, 0.2)).course((1, 2)), "sum 0.7"),
        (lambda: FedAsync(alpha=1.5), "alpha=1.5"),
    ],
)
def test_settings_that_cannot_work(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


# On the event engine.


class Models:
    """Every model that the server recorded, by version."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
        if peer == 0:
            self.found[round] = params

    def rows(self) -> list[Row]:
        return []


def test_a_single_client_is_sgd_with_mixing() -> None:
    """Invariant: w <- w + alpha (w_local - w), of as many steps as there may be."""
    what = FedCompass(alpha=0.9, lr=0.2, **FEW)
    program = what.bind(workload(peers=2, seconds=None, rounds=4))
    seen = Models()
    simulate(
        program, world(program, {1: 1.0}), seed=3, observer=seen,
        settings=EventSettings(batching="off"),
    )  # fmt: skip
    load = program.workload
    work, model = Displacement(SGD(0.2), 4), load.initial
    steps = torch.tensor(20, dtype=torch.int64)
    for number in range(1, 5):
        key = keyed.key_of(3, "peer", 1, "work", number)
        model = model + 0.9 * work(load.task, model, load.task.shard(1), key, steps)
        torch.testing.assert_close(seen.found[number - 1], model, rtol=1e-6, atol=1e-7)


def test_clients_are_measured_and_then_return_together() -> None:
    found = run(FedCompass(**FEW), seconds=6.0)
    works = versions(found)
    # First everybody alone, with the most steps.
    assert works[:1] == [[1]]
    late = works[len(works) // 2 :]
    assert max(map(len, late)) >= 3
    assert sum(map(len, late)) / len(late) > 1.5
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    counts = {row.name: row.value for row in found.rows if row.name.startswith("works_")}
    assert counts["works_duplicate"] == counts["works_refused"] == counts["works_stale"] == 0
    # Every work made counts once or is kept: conservation.
    assert counts["works_taken"] == counts["works_applied"] + counts["works_kept"]
    assert counts["works_taken"] == sum(map(len, works)) + counts["works_kept"]


def test_equal_clients_are_one_group() -> None:
    program = FedCompass(**FEW).bind(workload(seconds=4.0))
    found = simulate(
        program, world(program, dict.fromkeys(range(1, PEERS), 1.0)), seed=3,
        settings=EventSettings(horizon_s=60.0),
    )  # fmt: skip
    works = versions(found)
    assert all(len(each) == 1 for each in works[: PEERS - 1])
    assert all(sorted(each) == list(range(1, PEERS)) for each in works[PEERS - 1 :])
    staleness = [row.value for row in found.series("staleness")][PEERS - 1 :]
    # Models of the first versions, one for each client, are 4 to 0 versions old.
    assert staleness[0] == 2.0
    assert set(staleness[1:]) == {0.0}


def test_a_dead_client_is_left_out_when_its_group_closes() -> None:
    found = run(FedCompass(**FEW), (Crash(who=(1,), at=2.0),), seconds=8.0)
    times = [row.time_s for row in found.series("applied")]
    assert max(times) > 7.0
    ends = [works for works, time_s in zip(versions(found), times, strict=True) if time_s > 3.0]
    assert ends
    assert all(1 not in works for works in ends)
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)


def test_a_server_that_comes_back_knows_its_groups() -> None:
    found = run(FedCompass(patience_s=0.5, **FEW), (Crash(who=(0,), at=3.0, until=3.4),))
    works = versions(found)
    assert len(works) > 10
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    after = [w for w, row in zip(works, found.series("applied"), strict=True) if row.time_s > 4.5]
    assert max(map(len, after)) >= 3


@pytest.mark.parametrize("what", [FedCompass(**FEW), FedAsync(steps=5, batch_size=4)])
def test_the_ladder(what: Any) -> None:
    program = what.bind(workload(seconds=None, rounds=10))
    found = check_program(program, world(program), seed=3)
    assert found.finished


@pytest.mark.parametrize("what", [FedCompass(**FEW), FedAsync(steps=5, batch_size=4)])
def test_generated_faults_break_nothing(what: Any) -> None:
    program = what.bind(workload(seconds=None, rounds=12))
    found = explore(
        lambda: program, world(program), seeds=12, horizon_s=5000.0, invariants=INVARIANTS,
        first_seed=700,
    )  # fmt: skip
    assert found.failures == ()
    assert found.ended == {}


def test_a_local_model_is_mixed_in() -> None:
    rule = FedAsync(alpha=0.8).rule
    weight = torch.tensor([rule.staleness.weight(3)], dtype=torch.float64)
    mixed, _ = rule.step(torch.zeros(2), None, torch.ones(1, 2), weight, torch.tensor([1]))
    torch.testing.assert_close(mixed, torch.full((2,), 0.8 * 0.5))


# On sockets, and between processes.


@pytest.mark.live
def test_on_sockets() -> None:
    program = FedCompass(patience_s=1.0, **FEW).bind(workload(seconds=None, rounds=12))
    found = run_live(program, Network(PEERS), seed=3, settings=LiveSettings(horizon_s=50.0))
    assert found.finished
    assert len(versions(found)) == 12
    assert sorted(found.final) == list(range(PEERS))
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.timeout(180)
def test_between_processes_of_which_one_is_killed_for_good() -> None:
    """Wall time is the scheduler's clock; the group of the dead client closes without it."""
    scenario = Scenario(
        "up", peers=4, rounds=60, eval_every=10,
        task={"name": "digits", "hidden": [], "train_samples": 400},
        faults=(FaultSetting("crash", who=(3,), at=1.0),),
    )  # fmt: skip
    settings = {"min_steps": 20, "max_steps": 400, "batch_size": 8, "patience_s": 1.0}
    cell = Cell("fedcompass", 0, scenario, system="fedcompass", settings=tuple(settings.items()))
    found = run_processes(cell)
    works = versions(found)
    assert len(works) == 60
    assert {1, 2} <= {client for each in works for client in each}
    assert any(len(each) > 1 for each in works)
    problems = [problem for rule in INVARIANTS if (problem := rule(found))]
    # What the dead client said of itself last may have died with it: the name of one work.
    assert all(re.search(r"work \d+\.3\.\d+, which nobody made", each) for each in problems)
    accuracy = [row.value for row in found.series("mean_model_accuracy")]
    assert accuracy[-1] > 0.7


# The card.


def test_worlds_of_unequal_clients() -> None:
    scenario = Scenario("s", peers=11, seconds=40.0, seed=5, task={"name": "digits"})
    for prepare in (measured.equal, measured.spread, measured.exponential):
        made = prepare(scenario)
        slow = [(f.who, f.at, f.until, dict(f.settings)["factor"]) for f in made.faults]
        by_client = {client: [s for s in slow if s[0] == (client,)] for client in range(1, 11)}
        for spans in by_client.values():
            # One span after the other, to the end.
            assert spans[0][1] == 0.0
            assert all(a[2] == b[1] for a, b in pairwise(spans))
            assert spans[-1][2] is None
            factors = [span[3] for span in spans]
            assert max(factors) / min(factors) < 1.6
        assert dict(made.task.settings)["holders"] == tuple(range(1, 11))
        assert made.seconds is not None
        assert made.seconds >= 40.0 * 0.8
    drawn = measured.factors(scenario, lambda u, n: 100.0 * u)
    assert all(measured.FASTEST <= each <= measured.SLOWEST for each in drawn.values())
    assert len(set(measured.factors(scenario, lambda u, n: u).values())) > 1


def test_measures_on_a_history_known_by_hand() -> None:
    def history(scale: float, late: float, top: float) -> Run:
        rows = [Row("mean_model_accuracy", min(top, 0.1 * n), scale * n, n) for n in range(11)]
        for n in range(4):
            names = " ".join(f"1.{c}.{n}" for c in range(1, 2 + n % 2))
            rows.append(Row("applied", n + 1, scale * n, n, 0, (("works", names),)))
            rows.append(Row("staleness", late, scale * n, n, 0))
        rows += [Row("busy_s", 5.0 * scale, 10.0 * scale, 0, peer) for peer in (1, 2)]
        rows.append(Row("made", 0, scale, 0, 1, (("work", "1.1.0"),)))
        return Run("event", 0, 3, rows=rows, virtual_s=10.0 * scale)

    arms = tuple(SYSTEM.arms)
    runs = {(arm, 0): history(2.0, 4.0, 0.95) for arm in arms}
    runs["fedcompass", 0] = history(1.0, 1.0, 1.0)
    world = Scenario("s", peers=3, seconds=1.0, task={"name": "digits"}, device="device")
    scenarios = {(arm, 0): measured.exponential(world) for arm in arms}
    rows = Rows(runs, arms, (0,), scenarios)
    assert measured.over_fedavg(rows)[0] == pytest.approx(0.5)
    assert measured.over_fedbuff_medians(rows)[0] == pytest.approx(0.5)
    assert measured.staleness_over_fedasync(rows)[0] == pytest.approx(0.25)
    assert measured.like_fedavg(rows)[0] == pytest.approx(1.0)
    assert measured.idle_over_fedavg(rows)[0] == pytest.approx(1.0)
    # The horizon is less than three rounds of the slowest, so all of it counts.
    assert measured.last_accuracy(rows, "fedcompass", 0) == pytest.approx(0.45)
    assert measured.works_of_clients(rows)["client 1"] == [(0.0, 1.0)]
    # A run that is missing is no number: the verdict is then "inconclusive", never an exception.
    missing = Rows({("fedcompass_spread", 0): runs["fedcompass", 0]}, arms, (0,))
    for claim in SYSTEM.claims:
        assert claim.measure is not None
        assert isnan(claim.measure(missing)[0])


def test_the_settings_of_the_scheduler_are_those_of_the_system() -> None:
    rule = FedCompass(min_steps=5, max_steps=50, latest_factor=1.5, speed_momentum=0.5).rule()
    assert rule.compass == CompassSettings(5, 50, 1.5, 0.5)
