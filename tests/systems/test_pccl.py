"""PCCL: what it sends, equal bits in every form, newcomers, misuse, processes that are killed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import shoal
from shoal.base.errors import UsageError
from shoal.engine.event.simulation import EventSettings, simulate
from shoal.lab import discover
from shoal.lab.cell import cell_of, execute
from shoal.lab.fuzz import target
from shoal.lab.launch import launch
from shoal.lab.processes import run_processes
from shoal.lab.scenario import Scenario
from shoal.parts.collective.communicator import Communicator
from shoal.parts.collective.ring import Ring
from shoal.systems.collective import _pccl_churn as churn
from shoal.systems.collective._pccl_claims import everybody_counts_once, one_state_after_each_step
from shoal.systems.collective.pccl import INVARIANTS, PCCL
from shoal.world.record import Row, Run

WORLD = Scenario(
    "pccl", peers=5, rounds=5, eval_every=1,
    task={"name": "digits", "split": "iid", "hidden": [8], "train_samples": 240},
    links={"name": "links", "latency_s": 0.01, "uplink_bytes_per_s": 1e6},
    device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip
DIM = 64 * 8 + 8 + 8 * 10 + 10


def run(scenario: Scenario = WORLD, **settings: Any) -> Run:
    found = shoal.run(shoal.Arm(system="pccl", set={"steps": 3, "batch_size": 8, **settings}),
                      scenario)  # fmt: skip
    assert all(rule(found) is None for rule in INVARIANTS)
    return found


def by_step(found: Run, name: str) -> dict[int, list[float]]:
    out: dict[int, list[float]] = defaultdict(list)
    for row in found.series(name):
        out[int(dict(row.labels)["step"])].append(row.value)
    return out


@pytest.mark.parametrize("mode", ["diloco", "async", "ddp"])
@pytest.mark.parametrize("works", [True, False])
def test_bytes_are_those_of_the_formula_and_bits_are_equal(mode: str, works: bool) -> None:
    found = run(mode=mode, master_works=works, audit=False, direct=False)
    workers = 5 if works else 4
    reductions = 5 * (3 if mode == "ddp" else 1)
    sent = sum(row.value for row in found.series("payload_bytes"))
    # The ring that counts heads moves three int64 once.
    heads = 2 * (workers - 1) * 3 * 8
    assert sent == 2 * (workers - 1) * DIM * 4 * reductions + heads
    steps = by_step(found, "state")
    assert sorted(steps) == list(range(1, reductions + 1))
    assert all(len(set(values)) == 1 and len(values) == workers for values in steps.values())
    assert sorted(found.final) == list(range(0 if works else 1, 5))


def test_ddp_and_diloco_see_the_same_samples() -> None:
    """One step of plain data parallel training is a round of DiLoCo with one inner step."""
    one = {"steps": 1, "outer_lr": 1.0, "outer_momentum": 0.0, "weight_decay": 0.0}
    few = replace(WORLD, rounds=1)
    ddp, diloco = run(few, **one, mode="ddp"), run(few, **one)
    # AdamW's first step moves every weight by lr in the direction of the gradient's sign: for
    # DiLoCo of each peer's own, averaged; so they agree where all peers do.
    start = shoal.run(shoal.Arm(system="pccl", set={**one, "lr": 1e-12}), few).final[1]
    moved = (diloco.final[1] - start).abs() > 0.9e-3
    assert moved.any()
    assert ((ddp.final[1] - diloco.final[1]).abs()[moved] < 1e-5).all()


def test_one_byte_per_number_is_a_quarter_and_a_scale() -> None:
    raw, small = run(audit=False, direct=False), run(quantise=True, direct=False)
    bytes_of = [sum(r.value for r in each.series("payload_bytes")) for each in (raw, small)]
    heads = 2 * 4 * 3 * 8
    assert bytes_of[1] - heads == 5 * 2 * 4 * (DIM + 5 * 8)
    assert bytes_of[0] / bytes_of[1] > 3.0
    last = [each.series("mean_model_loss")[-1].value for each in (raw, small)]
    assert last[0] == pytest.approx(last[1], rel=0.02)


@pytest.mark.parametrize("mode", ["diloco", "async"])
def test_who_is_killed_comes_back_and_who_is_late_comes_in(mode: str) -> None:
    faults = [
        {"kind": "crash", "who": [2], "at": 0.6, "until": 1.2},
        {"kind": "join", "who": [4], "at": 0.9},
    ]
    world = replace(WORLD, rounds=14).with_settings({"faults": faults})
    found = run(world, mode=mode, least=3, pace_s=0.2)
    assert found.finished
    assert {row.value for row in found.series("steps")} == {14.0}
    assert len({row.value for row in found.series("end_state")}) == 1
    voters = {row.value for row in found.series("voters")}
    assert 0b11111 in voters
    assert len(voters) > 1
    assert not by_step(found, "miscounted")[14][0]


def test_a_master_that_dies_ends_the_run_and_one_that_restarts_takes_it_up() -> None:
    crash = {"kind": "crash", "who": [0], "at": 0.8}
    quick = {"master_works": False, "patience_s": 3.0, "master_timeout_s": 1.0, "pace_s": 0.2}
    gone = run(WORLD.with_settings({"faults": [crash], "rounds": 12}), **quick)
    assert gone.finished
    assert {row.value for row in gone.series("steps")} <= set(range(12))
    back = WORLD.with_settings({"faults": [{**crash, "until": 1.5}], "rounds": 12})
    found = run(back, **{**quick, "patience_s": 10.0})
    assert {row.value for row in found.series("steps")} == {12.0}
    assert len({row.value for row in found.series("end_state")}) == 1


@pytest.mark.parametrize("mode", ["diloco", "async"])
def test_fault_lists_part_no_group(mode: str) -> None:
    small = {
        "mode": mode, "steps": 1, "batch_size": 4, "peers": 6, "rounds": 5, "task.hidden": [4],
        "task.train_samples": 200, "task.holders": None,
    }  # fmt: skip
    explored = target("pccl", small).explore(4)
    assert not explored.failures
    assert explored.traces >= 2


SMALL = {
    "steps": 1, "batch_size": 4, "peers": 5, "rounds": 4, "task.hidden": [4],
    "task.train_samples": 200, "task.holders": None,
}  # fmt: skip


def test_exploration_audits_every_average_unless_told_otherwise() -> None:
    aim = target("pccl", SMALL)
    assert aim.program.settings.audit
    assert not aim.program.settings.quantise
    assert everybody_counts_once in aim.invariants
    found = simulate(aim.program, aim.network, settings=EventSettings(horizon_s=aim.horizon_s))
    applied = found.series("state")
    assert len(applied) == 4 * 5
    assert [r.labels for r in found.series("voters")] == [r.labels for r in applied]
    assert {r.value for r in found.series("voters")} == {0b11111}


@pytest.mark.parametrize("wrong", ["twice", "never"])
def test_exploration_finds_a_contribution_that_counts_twice_or_never(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes wrong only where a ring begins again, which takes a fault."""
    whole = Ring.reduce

    async def reduce(self: Any, peer: Any, operation: int, order: Any, values: Any, *rest: Any
                     ) -> Any:  # fmt: skip
        again = getattr(values, "begun", False)
        values.begun = True
        if again and peer.id == order[0]:
            values = values * (2.0 if wrong == "twice" else 0.0)
        return await whole(self, peer, operation, order, values, *rest)

    async def kept(self: Any, values: Any, *args: Any, **settings: Any) -> None:
        # The tensor of a retry is the same one.
        flat = values.view(-1)
        values.view = lambda *_: flat
        await retried(self, values, *args, **settings)

    retried = Communicator.all_reduce_with_retry
    monkeypatch.setattr(Ring, "reduce", reduce)
    monkeypatch.setattr(Communicator, "all_reduce_with_retry", kept)
    explored = target("pccl", {**SMALL, "direct": False}).explore(8)
    assert explored.failures
    assert explored.failures[0].problem.where == "everybody_counts_once"
    assert explored.failures[0].generated


def row(name: str, value: float, peer: int, step: int) -> Row:
    labels = (("operation", "7"), ("step", str(step)))
    return Row(name, value, 1.0, step, peer, labels)


def test_checkers_see_what_they_are_for() -> None:
    apart = [row("state", 1.0, 1, 2), row("state", 2.0, 2, 2)]
    assert "2 states" in (one_state_after_each_step(Run("event", 0, 3, apart)) or "")
    assert (
        one_state_after_each_step(Run("event", 0, 3, [apart[0], row("state", 1.0, 2, 2)])) is None
    )
    without = [row("voters", 0b110, 0, 2)]
    assert "without being in it" in (everybody_counts_once(Run("event", 0, 3, without)) or "")
    doubled = [row("miscounted", 0.5, 1, 2)]
    assert "wrong by 0.5" in (everybody_counts_once(Run("event", 0, 3, doubled)) or "")
    two = [row("voters", 0b110, 1, 2), row("voters", 0b111, 2, 2)]
    assert "two different sets" in (everybody_counts_once(Run("event", 0, 3, two)) or "")
    unseen = [row("voters", 0b110, 1, 2), row("state", 5.0, 1, 2), row("state", 5.0, 2, 2)]
    assert "peer 2 was not audited" in (everybody_counts_once(Run("event", 0, 3, unseen)) or "")
    assert everybody_counts_once(Run("event", 0, 3, unseen[1:])) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "sync"}, "mode='sync'"), ({"steps": 0}, "steps=0"),
        ({"inner_s": -1.0}, "inner_s=-1.0"), ({"timeout_s": 0.0}, "timeout_s=0.0"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PCCL(**settings)


def test_too_few_peers_are_refused() -> None:
    with pytest.raises(UsageError, match="least=9"):
        run(least=9)
    with pytest.raises(UsageError, match="least=1"):
        run(replace(WORLD, peers=2), master_works=False)


def test_the_kill_list_is_drawn_by_key_and_leaves_both_ends_alone() -> None:
    world = discover.scenario("collective.digits_processes")
    faults = churn.kill_list(world).faults
    assert faults == churn.kill_list(world).faults
    assert 20 <= len(faults) <= 56
    times = [float(fault.at) for fault in faults]
    assert times[0] >= 3.0
    assert times[-1] < 200 * churn.PACE_S - 4.0
    assert all(1.0 <= b - a <= 3.001 for a, b in pairwise(times))
    assert {peer for fault in faults for peer in fault.who or ()} == set(range(1, 7))
    assert churn.kill_list(replace(world, seed=5)).faults != faults


def test_processes_are_killed_at_seconds_and_all_or_none_come_back() -> None:
    def cell(*faults: dict[str, Any]) -> Any:
        arm = shoal.Arm(system="pccl", engine="processes")
        return cell_of("a", arm, 0, WORLD.with_settings({"faults": list(faults)}))

    assert cell().engine == "processes"
    with pytest.raises(UsageError, match="killed at seconds"):
        run_processes(cell({"kind": "crash", "who": [1], "at": {"round": 2}}))
    with pytest.raises(UsageError, match="all or not at all"):
        run_processes(
            cell(
                {"kind": "crash", "who": [1], "at": 2.0},
                {"kind": "crash", "who": [2], "at": 2.0, "until": 3.0},
            )
        )


@pytest.mark.slow
@pytest.mark.live
def test_a_process_that_is_killed_is_replaced() -> None:
    world = replace(WORLD, peers=4, rounds=60).with_settings(
        {"faults": [{"kind": "crash", "who": [2], "at": 2.0, "until": 2.5}]}
    )
    settings = {
        "steps": 2, "batch_size": 8, "master_works": False, "least": 2, "pace_s": 0.25,
        "timeout_s": 1.5, "heartbeat_s": 0.2,
    }  # fmt: skip
    arm = shoal.Arm(system="pccl", set=settings, engine="processes")
    found = execute(cell_of("killed", arm, 0, world), launch)
    assert found.engine == "live"
    assert found.finished
    marks = [mark.what for mark in found.happenings if mark.peers == (2,)]
    assert any("SIGKILL" in mark for mark in marks)
    assert any(mark.startswith("restarted") for mark in marks)
    assert all(rule(found) is None for rule in INVARIANTS)
    assert 60.0 in {row.value for row in found.series("steps")}
