"""Just One Byte: equal bits, bytes by formula, sequencers that die, newcomers, drift, sockets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.engine.live import LiveSettings, run_live
from shoal.lab.cell import cell_of, execute
from shoal.lab.experiment import Experiment
from shoal.lab.explore import explore
from shoal.lab.fuzz import INVARIANTS as COMMON
from shoal.lab.launch import launch, program_of
from shoal.lab.rows import Rows
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Scenario
from shoal.parts.transform.quantise import Quantise
from shoal.parts.zeroth_order.calm import calm
from shoal.parts.zeroth_order.replay import Entry, Log
from shoal.systems.compression import _just_one_byte_claims as measured
from shoal.systems.compression import _just_one_byte_wire as wire
from shoal.systems.compression._just_one_byte_order import Sequencer
from shoal.systems.compression._just_one_byte_replica import Replica
from shoal.systems.compression._just_one_byte_wire import Offer, Ordered
from shoal.systems.compression.just_one_byte import INVARIANTS, SYSTEM, JustOneByte
from shoal.tensor.threads import one_thread
from shoal.testing.ladder import check_live, check_program
from shoal.wire.codec import size_of
from shoal.wire.message import declared_kinds
from shoal.world.faults import Corrupt, Crash, Join, Leave, Loss, Partition, Round, Slow
from shoal.world.record import Row, Run

WORLD = Scenario(
    "just-one-byte", peers=6, rounds=12, eval_every=4,
    task={"name": "digits", "split": "iid", "hidden": [8], "train_samples": 240},
    links={"name": "links", "latency_s": 0.02, "latency_spread": 0.3},
    device={"name": "device", "flops_per_s": 1e7, "spread": 0.3},
)  # fmt: skip
QUICK = JustOneByte(
    audit=True, batch_size=8, check_every=1, founding_s=0.2, wait_s=0.1, silence_s=0.4,
    retry_s=0.1, give_up_s=20.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    with one_thread():
        yield


def run(*faults: Any, what: JustOneByte = QUICK, world: Scenario = WORLD, seed: int = 3) -> Run:
    program, network = program_of(what, world, seed)
    settings = EventSettings(horizon_s=200.0)
    found = simulate(program, replace(network, faults=faults), seed=seed, settings=settings)
    assert found.finished
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    return found


def ended(found: Run) -> dict[int, int]:
    """How many iterations each peer that lived to the end has applied."""
    return {row.peer: int(row.value) for row in found.series("iterations")}


def counted(found: Run) -> dict[int, set[int]]:
    """Whose numbers each iteration applied, as somebody did who has it to the end."""
    whole = {row.peer for row in found.series("iterations") if row.value == WORLD.rounds}
    out: dict[int, set[int]] = {}
    for row in found.series("applied"):
        if row.peer in whole:
            out[int(row.value)] = set(map(int, dict(row.labels)["machines"].split()))
    return out


# Settings.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"eps": 0.0}, "eps=0"), ({"eps": -1.0}, "eps=-1"), ({"lr": 0.0}, "lr=0"),
        ({"samples": 0}, "samples=0"), ({"batch_size": 0}, "batch_size=0"),
        ({"number": "half"}, "number='half'"), ({"newcomers": "all"}, "newcomers='all'"),
        ({"lowest": 10**6}, "lowest="), ({"wait_s": 0.0}, "wait_s=0"),
        ({"silence_s": math.inf}, "silence_s=inf"), ({"check_every": -1}, "check_every=-1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        JustOneByte(**settings)


def test_worlds_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="founders=7 of 6"):
        program_of(replace(QUICK, founders=7), WORLD, 0)
    with pytest.raises(UsageError, match="no rounds"):
        program_of(QUICK, replace(WORLD, rounds=None, seconds=9.0), 0)
    with pytest.raises(UsageError, match="transform Quantise"):
        program_of(QUICK, replace(WORLD, transform=Quantise()), 0)
    with pytest.raises(UsageError, match="nothing fails here"):
        shoal.run(
            shoal.Arm(system="just-one-byte-calm"),
            WORLD.with_settings({"faults": [{"kind": "crash", "count": 1, "at": 1.0}]}),
        )


# Without failures.


@pytest.mark.parametrize("what", [
    QUICK, replace(QUICK, samples=3, mean=False), replace(QUICK, number="float"),
])  # fmt: skip
def test_every_replica_has_the_bits_of_the_calm_group(what: JustOneByte) -> None:
    found = run(what=what)
    program, _ = program_of(what, WORLD, 3)
    task, start = program.workload.task, program.workload.initial
    steps = list(calm(task, program.rule, program.spsa, start, 12))
    log = Log(program.rule, tuple(range(6)), entries=[entry for entry, _ in steps])
    params = steps[-1][1]
    assert sorted(found.final) == list(range(6))
    assert all(torch.equal(final, params) for final in found.final.values())
    assert torch.equal(log.replay(start), params)
    assert not torch.equal(start, params)
    assert counted(found) == {t: set(range(6)) for t in range(12)}


def test_bytes_are_those_of_the_formula() -> None:
    what = replace(QUICK, check_every=0, samples=5, retry_s=5.0, silence_s=50.0, give_up_s=100.0)
    found = run(what=what)
    group = tuple(range(6))
    offers = ordered = 0
    for t in range(12):
        offers += 5 * size_of(Offer(0, t, -1 if t == 0 else 0, bytes(5), 0))
        entry = Entry(group, group, bytes(30)).pack(group)
        ordered += 5 * size_of(Ordered(0, t, entry))
    offers += 5 * size_of(Offer(0, 12, 0, b"", 0))
    ordered += 5 * size_of(Ordered(0, 12, b""))
    assert found.bytes_by_kind["Offer"] == offers
    # Those who hear that the run is over ask once for what they may have missed.
    assert found.bytes_by_kind["Ordered"] == ordered
    assert set(found.bytes_by_kind) == {"Offer", "Ordered", "Want", "Whole"}
    assert sum(row.value for row in found.series("payload_bytes")) == 6 * 12 * 5


def test_one_machine_needs_nobody() -> None:
    found = run(world=replace(WORLD, peers=1))
    assert found.messages_sent == 0
    assert ended(found) == {0: 12}


def test_the_ladder() -> None:
    program, network = program_of(QUICK, WORLD, 3)
    found = check_program(program, network, seed=3)
    assert found.finished


def test_a_loss_that_is_not_finite_is_dropped_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, network = program_of(QUICK, WORLD, 3)
    poisoned = program.workload.task.shard(2).index[0]
    program.workload.task.x[poisoned] = math.nan
    try:
        found = simulate(program, network, seed=3)
    finally:
        program.workload.task.x[poisoned] = 0.0
    dropped = {row.peer: row.value for row in found.series("dropped")}
    assert dropped.pop(2) > 0
    assert set(dropped.values()) == {0.0}
    assert all(bool(params.isfinite().all()) for params in found.final.values())
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)


# Members that go and come.


@pytest.mark.parametrize("victim", range(6))
@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.85])
def test_any_member_may_die_at_any_time(victim: int, at: float) -> None:
    found = run(Crash(who=(victim,), at=at))
    others = {peer: 12 for peer in range(6) if peer != victim}
    assert ended(found) == others


@pytest.mark.parametrize("gone", [(0, 1), (0, 5), (3, 4)])
def test_two_of_six_may_die_at_once(gone: tuple[int, int]) -> None:
    found = run(Crash(who=gone, at=0.5))
    assert ended(found) == {peer: 12 for peer in range(6) if peer not in gone}
    assert counted(found)[11] == set(range(6)) - set(gone)


def test_one_after_the_other_all_but_two_die() -> None:
    found = run(*(Crash(who=(p,), at=1.0 + 2.0 * p) for p in range(4)),
                world=replace(WORLD, rounds=120))  # fmt: skip
    assert ended(found) == {4: 120, 5: 120}


def test_half_of_a_group_does_not_go_on_alone() -> None:
    """Three of six are no majority: whoever is cut off must not make a history of its own."""
    found = run(Partition(who=(0, 1, 2), at=0.5, until=9.0))
    assert ended(found) == dict.fromkeys(range(6), 12)
    gap = [row.time_s for row in found.series("applied")]
    assert not [t for t in gap if 1.0 < t < 9.0]
    cut = run(Partition(who=(0, 1), at=0.5))
    assert {p: n for p, n in ended(cut).items() if p > 1} == dict.fromkeys(range(2, 6), 12)
    assert all(n < 12 for p, n in ended(cut).items() if p <= 1)
    assert {row.peer for row in cut.series("gave_up")} == {0, 1}


def test_a_member_that_leaves_is_not_waited_for() -> None:
    what = replace(QUICK, wait_s=5.0, silence_s=60.0, give_up_s=100.0)
    found = run(Leave(who=(4,), at=0.5, grace_s=0.1), what=what)
    assert ended(found) == {peer: 12 for peer in range(6) if peer != 4}
    assert found.virtual_s < 65.0
    assert max(row.time_s for row in found.series("applied")) < 5.0


@pytest.mark.parametrize("newcomers", ["log", "weights", "auto"])
def test_a_newcomer_gets_the_model_and_takes_part(newcomers: str) -> None:
    what = replace(QUICK, founders=4, newcomers=newcomers)
    world = replace(WORLD, rounds=40)
    found = run(Join(who=(4, 5), at=Round(10)), what=what, world=world)
    assert ended(found) == dict.fromkeys(range(6), 40)
    whole = {int(r.value): dict(r.labels)["machines"] for r in found.series("applied")}
    assert whole[9] == "0 1 2 3"
    assert whole[39] == "0 1 2 3 4 5"
    bytes_of_weights = 4 * (64 * 8 + 8 + 80 + 10)
    large = found.bytes_by_kind["Whole"] > 2 * bytes_of_weights
    assert large == (newcomers == "weights")


def test_who_starts_again_is_let_in_anew() -> None:
    for store in ("kept", "lost"):
        found = run(
            Crash(who=(0, 3), at=0.6, until=1.0, store=store), world=replace(WORLD, rounds=40)
        )
        assert ended(found) == dict.fromkeys(range(6), 40)
        last = [r for r in found.series("applied") if r.value == 39]
        assert {dict(r.labels)["machines"] for r in last} == {"0 1 2 3 4 5"}


def test_a_slow_member_holds_up_nobody_for_long() -> None:
    found = run(Slow(who=(2,), factor=300.0))
    calm_s = max(row.time_s for row in run().series("applied"))
    others = max(row.time_s for row in found.series("applied") if row.peer != 2)
    assert others < calm_s + 12 * QUICK.wait_s + QUICK.silence_s
    without = [machines for machines in counted(found).values() if 2 not in machines]
    assert len(without) >= 8


def test_bits_that_flip_on_the_wire_are_found() -> None:
    found = run(Corrupt(probability=0.3), Loss(probability=0.1))
    assert max(ended(found).values()) == 12


def test_weights_that_drift_are_found_and_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose arithmetic goes wrong once: a member, and the sequencer itself."""
    extend = Replica.extend
    for victim in (2, 0):

        async def faulty(self: Replica, entries: Any, victim: int = victim) -> None:
            await extend(self, entries)
            if self.peer.id == victim and self.end == 5:
                self.params = self.params + 1e-3 * torch.ones_like(self.params)

        with monkeypatch.context() as patch:
            patch.setattr(Replica, "extend", faulty)
            program, network = program_of(replace(QUICK, audit=False), WORLD, 3)
            found = simulate(program, network, seed=3)
        assert {row.peer for row in found.series("drifted")} == {victim}
        finals = list(found.final.values())
        assert len(finals) == 6
        assert all(torch.equal(final, finals[0]) for final in finals)


def test_all_messages_are_checked() -> None:
    """A flipped bit that one member applies would part it from the others for good."""
    ours = [kind for kind in declared_kinds() if kind.__module__ == wire.__name__]
    assert len(ours) == 8
    assert all(kind.checked for kind in ours)
    log = Log(program_of(QUICK, WORLD, 0)[0].rule, (0, 1))
    assert wire.group_of(wire.whole(log, 3, 0, {}, False).before) == (0, 1)


def fuzz(seeds: int, first_seed: int) -> Any:
    program, network = program_of(QUICK, replace(WORLD, peers=7, rounds=10, eval_every=1), 3)
    return explore(
        lambda: program, network, seeds=seeds, horizon_s=200.0,
        invariants=(*COMMON, *INVARIANTS), first_seed=first_seed,
    )  # fmt: skip


def test_generated_faults_break_nothing() -> None:
    found = fuzz(25, first_seed=1000)
    assert found.failures == ()
    assert found.ended == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_hundred_fault_lists_break_nothing() -> None:
    found = fuzz(300, first_seed=0)
    assert found.failures == ()
    assert found.ended == {}
    assert min(found.kinds.values()) >= 100
    assert found.traces >= 270


def test_without_majorities_there_are_two_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the invariants are for: a sequencer that orders whatever it has."""

    async def hasty(self: Sequencer, term: int, now: int) -> dict[int, Offer] | None:
        peer, offers = self.node.peer, {}
        deadline = peer.now() + 0.1
        while (heard := await peer.recv(Offer, deadline=deadline)) is not None:
            if heard.message.iteration == now:
                offers[int(heard.source)] = heard.message
        return offers if self.node.term == term else None

    monkeypatch.setattr(Sequencer, "_collect", hasty)
    program, network = program_of(replace(QUICK, give_up_s=5.0), WORLD, 3)
    cut = Partition(who=(0, 5), at=0.5, until=4.0)
    found = simulate(
        program, replace(network, faults=(cut,)), seed=3, settings=EventSettings(horizon_s=60.0)
    )
    assert measured.one_history(found) is not None


def test_the_invariants_can_fail() -> None:
    def told(*rows: Row) -> list[bool]:
        made = Run("event", 0, 4, rows=list(rows))
        return [rule(made) is not None for rule in INVARIANTS]

    def row(name: str, value: float, peer: int, **labels: str) -> Row:
        return Row(name, value, 0.0, 0, peer, tuple(labels.items()))

    state = [row("state", 5.0, peer, iteration="3") for peer in range(2)]
    assert told(*state) == [False, False, False]
    assert told(*state, row("state", 6.0, 2, iteration="3")) == [True, False, False]
    assert told(row("replayed", 1.0, 0)) == [False, False, False]
    assert told(row("replayed", 0.0, 0)) == [False, True, False]
    made = [row("made", 3, 0, codes="aa"), row("made", 3, 1, codes="bb")]
    assert told(*made, row("applied", 3, 2, machines="0 1", codes="aabb")) == [False] * 3
    assert told(*made, row("applied", 3, 2, machines="0 0", codes="aaaa"))[2]
    assert told(*made, row("applied", 3, 2, machines="0 1", codes="aabc"))[2]
    assert told(*made, row("applied", 4, 2, machines="0", codes="aa"))[2]


# On sockets.


@pytest.mark.live
def test_live_and_event_hold_the_same_bits() -> None:
    what = JustOneByte(audit=True, batch_size=8, wait_s=20.0, silence_s=5.0, retry_s=2.0)
    world = replace(WORLD, peers=4, rounds=6)
    program, network = program_of(what, world, 3)
    check_live(program, program_of(what, world, 3)[0], 3, network)


@pytest.mark.slow
@pytest.mark.live
def test_on_sockets_the_sequencer_dies_and_one_comes() -> None:
    what = JustOneByte(
        audit=True, batch_size=8, founders=4, founding_s=1.0, wait_s=0.2, silence_s=0.8,
        retry_s=0.2, check_every=10,
    )  # fmt: skip
    world = replace(WORLD, peers=5, rounds=400, links=None)
    program, network = program_of(what, world, 3)
    faults = (Crash(who=(0,), at=Round(60)), Join(who=(4,), at=Round(30)))
    found = run_live(
        program, replace(network, faults=faults), seed=3, settings=LiveSettings(horizon_s=40.0)
    )
    assert found.finished
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    assert {p: n for p, n in ended(found).items() if p} == dict.fromkeys(range(1, 5), 400)


# The card.


def test_arms_and_measures() -> None:
    assert SYSTEM.kind == "program"
    empty = Rows({}, tuple(SYSTEM.arms), (0,))
    for claim in SYSTEM.claims:
        assert claim.measure is not None
        assert math.isnan(claim.measure(empty)[0])
    losses = [2.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2]
    rows = [Row("mean_model_loss", v, t, 100 * t) for t, v in enumerate(losses)]
    rows += [Row("mean_model_accuracy", 0.5 + t / 40, t, 100 * t) for t in range(13)]
    byte = Run("event", 0, 8, rows=rows)
    single = Run("study", 0, 1, rows=[replace(r, value=0.55) for r in rows[:13]])
    held = Rows({("byte", 0): byte, ("single", 0): single}, tuple(SYSTEM.arms), (0,))
    assert measured.final_loss(held, "byte", 0) == pytest.approx(0.2)
    assert measured.share_of_iterations(held)[0] == pytest.approx(801 / 1201)
    assert measured.accuracy_gained(held)[0] == pytest.approx(0.3)


def test_the_cell_of_churn_kills_the_sequencer() -> None:
    (cell,) = [c for c in Experiment.of_system("just-one-byte", "full", seed=0).cells()
               if c.arm == "churn" and c.seed == 0]  # fmt: skip
    faults = cell.scenario.explicit_faults()
    assert [(f.kind, f.who) for f in faults] == [
        ("crash", (0,)), ("join", (8, 9)), ("crash", (5,)),
    ]  # fmt: skip
    assert cell.scenario.peers == 10


def test_the_study_and_the_program_draw_one_curve() -> None:
    settings = {"rounds": 6, "eval_every": 2, "peers": 4}
    curves = []
    for system in ("just-one-byte", "just-one-byte-calm"):
        arm = shoal.Arm(system=system, scenario=settings)
        found = execute(cell_of("a", arm, 0, scenario_of("just-one-byte")), launch)
        curves.append([(r.round, r.value) for r in found.series("mean_model_loss")])
    assert [t for t, _ in curves[0]] == [t for t, _ in curves[1]] == [0, 1, 3, 5]
    assert [v for _, v in curves[0]] == pytest.approx([v for _, v in curves[1]], rel=1e-5)
