"""Asynchronous learning: each work is settled once, whatever is lost, repeated or crashes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Peer
from shoal.lab.explore import explore
from shoal.parts import find
from shoal.parts.asynchronous import audit
from shoal.parts.asynchronous._messages import Answer, Call, Finished
from shoal.parts.asynchronous.buffered import Buffered, BufferedCourse
from shoal.parts.asynchronous.client import Client, ServerLost
from shoal.parts.asynchronous.desk import DUPLICATE, STALE, TAKEN, UNKNOWN, Desk
from shoal.parts.asynchronous.learning import Even, Learning, Terms
from shoal.parts.asynchronous.local import Displacement, Uneven
from shoal.parts.asynchronous.participation import Battery, Diurnal, Exponential, Habits
from shoal.parts.asynchronous.rule import (
    Action,
    Advance,
    Course,
    Delta,
    Drop,
    Moment,
    Send,
)
from shoal.parts.asynchronous.server import Server
from shoal.parts.asynchronous.staleness import Staleness
from shoal.parts.asynchronous.versions import Versions
from shoal.rounds.local import descend
from shoal.rounds.strategy import Step
from shoal.rounds.workload import Workload
from shoal.tensor import keyed
from shoal.testing.ladder import check_live, check_program
from shoal.wire.message import Packed
from shoal.world.faults import Corrupt, Crash, Fault, Join, Leave, Loss
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Row, Run

SGD = find("optimise", "sgd")
LINKS = Links(latency_s=0.05, latency_spread=0.5, jitter_s=0.02, seed=1)


def quadratics(peers: int) -> Any:
    """Peer i is pulled towards its own centre."""
    return find("tasks", "quadratics")(peers=peers, dim=3, condition=1.0)


def workload(peers: int = 6, versions: int = 12, task: Any = None, **parts: Any) -> Workload:
    task = task or quadratics(peers)
    transform = parts.get("transform", find("transform", "identity")()).bind(task.spec)
    return Workload(task, find("aggregate", "mean")(), transform, versions, None, seed=3)


def learning(
    peers: int = 6, versions: int = 12, rule: Any = None, rest_s: float = 0.5, **parts: Any
) -> Learning:
    habits = Habits(1, 4, Exponential(rest_s) if rest_s else None)
    terms = Terms(patience_s=1.0, give_up_s=20.0)
    work = Displacement(SGD(lr=0.1))
    return Learning(
        workload(peers, versions, **parts), rule or Buffered(size=3), work, habits, Even(0.2), terms
    )


def run(program: Any, *faults: Fault, peers: int = 6, seed: int = 3, batching: str = "lazy") -> Run:
    network = Network(peers, links=LINKS, faults=faults)
    return simulate(
        program, network, seed=seed, settings=EventSettings(batching=batching, horizon_s=2000.0)
    )


def complaints(found: Run) -> list[str]:
    return [problem for problem in (rule(found) for rule in audit.INVARIANTS) if problem]


def applied(found: Run) -> list[tuple[int, list[str]]]:
    """(version, its works) in the order of the report."""
    return [(int(row.value), dict(row.labels)["works"].split()) for row in found.series("applied")]


# Staleness and versions.


def test_weights_of_late_works_follow_the_published_formulas() -> None:
    """FedAsync's constant, polynomial and hinge (Xie et al. 2019, section 5.2)."""
    polynomial = Staleness(decay="polynomial", exponent=0.5)
    hinge = Staleness(decay="hinge", exponent=10.0, start=4)
    assert [Staleness().weight(s) for s in (0, 9)] == [1.0, 1.0]
    assert [polynomial.weight(s) for s in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [hinge.weight(s) for s in (4, 5, 6)] == [1.0, 1 / 11, 1 / 21]


@given(st.integers(0, 50), st.integers(0, 200), st.sampled_from(["constant", "polynomial"]))
def test_weights_fall_and_only_dropping_refuses(bound: int, staleness: int, decay: str) -> None:
    weigh, drop = (Staleness(bound, beyond, decay) for beyond in ("weigh", "drop"))
    assert weigh.admits(staleness)
    assert drop.admits(staleness) == (staleness <= bound)
    assert 0 < weigh.weight(staleness + 1) <= weigh.weight(staleness) <= 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Staleness(bound=-1), "bound=-1"),
        (lambda: Staleness(beyond="keep"), "'keep'"),
        (lambda: Staleness(exponent=-1.0), "exponent=-1.0"),
        (lambda: Buffered(size=0), "size=0"),
        (lambda: Buffered(lr=0.0), "lr=0.0"),
        (lambda: Buffered(size=3, hold=True).course([1, 2]), "size=3 of 2 clients"),
        (lambda: Habits(0), "0 to 0"),
        (lambda: Habits(3, 2), "3 to 2"),
        (lambda: Habits(by_client=((1, 2, 1),)), "2 to 1"),
        (lambda: Exponential(-1.0), "mean of -1.0"),
        (lambda: Diurnal(share=0.0), "share=0.0"),
        (lambda: Battery(capacity=1.0, enough=2.0), "enough=2.0"),
        (lambda: Terms(server=-1), "server=-1"),
        (lambda: Terms(patience_s=0.0), "patience_s=0.0"),
        (lambda: Learning(workload(1), Buffered(), Displacement(SGD())), "1 peers"),
        (lambda: Versions(torch.zeros(2), 7).staleness(7, 1), "version 1 of store 7; there are 0"),
        (lambda: Versions(torch.zeros(2), 7).staleness(6, 0), "of store 6"),
        (lambda: Versions(torch.zeros(2), 7).advance(torch.zeros(3)), "shape"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


# Books.


def call(number: int, version: int = 0, origin: int = 9, steps: int = 1) -> Call:
    return Call(number, True, False, origin, version, steps, 1.0, Packed(b""))


calls = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3]),  # client
        st.integers(-1, 2),  # number, relative to the next one
        st.integers(-2, 1),  # version, relative to the newest
        st.sampled_from([9, 9, 9, 8]),  # origin
        st.sampled_from(["good", "good", "good", "nan", "short", "none"]),
        st.sampled_from(["", "", "use", "drop", "crash"]),  # what happens next
    ),
    max_size=60,
)


@given(calls, st.sampled_from([None, 0, 1]))
@settings(max_examples=60)
def test_books_settle_each_work_once_through_crashes(
    events: list[tuple[int, int, int, int, str, str]], bound: int | None
) -> None:
    stored: dict[str, Any] = {}
    desk = Desk(Versions(torch.zeros(2), 9), [1, 2, 3], Staleness(bound))
    taken: Counter[tuple[int, int]] = Counter()
    for client, ahead, late, origin, what, then in events:
        number = desk.settled[client] + 1 + ahead
        version = desk.versions.version + late
        vector = {
            "good": torch.ones(2), "nan": torch.tensor([1.0, float("nan")]),
            "short": torch.ones(1), "none": None,
        }[what]  # fmt: skip
        verdict, delta = desk.receive(client, call(number, version, origin), vector, 0.0)
        assert (delta is not None) == (verdict == TAKEN)
        if origin != 9 or ahead > 0:
            assert verdict == UNKNOWN
        elif ahead < 0:
            assert verdict == (DUPLICATE if number > 0 else UNKNOWN)
        elif not 0 <= version <= desk.versions.version:
            assert verdict == UNKNOWN
        elif what == "good":
            assert verdict == (STALE if bound is not None and -late > bound else TAKEN)
        if delta is not None:
            taken[client, number] += 1
        if then == "use" and desk.kept:
            desk.use(list(desk.kept.values()))
            desk.versions.advance(torch.zeros(2))
        elif then == "drop" and desk.kept:
            desk.use([next(iter(desk.kept.values()))], "dropped")
        stored.update(desk.items() | desk.versions.items())
        if then == "crash":
            kept = {slot: delta.name for slot, delta in desk.kept.items()}
            desk = Desk(Versions.load(stored.get, lambda x: x), [1, 2, 3], Staleness(bound))
            desk.load(stored.get, lambda x: x)
            assert {slot: delta.name for slot, delta in desk.kept.items()} == kept
        assert desk.balanced()
    assert all(count == 1 for count in taken.values())
    assert desk.counts[TAKEN] == len(taken)


def test_a_work_can_be_used_once_only() -> None:
    desk = Desk(Versions(torch.zeros(1), 9), [1], Staleness())
    _, delta = desk.receive(1, call(1), torch.ones(1), 0.0)
    assert delta is not None
    desk.use([delta])
    with pytest.raises(UsageError, match=r"work 9\.1\.1 is not kept"):
        desk.use([delta])


# Buffered aggregation.


def delta(client: int, number: int = 1, version: int = 0, weight: float = 1.0) -> Delta:
    return Delta(9, client, number, version, 1, weight, 0.0, torch.ones(1))


@given(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=40), st.integers(0, 40))
def test_a_buffer_uses_every_work_once_also_after_a_crash(
    size: int, clients: list[int], crash: int
) -> None:
    course, version = BufferedCourse(size, Staleness()), 0
    used: list[str] = []
    kept: list[Delta] = []
    for place, client in enumerate(clients):
        if place == crash:
            saved = course.save()
            course = BufferedCourse(size, Staleness())
            course.load(saved, kept)
        one = delta(client, place + 1, version)
        kept.append(one)
        for action in course.arrived(one, Moment(0.0, version)):
            assert isinstance(action, Advance)
            assert len(action.deltas) == size
            assert sum(action.weights) == pytest.approx(1.0)
            used += [each.name for each in action.deltas]
            kept, version = [], version + 1
    assert len(set(used)) == len(used) == len(clients) // size * size


def test_late_works_and_large_data_weigh_as_told() -> None:
    course = BufferedCourse(2, Staleness(decay="polynomial", exponent=1.0), by_weight=True)
    course.arrived(delta(1, version=3, weight=3.0), Moment(0.0, 3))
    (action,) = course.arrived(delta(2, version=0, weight=1.0), Moment(0.0, 3))
    assert isinstance(action, Advance)
    assert list(action.weights) == [3 / 4, 1 / 4 / 4]


def test_server_momentum_is_that_of_the_formula() -> None:
    rule = Buffered(size=1, lr=0.5, momentum=0.9)
    params, state = torch.zeros(1), rule.init(torch.zeros(1), [1])
    expected, speed = 0.0, 0.0
    for move in (1.0, 2.0, -1.0):
        vectors, weights = torch.tensor([[move]]), torch.ones(1)
        params, state = rule.step(params, state, vectors, weights, torch.tensor([1]))
        speed = 0.9 * speed + move
        expected += 0.5 * speed
    assert float(params) == pytest.approx(expected)


# Local work.


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
@settings(max_examples=30)
def test_rows_with_unequal_steps_are_what_each_would_do_alone(
    steps: list[int], momentum: bool
) -> None:
    task = find("tasks", "quadratics")(peers=5, dim=3, noise=1.0)
    optimizer = SGD(lr=0.3, momentum=0.9 if momentum else 0.0)
    work = Displacement(optimizer, batch_size=4)
    rows = torch.arange(len(steps))
    keys = keyed.grid(keyed.key_of(1, "work"), len(steps))
    params = task.init(keys)
    found = work(task, params, task.shard(rows), keys, torch.tensor(steps))
    for row, count in enumerate(steps):
        alone = work(task, params[row], task.shard(row), keys[row], torch.tensor(count))
        torch.testing.assert_close(found[row], alone)
        step = Step(0, task, task.shard(row), keys[row], torch.tensor(True))
        state = optimizer.init(params[row])
        after, _ = descend(task, optimizer, params[row], state, step, steps=count, batch_size=4)
        torch.testing.assert_close(alone, after - params[row])


def test_samples_that_are_drawn_ahead_are_those_of_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = find("tasks", "digits")(peers=4, hidden=(), train_samples=100, label_noise=0.3)
    keys = keyed.grid(keyed.key_of(1, "work"), 4)
    arguments = (task.init(keys), task.shard(torch.arange(4)), keys, torch.tensor([1, 5, 3, 5]))
    work = Displacement(SGD(lr=0.3), batch_size=4, per_step=True)
    whole = work(task, *arguments)
    monkeypatch.setattr("shoal.parts.asynchronous.local.DRAWN_BYTES", 1)
    monkeypatch.setattr("shoal.parts.asynchronous.local.BATCH_BYTES", 3 * 4 * 64 * 4)
    torch.testing.assert_close(work(task, *arguments), whole, rtol=1e-5, atol=1e-7)


def test_no_rows_and_no_samples_are_no_work() -> None:
    task = find("tasks", "digits")(peers=3, hidden=(), train_samples=60, holders=(1, 2))
    keys = keyed.grid(keyed.key_of(1, "work"), 3)
    arguments = (task.init(keys), task.shard(torch.arange(3)), keys, torch.tensor([4, 4, 4]))
    for optimizer in (SGD(lr=0.3), SGD(lr=0.3, momentum=0.9)):
        work = Displacement(optimizer)(task, *arguments)
        assert work[0].abs().max() == 0
        assert work[1:].abs().amax(-1).min() > 0


# Participation.


def test_rests_have_their_means_and_hours() -> None:
    class Draws:
        def __init__(self) -> None:
            self.id = 4
            self.store: dict[str, Any] = {}

        def uniform(self, *key: Any) -> float:
            return keyed_uniform(*key)

        def now(self) -> float:
            return 0.0

    def keyed_uniform(*key: Any) -> float:
        return float(keyed.uniform(keyed.key_of(0, *key)))

    peer: Any = Draws()
    ready = Exponential(10.0, ((4, 2.0),)).begin(peer)
    rests = [ready(number, 1, 100.0) - 100.0 for number in range(4000)]
    assert sum(rests) / len(rests) == pytest.approx(2.0, rel=0.05)
    hours = Diurnal(period_s=10.0, share=0.3, spread=0.0).begin(peer)
    assert [hours(0, 0, now_s) for now_s in (1.0, 2.99, 3.0, 9.0, 12.0)] == [
        1.0, 2.99, 10.0, 10.0, 12.0,
    ]  # fmt: skip
    battery = Battery(capacity=10.0, charge_per_s=2.0, enough=4.0).begin(peer)
    first = battery(0, 0, 0.0)
    later = battery(1, 9, first)
    assert later - first == pytest.approx((4.0 - (max(4.0, 10 * keyed_uniform("charge")) - 9)) / 2)
    assert battery(2, 0, later) == pytest.approx(later)


# The program.


def test_the_ladder_and_every_invariant() -> None:
    found = check_program(learning(), Network(6, links=LINKS), seed=3)
    assert complaints(found) == []
    assert [version for version, _ in applied(found)] == list(range(1, 13))
    assert all(len(works) == 3 for _, works in applied(found))
    assert sorted(found.final) == list(range(6))
    assert all(torch.equal(found.final[0], params) for params in found.final.values())
    # Nobody asked twice for anything: a message up and one down per work with no rest.
    assert {row.value for row in found.rows if row.name == "works_duplicate"} == {0.0}


@pytest.mark.live
def test_live_gives_the_same_bits_where_one_client_leaves_no_choice() -> None:
    program = learning(2, rule=Buffered(size=1), rest_s=0.0)
    check_live(program, program, 3, Network(2, links=Links(latency_s=0.001)))


@pytest.mark.live
def test_runs_over_sockets_and_every_client_ends_with_the_model() -> None:
    from shoal.engine.live import LiveSettings, run_live

    program = learning(4, rest_s=0.01)
    found = run_live(program, Network(4), seed=3, settings=LiveSettings(horizon_s=30.0))
    assert found.finished
    assert complaints(found) == []
    assert [version for version, _ in applied(found)] == list(range(1, 13))
    assert all(torch.equal(found.final[0], params) for params in found.final.values())


def test_waiting_for_everybody_is_federated_averaging() -> None:
    """size = clients and hold: each version is the mean of everybody's local steps."""
    task = quadratics(5)
    terms = Terms(patience_s=1.0, give_up_s=20.0)
    program = Learning(
        workload(5, 6, task), Buffered(size=4, hold=True), Displacement(SGD(lr=0.1)),
        Habits(3, rest=Exponential(0.3)), Even(0.2), terms,
    )  # fmt: skip
    found = run(program, peers=5)
    expected = program.initial
    for _ in range(6):
        local = expected.expand(4, -1)
        for _ in range(3):
            local = local - 0.1 * (local - task.centres[1:])
        expected = local.mean(0)
    torch.testing.assert_close(found.final[0], expected)
    assert {row.value for row in found.series("staleness")} == {0.0}
    assert complaints(found) == []


@pytest.mark.parametrize("store", ["kept", "lost"])
@pytest.mark.parametrize("who", [0, 1, 4])
def test_a_crash_costs_no_work_that_was_promised(who: int, store: str) -> None:
    faults = [Crash(who=(who,), at=t, until=t + 0.7, store=store) for t in (1.9, 4.1, 6.3, 8.2)]
    found = run(learning(versions=20), *faults)
    assert complaints(found) == []
    assert found.finished
    versions = [version for version, _ in applied(found)]
    assert versions[-1] == 20
    if (who, store) != (0, "lost"):
        assert versions == list(range(1, 21))
    else:
        # A server without a memory begins anew, and says so.
        assert len({name.split(".")[0] for _, works in applied(found) for name in works}) > 1


def test_lost_and_damaged_messages_are_said_again_and_counted_once() -> None:
    found = run(learning(versions=20), Loss(probability=0.3), Corrupt(who=(2,), probability=0.3))
    assert complaints(found) == []
    assert [version for version, _ in applied(found)] == list(range(1, 21))
    counts = {row.name: row.value for row in found.rows if row.name.startswith("works_")}
    assert counts["works_duplicate"] > 0


def test_a_client_that_joins_or_leaves_or_dies_stops_nobody() -> None:
    faults = (Join(who=(1,), at=3.0), Leave(who=(2,), at=2.0), Crash(who=(3,), at=2.5))
    found = run(learning(versions=20), *faults)
    assert complaints(found) == []
    assert found.finished
    assert applied(found)[-1][0] == 20
    late = {
        name.split(".")[1] for version, works in applied(found) if version > 12 for name in works
    }
    assert "1" in late
    assert not late & {"2", "3"}


def test_everybody_stops_when_the_server_is_gone_for_good() -> None:
    found = run(learning(versions=100), Crash(who=(0,), at=3.0))
    assert found.finished
    assert sorted(found.final) == list(range(6))


def test_a_server_that_nobody_calls_stops() -> None:
    found = run(learning(), Crash(who=(1, 2, 3, 4, 5), at=1.0))
    assert found.finished
    assert found.virtual_s < 60


def test_a_server_stops_when_everybody_waits_for_the_dead() -> None:
    found = run(learning(rule=Buffered(size=5, hold=True)), Crash(who=(3,), at=2.0))
    assert found.finished
    assert found.virtual_s < 60
    assert complaints(found) == []


def test_works_beyond_the_bound_are_dropped_and_counted() -> None:
    rule = Buffered(size=1, staleness=Staleness(bound=1))
    found = run(learning(rule=rule, versions=30))
    counts = {row.name: row.value for row in found.rows if row.name.startswith("works_")}
    assert counts["works_stale"] > 0
    assert max(row.value for row in found.series("staleness")) <= 1
    assert complaints(found) == []


@pytest.mark.parametrize("name", ["quantise", "ternary", "error_feedback"])
def test_works_go_through_a_transform(name: str) -> None:
    task = find("tasks", "digits")(peers=4, hidden=(), train_samples=80)
    program = learning(4, 6, task=task, transform=find("transform", name)())
    found = run(program, peers=4)
    assert applied(found)[-1][0] == 6
    assert bool(found.final[0].isfinite().all())


def test_fault_lists_find_nothing() -> None:
    found = explore(
        lambda: learning(versions=8), Network(6, links=LINKS), seeds=24, horizon_s=1500.0,
        invariants=audit.INVARIANTS,
    )  # fmt: skip
    assert [failure.problem for failure in found.failures] == []
    assert found.traces >= 20
    assert not found.ended


class Forgetful(Desk):
    """Books that do not know a work when it comes again."""

    def receive(self, client: int, call: Call, vector: Any, now_s: float) -> Any:
        self.settled[client] = min(self.settled[client], call.number - 1)
        return super().receive(client, call, vector, now_s)


async def answer_first(self: Server) -> None:
    """`Server._settle` in the wrong order: what is promised is not yet written."""
    answers, self._answers = self._answers, []
    for client, answer in answers:
        await self.peer.send(client, answer)  # type: ignore[arg-type]
    await self.peer.sleep_until(self.peer.now() + 0.2)
    await _settle(self)


_settle = Server._settle


@pytest.mark.parametrize(
    ("place", "mutant"),
    [
        ("shoal.parts.asynchronous.server.Desk", Forgetful),
        ("shoal.parts.asynchronous.server.Server._settle", answer_first),
    ],
)
def test_wrong_books_are_found_out(
    place: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, mutant)
    found = explore(
        lambda: learning(versions=12), Network(6, links=LINKS), seeds=60, horizon_s=1500.0,
        invariants=audit.INVARIANTS, kinds=("crash", "loss"), most_failures=1, shrink_runs=0,
    )  # fmt: skip
    assert [failure.problem.kind for failure in found.failures] == ["invariant"]


# A rule and a client of one's own.


@dataclass(frozen=True)
class EverySecond(Buffered):
    """A version every second of what has come, given to those whose work is in it."""

    def course(self, clients: Any) -> Course:  # type: ignore[override]
        return Ticks()


class Ticks(Course):
    def __init__(self) -> None:
        self.tick = 1
        self.here: list[Delta] = []

    @property
    def due_s(self) -> float:
        return float(self.tick)

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        self.here.append(delta)
        return []

    def asked(self, client: int, at: Moment) -> list[Action]:
        return [] if any(d.client == client for d in self.here) else [Send(client, steps=2)]

    def timed(self, at: Moment) -> list[Action]:
        assert at.now_s == self.tick
        deltas, self.here = self.here, []
        first, rest = deltas[:1], deltas[1:]
        self.tick += 1
        return [
            *(Drop(each, "first") for each in first), Advance(rest, [1.0] * len(rest)),
            *(Send(each.client, steps=3) for each in deltas),
        ]  # fmt: skip

    def save(self) -> bytes:
        return bytes([self.tick])

    def load(self, data: bytes, kept: Any) -> None:
        self.tick, self.here = data[0], list(kept)


def test_a_rule_may_keep_time_drop_works_and_say_how_many_steps() -> None:
    program = learning(rule=EverySecond(), rest_s=0.0)
    for faults in ((), (Crash(who=(0,), at=3.3, until=4.1),)):
        found = run(program, *faults)
        assert complaints(found) == []
        rows = found.series("applied")
        assert [int(row.value) for row in rows] == list(range(1, 13))
        if not faults:
            assert [row.time_s for row in rows] == [float(k) for k in range(1, 13)]
        assert {dict(row.labels)["reason"] for row in found.series("dropped")} == {"first"}


@dataclass(frozen=True, eq=False)
class OwnWill:
    """Clients with a program of their own; peer 0 is the usual server."""

    learning: Learning
    wrong: str = ""

    async def run(self, peer: Peer) -> None:
        if peer.id == 0:
            await Server(self.learning, peer).run()
            return
        client = Client(peer, self.learning.workload, patience_s=1.0, give_up_s=5.0)
        try:
            await client.resume()
            for _ in range(100):
                model = await client.pull()
                vector = torch.ones_like(model.params)
                if self.wrong == "version":
                    model = replace(model, version=model.version + 1)
                elif self.wrong == "shape":
                    vector = vector[:1]
                elif self.wrong == "steps":
                    await client.push(vector, model, steps=0)
                await client.push(vector, model)
                peer.record("verdict", 0.0, verdict=client.verdict)
        except ServerLost:
            peer.record("lost", 1.0)


def verdicts(found: Run) -> set[str]:
    return {dict(row.labels)["verdict"] for row in found.series("verdict")}


def test_programs_of_their_own_pull_and_push_when_they_like() -> None:
    base = learning(3, 5, Buffered(size=2, lr=0.5))
    found = run(OwnWill(base), peers=3)
    assert complaints(found) == []
    assert verdicts(found) == {"taken"}
    assert found.series("lost")
    torch.testing.assert_close(found.final[0], base.initial + 2.5)
    future = run(OwnWill(base, "version"), peers=3)
    assert verdicts(future) == {"unknown"}
    assert not future.series("applied")
    for wrong, match in (("shape", "push all of it"), ("steps", "steps=0")):
        with pytest.raises(UsageError, match=match):
            run(OwnWill(base, wrong), peers=3)


def test_an_audit_complains_about_each_kind_of_fraud() -> None:
    def rows(*each: tuple[str, float, int, dict[str, str]]) -> Run:
        made = [Row(n, v, 0.0, 0, p, tuple(sorted(labels.items()))) for n, v, p, labels in each]
        return Run("event", 0, 3, rows=made)

    one, two = {"work": "1.2.1"}, {"works": "1.2.1"}
    made, used = ("made", 1.0, 2, one), ("applied", 1.0, 0, two)
    assert audit.works_count_once(rows(made, used)) is None
    assert audit.works_count_once(rows(made, used, used)) is not None
    assert audit.works_were_made(rows(made, used)) is None
    assert audit.works_were_made(rows(used)) is not None
    assert audit.works_were_made(rows(("made", 1.0, 1, one), used)) is not None
    end = ("works_kept", 0.0, 0, {"origin": "1", "works": ""})
    handed = ("handed_in", 1.0, 2, one)
    assert audit.no_work_is_lost(rows(made, handed, used, end)) is None
    assert audit.no_work_is_lost(rows(made, handed, end)) is not None
    assert audit.counts_agree(rows(used, ("works_applied", 1.0, 0, {}), end)) is None
    assert audit.counts_agree(rows(used, ("works_applied", 2.0, 0, {}), end)) is not None
    counts = dict.fromkeys(("dropped", "stale", "broken", "unknown", "kept"), 0.0)
    for settled, taken, used, fine in ((2, 2, 2, True), (2, 1, 1, False), (2, 2, 1, False)):
        told = {"settled": settled, "taken": taken, "applied": used, **counts}
        found = rows(*((f"works_{name}", float(n), 0, {}) for name, n in told.items()))
        assert (audit.works_are_accounted_for(found) is None) == fine


def test_rows_lie_in_the_order_of_steps_and_come_back() -> None:
    task = quadratics(4)
    keys = keyed.grid(keyed.key_of(1, "x"), 4).view(2, 2)
    index, params = torch.arange(4).view(2, 2), task.init(keys)
    rows = Uneven(params, task.shard(index), keys, torch.tensor([[1, 4], [2, 4]]))
    assert rows.active == [4, 3, 2, 2]
    assert torch.equal(rows.back(rows.params), params)


# Damage.


def test_damaged_messages_count_as_lost() -> None:
    assert all(kind.checked for kind in (Call, Answer, Finished))  # type: ignore[attr-defined]


def test_a_server_whose_model_is_past_help_comes_to_its_end() -> None:
    """A rate at which every number goes to infinity: all works are broken, and nothing hangs."""
    broken = Learning(
        workload(4, 5), Buffered(size=2), Displacement(SGD(lr=1e30)), Habits(20), pace=Even(0.01),
        terms=Terms(give_up_s=20.0),
    )  # fmt: skip
    network = Network(4, links=LINKS)
    run = simulate(broken, network, seed=1, settings=EventSettings(horizon_s=500.0))
    assert run.finished
    assert not run.series("applied")
    assert run.series("works_broken")[-1].value > 0
    assert run.virtual_s < broken.gives_up_s + 10.0
