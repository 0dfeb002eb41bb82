"""Anarchic federated learning: closed forms, where both servers settle, and what workers decide."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.lab.explore import explore
from shoal.parts import find
from shoal.parts.asynchronous.learning import Even, Learning, Terms
from shoal.parts.asynchronous.participation import Exponential, Habits
from shoal.parts.asynchronous.rule import Advance, Delta, Drop, Moment
from shoal.parts.asynchronous.staleness import Staleness
from shoal.rounds.task import Shard
from shoal.rounds.workload import Workload
from shoal.systems.training._anarchic_rules import (
    AFA_CD,
    AFA_CS,
    PATIENCE,
    MeanGradient,
)
from shoal.systems.training._anarchic_workers import Crowd, early_classes
from shoal.systems.training.anarchic_fl import INVARIANTS, AnarchicFL
from shoal.tensor import keyed
from shoal.testing.ladder import check_program
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

LINKS = Links(latency_s=0.01)
WORKERS = 10
TERMS = Terms(patience_s=5.0, give_up_s=100.0)


def quadratics(peers: int = WORKERS + 1, **parts: Any) -> Any:
    """f_i = |x - centre_i|^2 / 2; peer 0 is the server."""
    return find("tasks", "quadratics")(peers=peers, dim=3, condition=1.0, **parts)


@lru_cache
def digits(peers: int = 5, **parts: Any) -> Any:
    return find("tasks", "digits")(
        peers=peers, hidden=(), train_samples=200, split="classes", classes_per_peer=1,
        holders=tuple(range(1, peers)), **parts,
    )  # fmt: skip


def workload(task: Any, versions: int = 12) -> Workload:
    transform = find("transform", "identity")().bind(task.spec)
    return Workload(task, find("aggregate", "mean")(), transform, versions, None, seed=3)


def run(program: Any, peers: int, seed: int = 3, batching: str = "lazy") -> Run:
    network = Network(peers, links=LINKS)
    return simulate(program, network, seed=seed, settings=EventSettings(batching=batching))


def counts(found: Run) -> dict[str, float]:
    return {
        row.name.removeprefix("works_"): row.value
        for row in found.rows
        if row.name.startswith("works_")
    }


# What workers return.


@given(st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=10)
def test_one_step_returns_the_gradient_bit_for_bit(worker: int, draw: int) -> None:
    task = digits()
    params, key = task.init(keyed.key_of(draw, "x")), keyed.key_of(draw, "work")
    shard = task.shard(worker + 1)
    found = MeanGradient(0.05, 8)(task, params, shard, key, torch.tensor(1))
    assert torch.equal(found, task.grad(params, task.batch(shard, keyed.fold(key, 0), 8)))


@given(st.floats(0.1, 3.0), st.floats(0.01, 0.3), st.floats(-2.0, 2.0), st.integers(1, 8))
def test_several_steps_return_the_geometric_sum(
    curvature: float, lr: float, start: float, steps: int
) -> None:
    """f = a x^2 / 2: G = a x (1 + r + ... + r^(K-1)) / K with r = 1 - lr * a."""

    class Bowl:
        def batch(self, shard: Any, key: Any, size: int) -> Any:
            return Batches(shard, key)

        def grad(self, params: Tensor, batch: Any) -> Tensor:
            return curvature * params

    class Batches:
        def __init__(self, shard: Any, key: Tensor) -> None:
            self.x = self.y = self.mask = torch.ones((*key.shape, 1))

    task: Any = Bowl()
    shard = Shard(torch.zeros(1, dtype=torch.int64), torch.tensor(1))
    params = torch.tensor([start], dtype=torch.float64)
    found = MeanGradient(lr)(task, params, shard, torch.tensor(0), torch.tensor(steps))
    r = 1.0 - lr * curvature
    expected = curvature * start * sum(r**k for k in range(steps)) / steps
    assert float(found) == pytest.approx(expected, abs=1e-12)
    whole = MeanGradient(lr, per_step=False)(
        task, params, shard, torch.tensor(0), torch.tensor(steps)
    )
    assert float(whole) == pytest.approx(expected * steps, abs=1e-12)


# Both servers.


@pytest.mark.parametrize("rule", [AFA_CD, AFA_CS])
def test_everybody_in_every_version_is_distributed_gradient_descent(rule: Any) -> None:
    task = quadratics()
    server = rule(WORKERS, server_lr=4.0, local_lr=0.05, hold=True)
    habits = Habits(1, rest=Exponential(1.0))
    program = Learning(workload(task, 8), server, MeanGradient(0.05), habits, Even(1.0), TERMS)
    found = run(program, WORKERS + 1)
    x = program.initial
    for _ in range(8):
        x = x - 0.2 * (x - task.centres[1:]).mean(0)
    torch.testing.assert_close(found.final[0], x, rtol=1e-12, atol=1e-12)
    assert {row.value for row in found.series("staleness")} == {0.0}


returns = st.lists(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 1.0)), min_size=1, max_size=6), max_size=40
)


@given(returns)
@settings(max_examples=40)
def test_the_memory_keeps_its_mean(steps: list[list[tuple[int, float]]]) -> None:
    rule = AFA_CS(server_lr=1.0, local_lr=1.0, start="filled")
    params = torch.zeros(2)
    state = rule.init(params, range(1, 7))
    known: dict[int, Tensor] = {}
    for place, group in enumerate(steps):
        keys = keyed.grid(keyed.grid(keyed.key_of(place, "g"), len(group)), 2)
        vectors = keyed.normal(keys)
        late = torch.tensor([part for _, part in group], dtype=torch.float64)
        clients = torch.tensor([client for client, _ in group])
        before = params
        params, state = rule.step(params, state, vectors, late / len(group), clients)
        for (client, part), vector in zip(group, vectors, strict=True):
            old = known.get(client)
            known[client] = vector if old is None else old + part * (vector - old)
        mean = torch.stack([known[client] for client in sorted(known)]).mean(0)
        torch.testing.assert_close(before - params, mean, rtol=1e-4, atol=1e-6 * (place + 1))
        rows = torch.stack(state.rows)[state.filled]
        torch.testing.assert_close(state.total / len(rows), rows.mean(0), rtol=0, atol=1e-6)
        assert len(rows) == len(known)


def delta(client: int, number: int) -> Delta:
    return Delta(1, client, number, 0, 1, 1.0, 0.0, torch.ones(1))


def test_the_first_pass_waits_for_everybody_and_filled_does_not() -> None:
    course, at, later = AFA_CS(buffer=2).course([1, 2, 3]), Moment(0.0, 0), Moment(1.0, 1)
    assert list(course.arrived(delta(1, 1), at)) == []
    (old,) = course.arrived(delta(1, 2), at)
    assert isinstance(old, Drop)
    assert (old.delta.number, old.reason) == (1, "superseded")
    assert list(course.arrived(delta(2, 1), at)) == []
    again = AFA_CS(buffer=2).course([1, 2, 3])
    again.load(course.save(), course.buffer)
    for each in (course, again):
        (action,) = each.arrived(delta(3, 1), at)
        assert isinstance(action, Advance)
        assert [(d.client, d.number) for d in action.deltas] == [(1, 2), (2, 1), (3, 1)]
        assert not list(each.arrived(delta(1, 3), later))
        assert len(list(each.arrived(delta(1, 4), later))) == 1
    early = AFA_CS(buffer=2, start="filled").course([1, 2, 3])
    early.arrived(delta(1, 1), at)
    assert len(list(early.arrived(delta(1, 2), at))) == 1


def test_the_first_pass_does_not_wait_for_the_dead() -> None:
    course, at = AFA_CS(buffer=5).course([1, 2, 3]), Moment(0.0, 0)
    course.arrived(delta(2, 1), at)
    for number in range(1, PATIENCE):
        assert not any(isinstance(a, Advance) for a in course.arrived(delta(1, number), at))
    *_, action = course.arrived(delta(1, PATIENCE), at)
    assert isinstance(action, Advance)
    assert [(d.client, d.number) for d in action.deltas] == [(1, PATIENCE), (2, 1)]


def test_memories_settle_at_the_mean_whoever_returns_more_often() -> None:
    """Random arrivals, half of the workers 8 times as often, exact gradients, one step."""
    task, workers = quadratics(7), range(1, 7)
    rests = tuple((worker, 4.0 if worker <= 3 else 39.0) for worker in workers)
    program = Learning(
        workload(task, 400), AFA_CS(3, server_lr=1.0, local_lr=0.05), MeanGradient(0.05),
        Habits(1, rest=Exponential(4.0, rests)), Even(1.0), TERMS,
    )  # fmt: skip
    found = run(program, 7)
    apart = (found.final[0] - task.centres[1:].mean(0)).norm()
    assert apart < 1e-6
    names = [dict(row.labels)["works"].split() for row in found.series("applied")]
    who = [int(name.split(".")[1]) for each in names for name in each]
    assert sum(client <= 3 for client in who) / len(who) == pytest.approx(8 / 9, abs=0.04)


def test_without_memories_the_point_is_the_mean_weighted_by_returns() -> None:
    """A fixed order of arrivals; the rate is small, as the iterate circles around that point."""
    centres = quadratics().centres[1:]
    order = [0, 1, 2, 3, 4] * 8 + [5, 6, 7, 8, 9]
    rule, m = AFA_CD(5, server_lr=1.0, local_lr=1e-3), 5
    x = centres.new_zeros(3)
    for _ in range(800):
        for start in range(0, len(order), m):
            group = order[start : start + m]
            vectors = x - centres[group]
            weights = torch.full((m,), 1 / m, dtype=torch.float64)
            x, _ = rule.step(x, None, vectors, weights, torch.tensor(group) + 1)
    weighted = centres[order].mean(0)
    spread = (centres - centres.mean(0)).norm(dim=-1).mean()
    assert (x - weighted).norm() < 0.01 * spread
    assert (x - centres.mean(0)).norm() > 0.1 * spread


def test_late_returns_are_dropped_or_weighed() -> None:
    task = quadratics()
    slow = Crowd(1, 1, 0.5, 1.0, 1.0, "rest", "any")
    _, pace = slow.of(task, range(1, WORKERS + 1))
    assert pace is not None
    pace = replace(pace, slow=((1, 15.0),))  # type: ignore[type-var]
    found = {}
    for beyond in ("drop", "weigh"):
        rule = AFA_CD(2, local_lr=0.1, staleness=Staleness(5, beyond))
        program = Learning(workload(task, 120), rule, MeanGradient(0.1), Habits(1), pace, TERMS)
        found[beyond] = run(program, WORKERS + 1)
        assert [rule(found[beyond]) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    used = {
        beyond: {name.split(".")[1] for row in each.series("applied")
                 for name in dict(row.labels)["works"].split()}
        for beyond, each in found.items()
    }  # fmt: skip
    assert counts(found["drop"])["stale"] > 0
    assert "1" not in used["drop"]
    assert counts(found["weigh"])["stale"] == 0
    assert "1" in used["weigh"]


# Workers.


def test_workers_look_at_their_own_data_and_keep_their_rates() -> None:
    task = digits(11)
    workers = range(1, 11)
    early = [early_classes(task, worker) for worker in workers]
    assert sum(early) == 5
    habits, pace = Crowd(1, 9, 2.0, 1.0, 8.0, "rest", "any").of(task, workers)
    assert pace is not None
    assert isinstance(habits.rest, Exponential)
    for worker, first in zip(workers, early, strict=True):
        assert pace.seconds(worker, 1, 5) == 5.0
        assert habits.rest.mean_of(worker) + 5.0 == (7.0 if first else 56.0)
    habits, pace = Crowd(1, 9, 2.0, 1.0, 8.0, "speed", "class").of(task, workers)
    assert pace is not None
    for worker, first in zip(workers, early, strict=True):
        assert pace.seconds(worker, 1, 5) == (5.0 if first else 40.0)
        assert habits.range_of(worker) == ((9, 9) if first else (1, 1))


@pytest.mark.parametrize("hours", ["diurnal", "battery"])
def test_days_and_batteries_stop_workers_but_not_the_server(hours: str) -> None:
    program = AnarchicFL("cd", buffer=2, hours=hours).bind(workload(quadratics(6), 40))
    found = run(program, 6)
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    assert found.series("applied")[-1].value == 40
    busy = {row.peer: row.value / found.virtual_s for row in found.series("busy_s")}
    assert all(0.05 < share < 0.9 for share in busy.values())
    if hours == "diurnal":
        # A third of the day, and the work that was begun in it.
        assert max(busy.values()) < 0.45
    else:
        assert max(busy.values()) > 1.5 * min(busy.values())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AnarchicFL(method="cx"), "'cx'"),
        (lambda: AnarchicFL(buffer=0), "buffer=0"),
        (lambda: AnarchicFL(server_lr=0.0), "server_lr=0.0"),
        (lambda: AnarchicFL(lr=-1.0), "local_lr=-1.0"),
        (lambda: AnarchicFL(steps=0), "0 to 9"),
        (lambda: AnarchicFL(steps=5, most_steps=4), "5 to 4"),
        (lambda: AnarchicFL(max_delay=-1), "bound=-1"),
        (lambda: AnarchicFL(late="keep"), "'keep'"),
        (lambda: AnarchicFL(start="soon"), "'soon'"),
        (lambda: AnarchicFL(bias=0.5), "bias=0.5"),
        (lambda: AnarchicFL(bias=2.0, rest_s=0.0), "rest_s=0.0"),
        (lambda: AnarchicFL(bias_by="luck"), "'luck'"),
        (lambda: AnarchicFL(batch_size=0), "batch_size=0"),
        (lambda: AnarchicFL(hours="night"), "'night'"),
        (lambda: AnarchicFL(hours="diurnal", bias=2.0), "hours='diurnal' with bias=2.0"),
        (lambda: AnarchicFL(bias=2.0).bind(workload(quadratics())), "a task with classes"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


# Runs.


@pytest.mark.parametrize("method", ["cd", "cs"])
def test_the_ladder_and_every_invariant(method: str) -> None:
    program = AnarchicFL(method, buffer=2, bias=4.0, max_delay=3).bind(workload(digits(), 6))
    found = check_program(program, Network(5, links=LINKS), seed=3)
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    assert found.finished


@pytest.mark.parametrize("method", ["cd", "cs"])
def test_fault_lists_find_nothing(method: str) -> None:
    task = quadratics(6)
    program = AnarchicFL(method, buffer=2, give_up_s=60.0).bind(workload(task, 8))
    found = explore(
        lambda: program, Network(6, links=LINKS), seeds=12, horizon_s=20000.0,
        invariants=INVARIANTS,
    )  # fmt: skip
    assert [failure.problem for failure in found.failures] == []
    assert found.traces >= 10
