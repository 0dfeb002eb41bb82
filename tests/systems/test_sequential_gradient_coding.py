"""Sequential gradient coding as peers: exact gradients, faults, and studies of delays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.build import build
from shoal.lab.fuzz import target
from shoal.lab.launch import launch
from shoal.parts.coding.sequential_scheme import SequentialScheme
from shoal.parts.coding.straggler_trace import StragglerTrace
from shoal.systems.coding._sequential_invariants import INVARIANTS
from shoal.systems.coding._sequential_work import Chunked
from shoal.systems.coding._sequential_worker import Worker
from shoal.systems.coding.sequential_gradient_coding import Sequential
from shoal.systems.coding.sequential_gradient_traces import sequential_gradient_traces
from shoal.world.record import Row, Run

WORLD = shoal.Scenario(
    peers=7, rounds=8, seconds=10_000.0, eval_every=4,
    task={"name": "digits", "train_samples": 101, "hidden": [4], "holders": [0]},
    links={"name": "links", "latency_s": 0.001},
)  # fmt: skip
SCHEMES: dict[str, dict[str, Any]] = {
    "uncoded": {"scheme": "uncoded"},
    "gc": {"scheme": "gc", "stragglers": 2},
    "sr": {"scheme": "sr_sgc", "burst": 2, "window": 3, "most": 3},
    "m": {"scheme": "m_sgc", "burst": 1, "window": 3, "most": 2},
}


def run(name: str, *, seed: int = 1, faults: Any = (), **changes: Any) -> Run:
    settings = {"stationary": 0.15, "retry_s": 12.0, "patience_s": 40.0, "models": 3} | changes
    world = WORLD.with_settings({"faults": list(faults)})
    return launch(Sequential(**SCHEMES[name], **settings), world, seed=seed)


def values(found: Run, metric: str) -> list[float]:
    return [row.value for row in found.series(metric)]


def test_all_schemes_learn_the_same_from_exact_gradients() -> None:
    runs = {name: run(name) for name in SCHEMES}
    plain = values(runs["uncoded"], "job_loss")
    assert len(plain) == 8
    assert plain[-1] < plain[0]
    for name, found in runs.items():
        assert max(values(found, "gradient_error")) < 1e-10, name
        assert values(found, "job_loss") == pytest.approx(plain, rel=1e-8)
        assert "substituted" not in {row.name for row in found.rows}
        assert max(values(found, "job_delay")) <= {"sr": 2, "m": 2}.get(name, 0)
    assert not values(runs["uncoded"], "cancelled")
    assert values(runs["m"], "cancelled")


def test_the_model_that_is_measured_is_the_first_one_and_everybody_ends_with_it() -> None:
    found = run("m")
    assert sorted(found.final) == list(range(7))
    assert all(torch.equal(params, found.final[0]) for params in found.final.values())
    measured = [row for row in found.series("loss") if row.peer == 0]
    # After each of the jobs 1, 4 and 7, and at the end.
    assert len(measured) == 4
    losses = [row.value for row in measured]
    assert losses == sorted(losses, reverse=True)
    assert max(values(found, "consensus")) < 1e-24


def test_work_of_the_workers_is_the_load_of_the_scheme() -> None:
    found = run("m", stationary=0.0)
    scheme = SequentialScheme.m_sgc(6, 1, 3, 2, jobs=8)
    loads = {row.value for row in found.series("load")
             if scheme.delay < int(dict(row.labels)["round"]) <= 8}  # fmt: skip
    assert all(load == pytest.approx(scheme.load) for load in loads)


def test_workers_that_crash_are_replaced_until_they_are_back() -> None:
    crash = {"kind": "crash", "who": [2, 5], "at": 4.0, "until": 90.0}
    for name in ("uncoded", "m"):
        found = run(name, faults=[crash])
        assert max(values(found, "gradient_error")) < 1e-10
        assert len(values(found, "job_loss")) == 8
        assert values(found, "substituted")


def test_a_worker_whose_results_are_no_numbers_is_as_good_as_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Worker._gradient

    async def broken(self: Worker, mini: Any) -> Any:
        result = await whole(self, mini)
        return result * math.nan if self.worker == 2 else result

    calm = run("m", stationary=0.0)
    monkeypatch.setattr(Worker, "_gradient", broken)
    for name in ("uncoded", "m"):
        found = run(name, stationary=0.0)
        assert max(values(found, "gradient_error")) < 1e-10
        assert values(found, "job_loss") == pytest.approx(values(calm, "job_loss"), rel=1e-8)
        assert set(values(found, "substituted")) == {2.0}
        # Waited for once, and then known.
        assert sum(took > 20.0 for took in values(found, "round_s")) == 1


def test_a_master_that_crashes_goes_on_where_it_was() -> None:
    crash = {"kind": "crash", "who": [0], "at": 14.0, "until": 16.0}
    calm, found = run("m"), run("m", faults=[crash])
    # The last loss of each job: what was under way begins again.
    assert values(found, "job_loss") == pytest.approx(values(calm, "job_loss"), rel=1e-8)
    assert max(values(found, "gradient_error")) < 1e-10


def test_lost_and_damaged_messages_are_sent_again() -> None:
    faults = [
        {"kind": "loss", "who": [1, 2], "at": 0.0, "probability": 0.4},
        {"kind": "corrupt", "who": [3], "at": 0.0, "probability": 0.4},
    ]
    found = run("gc", faults=faults)
    assert len(values(found, "job_loss")) == 8
    assert max(values(found, "gradient_error")) < 1e-10


def test_two_runs_are_the_same() -> None:
    assert run("m").trace_digest == run("m").trace_digest


def test_chunks_have_every_sample_once_whatever_the_fractions_are() -> None:
    task = build(WORLD).task
    for scheme in (
        SequentialScheme.m_sgc(6, 2, 4, 3, jobs=1), SequentialScheme.m_sgc(64, 1, 2, 9, jobs=1)
    ):  # fmt: skip
        chunked = Chunked.of(task, scheme.sizes)
        assert chunked.samples == 101
        assert sum(chunked.count(chunk) for chunk in range(len(scheme.sizes))) == 101
        batch, share = chunked.batch(scheme.rule.task(0, 1, scheme.rule.delay))
        assert batch.mask.sum(-1).tolist() == [
            chunked.count(chunk) for chunk in scheme.rule.task(0, 1, scheme.rule.delay).chunks
        ]
        assert share.dtype.is_floating_point


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="train 3 models"):
        run("m", models=2)
    with pytest.raises(UsageError, match="scheme='other'"):
        Sequential(scheme="other")
    world = WORLD.with_settings({"task.holders": [1]})
    with pytest.raises(UsageError, match="peer 0 has no data"):
        launch(Sequential(models=3, scheme="uncoded"), world, seed=1)


DELAYS = shoal.Scenario(peers=24, rounds=30)


def test_the_study_decodes_everything_and_orders_the_families() -> None:
    found = sequential_gradient_traces(DELAYS, mean_burst=1.0, max_delay=2)
    told = {row.name: row.value for row in found.rows}
    assert told["undecoded"] == 0.0
    assert told["load_gap"] < 1e-9
    assert told["oracle_s"] < told["m_sgc_s"] < told["gc_s"] < told["uncoded_s"]
    assert told["m_sgc_load"] < told["gc_load"]


def test_recorded_delays_are_read(tmp_path: Path) -> None:
    file = tmp_path / "delays.csv"
    StragglerTrace(mean_burst=1.0).profile(1 / 24, 24, 80, seed=4).write(file)
    settings: dict[str, Any] = {"delays": str(file), "delays_load": 1 / 24, "max_delay": 2}
    found = sequential_gradient_traces(DELAYS, **settings)
    told = {row.name: row.value for row in found.rows}
    assert told["m_sgc_s"] < told["uncoded_s"]
    with pytest.raises(UsageError, match="24 workers"):
        sequential_gradient_traces(shoal.Scenario(peers=5, rounds=3), **settings)
    with pytest.raises(UsageError, match="record more"):
        sequential_gradient_traces(shoal.Scenario(peers=24, rounds=60), **settings)


def test_replication_learns_the_same_and_tolerates_its_groups() -> None:
    settings: dict[str, Any] = {
        "stationary": 0.15,
        "models": 3,
        "retry_s": 12.0,
        "patience_s": 40.0,
    }
    found = launch(Sequential(scheme="replicated", stragglers=1, **settings), WORLD, seed=1)
    assert values(found, "job_loss") == pytest.approx(values(run("gc"), "job_loss"), rel=1e-8)
    assert max(values(found, "gradient_error")) < 1e-10
    with pytest.raises(UsageError, match=r"s \+ 1 must divide"):
        launch(Sequential(scheme="replicated", stragglers=3, **settings), WORLD, seed=1)


def test_the_worst_stragglers_cost_the_schemes_without_delay_more() -> None:
    found = sequential_gradient_traces(DELAYS, kind="adversarial", mean_burst=1.0, max_delay=2)
    told = {row.name: row.value for row in found.rows}
    assert told["slow_share"] == pytest.approx(4 / 24 / 3, rel=0.1)
    assert told["undecoded"] == 0.0
    at_once = min(told[f"{family}_s"] for family in ("uncoded", "replicated", "gc"))
    assert told["m_sgc_s"] < at_once
    # Whole groups are late together: replication waits, or has more copies than are late.
    assert told["replicated_waits"] > 0.2 or told["replicated_load"] > 4 / 24
    assert told["m_sgc_waits"] == 0.0


FAULTS = [
    {"kind": "crash", "who": [0], "at": 14.0, "until": 16.0},
    {"kind": "loss", "who": [2], "at": 0.0, "probability": 0.3},
]


def test_what_every_run_keeps_is_kept_and_can_be_broken() -> None:
    calm, struck = run("m"), run("m", faults=FAULTS)
    for invariant in INVARIANTS:
        assert invariant(calm) is None
        assert invariant(struck) is None

    def broken(name: str, change: Callable[[Row], Row | None]) -> list[str]:
        rows = [change(row) if row.name == name else row for row in calm.rows]
        other = replace(calm, rows=[row for row in rows if row is not None])
        return [each.__name__ for each in INVARIANTS if each(other) is not None]

    def third(row: Row) -> bool:
        return ("job", "3") in row.labels

    assert broken("gradient_error", lambda row: replace(row, value=1e-6)) == ["gradients_are_exact"]
    assert broken("job_delay", lambda row: replace(row, value=3.0)) == ["jobs_are_in_time"]
    assert broken("load", lambda row: replace(row, value=0.9)) == ["nobody_does_more_than_the_load"]
    assert broken("job_loss", lambda row: None if third(row) else row) == [
        "jobs_are_applied_in_order", "who_ends_has_done_all",
    ]  # fmt: skip
    again = replace(
        calm, rows=[*calm.rows, *(row for row in calm.series("job_loss") if third(row))]
    )
    assert [each.__name__ for each in INVARIANTS if each(again)] == ["jobs_are_applied_in_order"]


def test_a_master_that_lost_its_store_gets_no_work_of_its_former_life() -> None:
    # Fuzzing found it: workers took the new life for the old one, and answered from what they had.
    faults = [
        {"kind": "leave", "who": [1], "at": {"round": 6}, "grace_s": 0.778931},
        {"kind": "crash", "who": [0, 7], "at": 29.630561, "until": 29.63113, "store": "lost"},
    ]
    failure = {"seed": 47, "strict": False, "faults": faults}
    assert target("sequential-gradient-coding").replay(failure) is None
