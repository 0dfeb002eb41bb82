"""MoDeST: exact message counts, FedAvg's models for the same samples, crashes, joins, fuzzing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.engine.lockstep import run_lockstep
from shoal.lab.explore import explore
from shoal.lab.rows import Rows
from shoal.parts import find
from shoal.parts.exchange.star import Star
from shoal.parts.overlay.membership import Membership
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.rounds.method import Method
from shoal.rounds.workload import Workload
from shoal.systems.training import _modest_claims as measured
from shoal.systems.training._modest_node import Averaged, Trained
from shoal.systems.training.modest import INVARIANTS, SYSTEM, MoDeST
from shoal.testing.ladder import check_program
from shoal.wire.codec import size_of
from shoal.wire.message import Packed
from shoal.world.device import Device
from shoal.world.faults import Corrupt, Crash, Join, Leave, Loss, Round
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Happening, Row, Run

LINKS = Links(latency_s=0.05, latency_spread=0.3, jitter_s=0.005, seed=1)
DEVICE = Device(flops_per_s=2e4, spread=0.5, seed=1)
SMALL = MoDeST(
    sample_size=4, aggregators=2, success_fraction=0.75, ping_timeout_s=1.0,
    aggregation_timeout_s=30.0, idle_rounds=5, steps=2, batch_size=4,
)  # fmt: skip


def workload(peers: int, rounds: int = 8, **parts: Any) -> Workload:
    task = find("tasks", "digits")(peers=peers, split="iid", hidden=(8,), train_samples=240)
    rule = parts.get("aggregator", find("aggregate", "mean")())
    transform = parts.get("transform", find("transform", "identity")()).bind(task.spec)
    return Workload(task, rule, transform, rounds, parts.get("seconds"), seed=3)


class Models:
    """An observer that keeps every recorded model: (round, peer) -> [dim]."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
        self.found[round, peer] = params

    def rows(self) -> list[Row]:
        return []


def run(
    settings: MoDeST = SMALL, peers: int = 10, rounds: int = 8, faults: tuple[Any, ...] = (),
    seed: int = 3, links: Links = LINKS, observer: Any = None, horizon_s: float = float("inf"),
    batching: str = "lazy", **parts: Any,
) -> Run:  # fmt: skip
    program = settings.bind(workload(peers, rounds, **parts))
    network = Network(peers, links=links, device=DEVICE, faults=faults)
    engine = EventSettings(batching=batching, horizon_s=horizon_s)
    return simulate(program, network, seed=seed, settings=engine, observer=observer)


def samples(run: Run) -> list[set[int]]:
    """Who trained in each round."""
    found: dict[int, set[int]] = {}
    for row in run.series("training"):
        found.setdefault(int(row.value), set()).add(row.peer)
    return [found[k] for k in sorted(found)]


# Settings.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sample_size": 0}, "sample_size=0"),
        ({"sample_size": 4, "aggregators": 5}, "aggregators=5"),
        ({"aggregators": 11}, "aggregators=11"),
        ({"success_fraction": 0.0}, "success_fraction=0.0"),
        ({"success_fraction": 1.01}, "success_fraction=1.01"),
        ({"sample_size": 4, "success_fraction": 0.2}, "less than one model"),
        ({"ping_timeout_s": 0.0}, "ping_timeout_s=0.0"),
        ({"inactivity_rounds": 0}, "inactivity_rounds=0"),
        ({"aggregation_patience": -1.0}, "aggregation_patience"),
        ({"ping_patience": -1.0}, "ping_patience=-1.0"),
        ({"steps": 1, "epochs": 1}, "give one"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        MoDeST(**settings)


def test_settings_that_do_not_fit_the_peers() -> None:
    with pytest.raises(UsageError, match="sample_size=11 of 10"):
        MoDeST(sample_size=11).bind(workload(10))
    with pytest.raises(UsageError, match="founders=11"):
        MoDeST(founders=11).bind(workload(10))
    assert MoDeST().bind(workload(6)).sample_size == 6
    assert MoDeST().bind(workload(12)).sample_size == 10


# Without failures.


def test_messages_of_a_calm_run_are_counted_exactly() -> None:
    """s * a models up and a * s down per round, less those that a peer would send to itself."""
    peers, rounds, size, few = 12, 6, 5, 2
    settings = replace(SMALL, sample_size=size, aggregators=few, success_fraction=1.0)
    found = run(settings, peers, rounds)
    groups = samples(found)
    assert len(groups) == rounds
    assert all(len(group) == size for group in groups)
    averaging = Counter((row.peer, int(row.value)) for row in found.series("averaged"))
    up = down = 0
    for k in range(rounds):
        aggregators = {peer for peer, label in averaging if label == k + 1}
        assert len(aggregators) == few
        up += size * few - len(aggregators & groups[k])
        if k + 1 < rounds:
            # Aggregators are the first of the sample that they begin.
            assert aggregators <= groups[k + 1]
            down += few * size - few
    load = workload(peers)
    payload, _ = load.transform.encode(load.initial, None, torch.tensor(0))
    view = Packed(Membership.of(range(peers)))
    frames = {
        "Trained": up * size_of(Trained(1, Packed(payload), view)),
        "Averaged": down * size_of(Averaged(1, load.initial, 0.5, 0.1, False, view)),
    }
    assert {kind: found.bytes_by_kind[kind] for kind in frames} == frames
    assert sum(row.value for row in found.series("view_bytes")) == (up + down) * view.byte_count()
    assert found.bytes_by_kind["Ack"] > 0
    assert found.finished
    assert sum(row.name == "ping_wait_s" for row in found.rows) == 0


@dataclass(frozen=True)
class Chosen(Star):
    """A star whose clients are given."""

    groups: tuple[tuple[int, ...], ...] = ()

    def active(self, round: int, seed: int) -> Tensor:
        mask = torch.zeros(self.peers, dtype=torch.bool)
        mask[list(self.groups[round])] = True
        return mask


class Hub:
    """The hub's model after every round."""

    def __init__(self, hub: int) -> None:
        self.hub = hub
        self.models: list[Tensor] = []

    def stacked(self, round: int, times: Tensor, present: Tensor, params: Tensor) -> None:
        self.models.append(params[self.hub].clone())

    def rows(self) -> list[Row]:
        return []


def test_one_aggregator_and_all_models_give_fedavgs_sequence() -> None:
    """Invariant: the same samples, hence the same models, round by round."""
    peers, rounds, size = 9, 5, 4
    settings = replace(SMALL, sample_size=size, aggregators=1, success_fraction=1.0, lr=0.3)
    seen = Models()
    found = run(settings, peers, rounds, observer=seen, batching="off")
    groups = tuple(tuple(sorted(group)) for group in samples(found))
    assert len(groups) == rounds
    load = workload(peers, rounds)
    method = Method(
        LocalSteps(lr=0.3, steps=2, batch_size=4), load.task,
        Chosen(peers, sample=size, groups=groups), load.aggregator, load.transform, rounds,
        60.0, 3,
    )  # fmt: skip
    hub = Hub(0)
    run_lockstep([method], [Network(peers)], measures=[hub])
    assert len(hub.models) == rounds
    start = load.initial
    for label, expected in enumerate(hub.models, start=1):
        models = [params for (k, _), params in seen.found.items() if k == label]
        assert len(models) == (size if label < rounds else 1)
        for params in models:
            assert torch.equal(params, models[0])
            torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-7)
        assert (expected - start).norm() > 1e-2


def test_the_ladder_and_every_invariant() -> None:
    program = SMALL.bind(workload(10, 5))
    found = check_program(program, Network(10, links=LINKS, device=DEVICE), seed=3)
    assert [invariant(found) for invariant in INVARIANTS] == [None] * len(INVARIANTS)
    assert found.finished


@pytest.mark.parametrize(
    ("role", "part"),
    [
        ("aggregator", find("aggregate", "median")()),
        ("aggregator", find("aggregate", "centered_clipping")()),
        ("transform", find("transform", "quantise")()),
        ("transform", find("transform", "ternary")()),
    ],
)
def test_any_rule_and_any_transform(role: str, part: Any) -> None:
    seen = Models()
    found = run(rounds=4, observer=seen, **{role: part})
    assert len(samples(found)) == 4
    last = [params for (k, _), params in seen.found.items() if k == 4]
    assert last
    assert all(bool(params.isfinite().all()) for params in last)


# Failures.


def test_rounds_go_on_when_peers_die_and_the_dead_are_forgotten() -> None:
    dead = (1, 3, 5)
    faults = tuple(Crash(who=(peer,), at=Round(3 + i)) for i, peer in enumerate(dead))
    settings = replace(SMALL, inactivity_rounds=6)
    found = run(settings, 12, 30, faults)
    groups = samples(found)
    assert len(groups) == 30
    assert all(not group & set(dead) for group in groups[7:])
    late = measured.round_starts(found)[-8][1]
    waits = [row for row in found.series("ping_wait_s") if row.time_s > late]
    assert found.series("ping_wait_s")
    assert waits == []
    assert [invariant(found) for invariant in INVARIANTS] == [None] * len(INVARIANTS)


def test_a_leaving_aggregator_sends_its_contributors_to_the_next() -> None:
    """One aggregator, told to go while it waits for models: the round is made up elsewhere."""
    settings = replace(
        SMALL, aggregators=1, success_fraction=1.0, restart=False, aggregation_patience=0.0
    )
    calm = run(settings, 10, 4)
    (second,) = [row.peer for row in calm.series("averaged") if row.value == 2]
    began = [row.time_s for row in calm.series("training") if row.value == 1]
    ended = next(row.time_s for row in calm.series("averaged") if row.value == 2)
    # When some models are there and others are not.
    moment = max(began) + 0.8 * (ended - max(began))
    faults = (Leave(who=(second,), at=moment, grace_s=5.0),)
    found = run(settings, 10, 4, faults)
    again = [row.peer for row in found.series("averaged") if row.value == 2]
    assert again
    assert second not in again
    assert len(samples(found)) == 4


def all_but(survivors: int, peers: int, at: float) -> tuple[Crash, ...]:
    return (Crash(who=tuple(range(survivors, peers)), at=at),)


def test_most_die_at_once_with_and_without_the_restart_rule() -> None:
    settings = replace(SMALL, sample_size=4, success_fraction=0.75)
    calm = run(settings, 20, 30)
    starts = dict(measured.round_starts(calm))
    halted = 0
    for k in (8, 9, 10):
        moment = (starts[k] + starts[k + 1]) / 2
        faults = all_but(5, 20, moment)
        bare = run(replace(settings, restart=False), 20, 30, faults)
        helped = run(settings, 20, 30, faults)
        halted += len(samples(bare)) < 30
        assert max(k for k, _ in measured.round_starts(helped)) == 29
        assert [invariant(helped) for invariant in INVARIANTS] == [None] * len(INVARIANTS)
    assert halted >= 2
    assert helped.series("restarted")


def test_a_recovered_peer_takes_up_the_new_round_and_no_old_one() -> None:
    faults = (Crash(who=(0, 1, 2), at=Round(2), until=Round(8)),)
    found = run(SMALL, 10, 20, faults)
    assert [invariant(found) for invariant in INVARIANTS] == [None] * len(INVARIANTS)
    back = next(each.time_s for each in found.happenings if each.what == "restart")
    after = [r for r in found.series("training") if r.peer in (0, 1, 2) and r.time_s > back]
    assert after
    assert min(row.value for row in after) >= 8
    # With its store it counts on; others see a larger counter, hence a new joining.
    assert len(found.series("fresh", 0)) == 1


def test_joiners_are_sampled_and_leavers_are_not() -> None:
    settings = replace(SMALL, founders=10)
    faults = (Join(who=(10, 11), at=Round(4)), Leave(who=(0, 1), at=Round(6), grace_s=1.0))
    found = run(settings, 12, 40, faults)
    groups = samples(found)
    assert not any(group & {10, 11} for group in groups[:4])
    assert {10, 11} <= set().union(*groups[5:])
    assert not any(group & {0, 1} for group in groups[8:])


@pytest.mark.parametrize("kept", ["kept", "lost"])
def test_noise_of_every_kind(kept: str) -> None:
    faults = (
        Crash(who=(2, 3), at=2.0, until=6.0, store=kept),
        Loss(probability=0.2),
        Corrupt(who=(4, 5), probability=0.5),
    )
    found = run(SMALL, 10, 8, faults, horizon_s=1000.0)
    assert found.finished
    assert [invariant(found) for invariant in INVARIANTS] == [None] * len(INVARIANTS)


def fuzz(seeds: int, first_seed: int = 0) -> Any:
    # Fast devices and large samples: links are hardly ever silent, so most faults meet a message.
    settings = replace(SMALL, sample_size=8, adverts=2)
    program = settings.bind(workload(12, 10))
    network = Network(12, links=LINKS, device=Device(flops_per_s=2e5, spread=0.5, seed=1))
    return explore(
        lambda: program, network, seeds=seeds, horizon_s=2000.0, invariants=INVARIANTS,
        first_seed=first_seed,
    )  # fmt: skip


def test_generated_faults_break_nothing() -> None:
    found = fuzz(40, first_seed=1000)
    assert found.failures == ()
    assert found.ended == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_hundred_fault_lists_break_nothing() -> None:
    found = fuzz(300)
    assert found.failures == ()
    assert found.ended == {}
    assert min(found.kinds.values()) >= 100
    assert found.traces >= 290


def test_the_invariants_can_fail() -> None:
    def row(name: str, value: int, peer: int = 0, time_s: float = 0.0, **labels: str) -> Row:
        return Row(name, value, time_s, 0, peer, tuple(labels.items()))

    def told(*rows: Row) -> list[bool]:
        made = Run("event", 0, 4, rows=list(rows))
        return [invariant(made) is not None for invariant in INVARIANTS]

    good = [row("training", 0), row("training", 1)]
    assert told(*good) == [False] * 4
    assert told(*good, row("training", 1)) == [True, False, False, False]
    assert told(*good, row("training", 0)) == [True, False, False, False]
    assert told(*good, row("fresh", 1), row("training", 0)) == [False] * 4
    counted = row("averaged", 2, 3, 1.0, sources="0")
    assert told(*good, counted) == [False] * 4
    assert told(*good, counted, counted) == [False, True, False, False]
    assert told(*good, row("averaged", 2, 3, 1.0, sources="0 0")) == [False, False, True, False]
    assert told(*good, row("averaged", 2, 3, 1.0, sources="0 1")) == [False, False, False, True]


# On sockets.


@pytest.mark.live
def test_on_sockets() -> None:
    settings = MoDeST(
        sample_size=3, aggregators=2, success_fraction=0.66, ping_timeout_s=2.0, steps=2,
        batch_size=4,
    )  # fmt: skip
    program = settings.bind(workload(6, 4))
    found = run_live(program, Network(6), seed=3, settings=LiveSettings(horizon_s=40.0))
    assert found.finished
    assert len(samples(found)) == 4
    assert [invariant(found) for invariant in INVARIANTS] == [None] * len(INVARIANTS)
    assert {"Trained", "Averaged", "Ping", "Pong", "Ack", "Finished"} <= set(found.bytes_by_kind)


@pytest.mark.live
def test_live_and_event_agree_where_nobody_is_late() -> None:
    """With one aggregator that waits for all, the models depend on the samples alone."""
    settings = replace(SMALL, sample_size=3, aggregators=1, success_fraction=1.0)
    program = settings.bind(workload(5, 3))
    twin = simulate(
        program, Network(5), seed=3, settings=EventSettings(batching="off")
    )  # fmt: skip
    live = run_live(program, Network(5), seed=3, settings=LiveSettings(horizon_s=40.0))
    assert samples(live) == samples(twin)
    assert twin.final.keys() == live.final.keys()
    for peer, params in twin.final.items():
        assert torch.equal(params, live.final[peer])


# The card.


def test_measures_on_a_history_known_by_hand() -> None:
    rows = [Row("training", k, 10.0 * k, k, 0) for k in range(42)]
    # Round 41 takes four times as long, and later ones as before.
    rows += [Row("training", k, 440.0 + 10.0 * (k - 41), k, 1) for k in range(42, 70)]
    rows += [Row("accuracy", 0.5 + 0.01 * k, 10.0 * k, k, 0) for k in range(42)]
    rows = [r for r in rows if r.peer == 1 or r.value < 41 or r.name != "training"]
    history = Run(
        "event", 0, 4, rows=rows,
        happenings=[Happening(400.0, "crash", (2,))], bytes_sent=[5, 1, 1, 1],
        bytes_received=[5, 1, 1, 1], virtual_s=1000.0,
    )  # fmt: skip
    held = Rows({(arm, 0): history for arm in SYSTEM.arms}, tuple(SYSTEM.arms), (0,))
    assert measured.stall_while_dying(held)[0] == pytest.approx(5.0)
    assert measured.stall_afterwards(held)[0] == pytest.approx(1.0)
    assert measured.halts_bare(held)[0] == 0.0
    assert measured.gain_one_by_one(held)[0] == pytest.approx(0.01)
    assert measured.load_of_modest(held)[0] == pytest.approx(2.5)
    assert measured.stall_of_fragile(held)[0] == pytest.approx((1000.0 - 720.0) / 10.0)
    assert measured.rounds_over_fedavg(held)[0] == pytest.approx(1.0)


def test_every_bar_of_the_card_has_its_arms() -> None:
    assert SYSTEM.kind == "program"
    measured_arms = {"modest", "fedavg", "one_by_one", "at_once", "at_once_restart", "join"}
    assert measured_arms <= set(SYSTEM.arms)
    # A run that is missing is no number: the verdict is then "inconclusive", never an exception.
    empty = Rows({}, tuple(SYSTEM.arms), (0,))
    for claim in SYSTEM.claims:
        assert claim.measure is not None
        assert isnan(claim.measure(empty)[0])
