"""FedFix and asynchronous averaging: weights, instants, and that a long period is FedAvg."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isnan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.explore import explore
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts import find
from shoal.parts.asynchronous.buffered import weighted_sum
from shoal.parts.asynchronous.local import Displacement
from shoal.parts.asynchronous.rule import Advance, Delta, Moment, Send
from shoal.parts.asynchronous.schedule import EachReturn, FixedTimes, analyze_schedule
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.workload import Workload
from shoal.systems.training import _fedfix_claims as measured
from shoal.systems.training import async_fedavg, fedfix
from shoal.systems.training._fedfix_rule import FixedTimesRule
from shoal.systems.training.async_fedavg import AsyncFedAvg, EachReturnRule
from shoal.systems.training.fedfix import FedFix
from shoal.tensor import keyed
from shoal.testing.ladder import check_program
from shoal.world.device import Device
from shoal.world.faults import Crash, Slow
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

PEERS = 6
CLIENTS = range(1, PEERS)
TAUS = {client: 1.0 - 0.2 * (client - 1) for client in CLIENTS}
"""Seconds per work: 1, 0.8, 0.6, 0.4, 0.2."""
LINKS = Links(latency_s=1e-4)


def workload(seconds: float | None = 6.0, rounds: int | None = None, seed: int = 3) -> Workload:
    task = find("tasks", "digits")(
        peers=PEERS, split="dirichlet", alpha=0.5, hidden=(), train_samples=300, seed=seed
    )
    transform = find("transform", "identity")().bind(task.spec)
    return Workload(task, find("aggregate", "mean")(), transform, rounds, seconds, seed)


def world(program: Any, **changes: Any) -> Network:
    """A work of five steps takes a client 0.998 of its time in `TAUS`."""
    rate = 5 * program.step_cost.flops / 0.998
    slow = tuple(Slow(who=(client,), factor=tau) for client, tau in TAUS.items())
    return replace(
        Network(PEERS, links=LINKS, device=Device(flops_per_s=rate), faults=slow), **changes
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As engines compute; more threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Models:
    """Every model that the server recorded, by version."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
        if peer == 0:
            self.found[round] = params

    def rows(self) -> list[Row]:
        return []


def run(what: Any, *, observer: Any = None, batching: str = "off", **changes: Any) -> Run:
    program = what.bind(workload(**changes))
    horizon_s = program.workload.seconds or inf
    return simulate(
        program, world(program), seed=3, observer=observer,
        settings=EventSettings(batching=batching, horizon_s=horizon_s + 30.0),
    )  # fmt: skip


def applied(found: Run) -> list[tuple[float, list[int]]]:
    """(time, clients) of every version."""
    return [
        (row.time_s, [int(name.split(".")[1]) for name in dict(row.labels)["works"].split()])
        for row in found.series("applied")
    ]


# The rules, without an engine.


def delta(client: int, number: int, version: int = 0) -> Delta:
    return Delta(1, client, number, version, 5, 1.0, 0.0, torch.zeros(1))


def told(actions: Any) -> list[Any]:
    """Actions, and of versions the weights."""
    return [list(each.weights) if isinstance(each, Advance) else each for each in actions]


def drive(course: Any, taus: dict[int, float], steps: int) -> list[tuple[float, dict[int, float]]]:
    """(time, client -> weight) of the first versions, with clients who return on time."""
    due: dict[int, float] = {}
    numbers = dict.fromkeys(taus, 1)
    started: dict[int, int] = {}
    found: list[tuple[float, dict[int, float]]] = []

    def carry(actions: Any, now_s: float) -> None:
        for action in actions:
            if isinstance(action, Advance):
                pairs = zip(action.deltas, action.weights, strict=True)
                found.append((now_s, {each.client: weight for each, weight in pairs}))
            elif isinstance(action, Send):
                due[action.client] = now_s + taus[action.client]
                started[action.client] = len(found)

    for client in taus:
        carry(course.asked(client, Moment(0.0, 0)), 0.0)
    while len(found) < steps:
        client = min(due, key=lambda each: (round(due[each], 9), each), default=-1)
        if course.due_s < due.get(client, inf) - 1e-9:
            now_s = course.due_s
            carry(course.timed(Moment(now_s, len(found))), now_s)
            continue
        now_s = due.pop(client)
        at = Moment(now_s, len(found))
        carry(course.arrived(delta(client, numbers[client], started[client]), at), now_s)
        numbers[client] += 1
        carry(course.asked(client, Moment(now_s, len(found))), now_s)
    return found


def test_a_version_per_return_in_the_order_of_clients() -> None:
    """tau = (1, 0.5): client 1 at 0.5, then clients 0 and 1; weights 1.5 and 0.75."""
    course = EachReturnRule().course((0, 1))
    found = drive(course, {0: 1.0, 1: 0.5}, 9)
    assert [(time_s, *weights) for time_s, weights in found[:3]] == [(0.5, 1), (1.0, 0), (1.0, 1)]
    # Until the slow one is back, it is only known that it takes longer.
    assert found[0][1][1] == pytest.approx(0.5 * 0.5 * (2.0 + 2.0))
    weights = {client: weight for _, each in found[3:] for client, weight in each.items()}
    assert weights == {0: pytest.approx(1.5), 1: pytest.approx(0.75)}


def test_the_weights_are_those_of_the_analysis() -> None:
    taus = {i: 1.0 - i * 0.8 / 19 for i in range(20)}
    wanted = analyze_schedule(tuple(taus.values()), (0.05,) * 20, EachReturn()).weights
    found = drive(EachReturnRule().course(tuple(taus)), taus, 200)
    for _, each in found[-60:]:
        for client, weight in each.items():
            assert weight == pytest.approx(wanted[client], rel=1e-6)
    same = drive(EachReturnRule("identical").course(tuple(taus)), taus, 50)
    assert {weight for _, each in same for weight in each.values()} == {1.0}


@given(
    taus=st.lists(st.floats(0.05, 3.0), min_size=1, max_size=6), period_s=st.floats(0.1, 2.0),
    parts=st.lists(st.floats(0.05, 1.0), min_size=6, max_size=6),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_weights_of_fixed_times_add_up_to_the_periods(
    taus: list[float], period_s: float, parts: list[float]
) -> None:
    """Invariant: of every client, to its importance times the periods of its finished works."""
    importances = tuple(part / sum(parts[: len(taus)]) for part in parts[: len(taus)])
    rule = FixedTimesRule(period_s, importances=importances, most_periods=10_000)
    found = drive(rule.course(range(len(taus))), dict(enumerate(taus)), 60)
    wanted = analyze_schedule(taus, importances, FixedTimes(period_s)).weights
    for client, importance in enumerate(importances):
        mine = [(time_s, each[client]) for time_s, each in found if client in each]
        if not mine:
            continue
        periods = round(mine[-1][0] / period_s)
        assert sum(weight for _, weight in mine) == pytest.approx(importance * periods)
        for _, weight in mine:
            assert weight == pytest.approx(wanted[client], rel=1e-6)


def test_who_was_away_for_long_makes_no_leap() -> None:
    course = FixedTimesRule(1.0, most_periods=7).course((1, 2))
    assert list(course.asked(1, Moment(0.0, 0))) == [Send(1)]
    for second in range(1, 50):
        assert list(course.timed(Moment(float(second), 0))) == []
    course.arrived(delta(1, 1), Moment(49.5, 0))
    assert course.asked(1, Moment(49.5, 0)) == []
    assert told(course.timed(Moment(50.0, 0))) == [[3.5], Send(1)]


def test_courses_go_on_after_a_crash() -> None:
    first = FixedTimesRule(1.0).course((1, 2))
    first.asked(1, Moment(0.0, 0))
    first.timed(Moment(1.0, 0))
    kept = delta(1, 1)
    first.arrived(kept, Moment(1.5, 0))
    again = FixedTimesRule(1.0).course((1, 2))
    again.load(first.save(), [kept])
    assert again.due_s == first.due_s == 2.0
    assert again.asked(1, Moment(1.7, 0)) == []
    assert told(again.timed(Moment(2.0, 0))) == [[1.0], Send(1)]
    each = EachReturnRule().course((1, 2))
    for client in (1, 2):
        each.asked(client, Moment(0.0, 0))
    each.arrived(kept, Moment(1.5, 0))
    other = EachReturnRule().course((1, 2))
    other.load(each.save(), [])
    assert other.takes_s(1, 2.0) == 1.5
    assert other.takes_s(2, 2.0) == 2.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FedFix(period_s=0.0), "period_s=0.0"),
        (lambda: FedFix(period_s=inf), "period_s=inf"),
        (lambda: FedFix(server_lr=-1.0), "lr=-1.0"),
        (lambda: FedFix(most_periods=0), "most_periods=0"),
        (lambda: AsyncFedAvg(weighting="none"), "weighting='none'"),
        (lambda: AsyncFedAvg(server_lr=0.0), "server_lr=0.0"),
        (lambda: FixedTimesRule(1.0, importances=(0.5, 0.6)).course((1, 2)), "sum 1.1"),
        (lambda: FixedTimesRule(1.0, importances=(1.0,)).course((1, 2)), "1 for 2 clients"),
        (lambda: EachReturnRule(importances=(1.5, -0.5)).course((1, 2)), "smallest -0.5"),
    ],
)
def test_settings_that_cannot_work(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


# On the event engine.


def key(client: int, number: int) -> Tensor:
    """What a client's draws of a work are keyed by."""
    return keyed.key_of(3, "peer", client, "work", number)


def test_a_period_of_the_slowest_is_fedavg_bit_for_bit() -> None:
    """Invariant: the same models, whatever the period, as long as everybody is back in time."""
    load = workload()
    task, work = load.task, Displacement(SGD(0.1), 8)
    steps = torch.tensor(5, dtype=torch.int64)
    expected = [load.initial]
    for number in range(1, 5):
        model = expected[-1]
        moved = [work(task, model, task.shard(c), key(c, number), steps) for c in CLIENTS]
        weights = torch.full((len(moved),), 1.0 / len(moved), dtype=torch.float64)
        expected.append(model + weighted_sum(torch.stack(moved), weights))
    for period_s in (1.0, 1.4):
        seen = Models()
        found = run(FedFix(period_s=period_s, steps=5, batch_size=8), observer=seen, seconds=5.7)
        times = [time_s for time_s, _ in applied(found)]
        assert times[:4] == pytest.approx([period_s * n for n in range(1, 5)])
        assert {row.value for row in found.series("staleness")} == {0.0}
        for version, params in enumerate(expected[1:]):
            assert torch.equal(seen.found[version], params)
    assert not torch.equal(expected[1], expected[0])


def test_whoever_returned_is_in_the_version_of_the_next_instant() -> None:
    found = run(FedFix(period_s=0.5, steps=5, batch_size=8), seconds=4.2)
    periods = {client: FixedTimes(0.5).periods(tau) for client, tau in TAUS.items()}
    assert periods == {1: 2, 2: 2, 3: 2, 4: 1, 5: 1}
    for number, (time_s, clients) in enumerate(applied(found), start=1):
        assert time_s == pytest.approx(0.5 * number)
        assert clients == [client for client in CLIENTS if number % periods[client] == 0]
    counts = {row.name: row.value for row in found.rows if row.name.startswith("works_")}
    # Nothing was handed in twice, though clients ask again while they wait.
    assert counts["works_duplicate"] == counts["works_refused"] == counts["works_stale"] == 0
    assert found.finished
    assert [rule(found) for rule in fedfix.INVARIANTS] == [None] * len(fedfix.INVARIANTS)


def test_a_version_for_every_return_at_once() -> None:
    found = run(AsyncFedAvg(steps=5, batch_size=8), seconds=3.1)
    times = [time_s for time_s, _ in applied(found)]
    expected = sorted(n * tau for tau in TAUS.values() for n in range(1, 20) if n * tau < 3.05)
    assert times == pytest.approx(expected, abs=0.01)
    assert all(len(clients) == 1 for _, clients in applied(found))
    assert [rule(found) for rule in async_fedavg.INVARIANTS] == [None] * len(fedfix.INVARIANTS)


@pytest.mark.parametrize("what", [FedFix(steps=5, batch_size=8), AsyncFedAvg(steps=5)])
def test_the_ladder(what: Any) -> None:
    program = what.bind(workload(seconds=None, rounds=6))
    found = check_program(program, world(program), seed=3)
    assert found.finished


def test_a_dead_client_holds_up_nobody_and_a_server_goes_on_where_it_was() -> None:
    program = FedFix(steps=5, batch_size=8).bind(workload(seconds=12.0))
    network = world(program)
    faults = (Crash(who=(1,), at=2.2), Crash(who=(0,), at=5.1, until=6.4))
    found = simulate(
        program, replace(network, faults=(*network.faults, *faults)), seed=3,
        settings=EventSettings(horizon_s=60.0),
    )  # fmt: skip
    times = [time_s for time_s, _ in applied(found)]
    assert times[:10] == pytest.approx([0.5 * n for n in range(1, 11)])
    assert all(time_s % 0.5 == pytest.approx(0.0, abs=1e-6) for time_s in times if time_s > 7.0)
    assert max(times) > 11.0
    late = {client for time_s, clients in applied(found) for client in clients if time_s > 7.0}
    assert late == {2, 3, 4, 5}
    assert [rule(found) for rule in fedfix.INVARIANTS] == [None] * len(fedfix.INVARIANTS)


@pytest.mark.parametrize(
    ("what", "rounds"), [(FedFix(steps=5, batch_size=8), 8), (AsyncFedAvg(steps=5), 20)]
)
def test_generated_faults_break_nothing(what: Any, rounds: int) -> None:
    program = what.bind(workload(seconds=None, rounds=rounds))
    found = explore(
        lambda: program, world(program), seeds=12, horizon_s=5000.0,
        invariants=fedfix.INVARIANTS, first_seed=500,
    )  # fmt: skip
    assert found.failures == ()
    assert found.ended == {}


@pytest.mark.live
def test_on_sockets() -> None:
    program = FedFix(period_s=0.1, steps=2, batch_size=4, patience_s=2.0).bind(
        workload(seconds=None, rounds=6)
    )
    found = run_live(program, Network(PEERS), seed=3, settings=LiveSettings(horizon_s=40.0))
    assert found.finished
    assert len(applied(found)) == 6
    assert sorted(found.final) == list(range(PEERS))
    assert [rule(found) for rule in fedfix.INVARIANTS] == [None] * len(fedfix.INVARIANTS)


# The card.


def test_speeds_follow_the_main_labels() -> None:
    scenario = Scenario(
        "s", peers=21, seconds=1.0, task={"name": "digits", "split": "dirichlet", "alpha": 0.1}
    )
    made = measured.fastest_by_80(scenario)
    factors = {fault.who[0]: dict(fault.settings)["factor"] for fault in made.faults if fault.who}
    assert sorted(factors) == list(range(1, 21))
    assert max(factors.values()) == 1.0
    assert min(factors.values()) == pytest.approx(0.2)
    assert made.task != scenario.task
    calm = measured.equally_fast(scenario)
    assert calm.faults == ()


def test_measures_on_curves_known_by_hand() -> None:
    def curve(*values: float) -> Run:
        rows = [Row("federated_loss", v, float(t), t) for t, v in enumerate(values)]
        return Run("event", 0, 3, rows=rows)

    arms = tuple(fedfix.SYSTEM.arms)
    runs = {(arm, 0): curve(4.0, 3.0, 2.0, 1.5, 1.0) for arm in arms}
    runs["async_clean_02", 0] = curve(4.0, 1.0, 2.0, 0.5, 0.8)
    runs["same_clean_02", 0] = curve(4.0, 0.88)
    runs["async_noisy_10", 0] = curve(4.0, 5.0, 2.0, 3.0, 2.0)
    runs["fixed_noisy_10", 0] = curve(4.0, 2.0, 2.1, 1.0, 0.9)
    rows = Rows(runs, arms, (0,))
    assert measured.bias_is_real(rows)[0] == pytest.approx(1.1)
    assert measured.async_is_fast(rows)[0] == pytest.approx(0.5)
    assert measured.fedfix_is_faster(rows)[0] == pytest.approx(1.0)
    assert measured.fedfix_is_steady(rows)[0] == pytest.approx(0.05)
    assert measured.fedfix_ends_lower(rows)[0] == pytest.approx(-0.1)
    assert measured.schemes_agree(rows)[0] == 0.0
    # A run that is missing is no number: the verdict is then "inconclusive", never an exception.
    missing = Rows({("fedavg_equal", 0): curve(1.0)}, arms, (0,))
    for claim in fedfix.SYSTEM.claims:
        assert claim.measure is not None
        assert isnan(claim.measure(missing)[0])


def test_the_federated_loss_is_the_mean_of_the_peers_that_have_data() -> None:
    task = find("tasks", "digits")(
        peers=4, split="sizes", hidden=(), holders=(1, 3), label_noise=0.3, train_samples=90
    )
    params = task.init(keyed.key_of(1, "model"))
    losses = []
    for peer in (1, 3):
        parts = list(task.epoch(task.shard(peer), keyed.key_of(0), 7))
        sizes = [int(batch.mask.sum()) for batch in parts]
        losses.append(
            sum(float(task.loss(params, b)) * n for b, n in zip(parts, sizes, strict=True))
            / sum(sizes)
        )
    found = find("measure", "federated_loss")()(task, params)
    assert found["federated_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
