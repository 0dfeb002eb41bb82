"""Lattica at a small size: the figures of each experiment, and fault lists over all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab.experiment import Experiment
from shoal.lab.explore import Trial, generate
from shoal.lab.fuzz import target
from shoal.lab.launch import launch
from shoal.lab.rows import Rows
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Scenario
from shoal.systems.network import _lattica_charts as charts
from shoal.systems.network import _lattica_claims as measured
from shoal.systems.network.lattica import Lattica
from shoal.world.record import Happening, Run

LINES = {
    "name": "links", "latency_s": 0.03, "uplink_bytes_per_s": 6.25e6,
    "downlink_bytes_per_s": 6.25e6,
}  # fmt: skip


def rows_of(runs: dict[str, tuple[Lattica, Scenario]]) -> Rows:
    made = {(arm, 0): launch(what, world, seed=0) for arm, (what, world) in runs.items()}
    assert all(run.finished for run in made.values())
    return Rows(made, runs, [0], {(arm, 0): world for arm, (_, world) in runs.items()})


def world(**changes: Any) -> Scenario:
    return scenario_of("lattica").with_settings({"seconds": 3000.0, **changes})


def test_paths_are_those_that_the_boxes_allow() -> None:
    boxes = {"full cone": 6, "restricted": 6, "port-restricted": 12, "symmetric": 12}
    scenario = world(peers=38, nats=boxes)
    rows = rows_of({
        "punching": (Lattica("paths", pairs=3), scenario),
        "public only": (Lattica("paths", pairs=3, attempts=0, reversal=False), scenario),
        "reversal": (Lattica("paths", pairs=3, attempts=0), scenario),
    })  # fmt: skip
    assert measured.pairs_not_as_predicted(rows) == {0: 0.0}
    assert measured.reached(rows) == {0: 1.0}
    alone, reversed_, punched = (
        share(rows)[0]
        for share in (
            measured.direct_of_public_only, measured.direct_of_reversal, measured.direct_rate
        )
    )  # fmt: skip
    assert 0 < alone < reversed_ < punched < 1
    grid = charts.pairs_by_kind(rows)
    assert dict(grid["symmetric"])["symmetric"] == 0.0
    assert dict(grid["full cone"])["symmetric"] == 1.0


def test_replicas_among_liars_agree_and_a_broadcast_does_not() -> None:
    scenario = measured.partitioned(
        world(peers=12, links={"name": "links", "latency_s": 0.05, "loss": 0.3})
    )
    rows = rows_of({
        "replicas": (Lattica("replicas", liars=2, ops=6), scenario),
        "broadcast": (Lattica("broadcast", ops=6), scenario),
    })  # fmt: skip
    assert measured.converged_periods(rows)[0] <= 3 * 4
    assert measured.forged(rows) == {0: 0.0}
    assert measured.states_of_broadcast(rows)[0] > 1
    assert all(row.value for row in rows.runs["replicas", 0].series("refused"))
    assert charts.states_after_healing(rows)["replicas"][-1][1] == 1.0


def test_a_swarm_beats_a_server_and_moves_what_changed() -> None:
    scenario = world(peers=13, links=LINES)
    settings = {"blob_bytes": 3 << 21, "block_bytes": 1 << 16}
    rows = rows_of({
        work: (Lattica(work, **settings), scenario) for work in ("swarm", "server", "copies")
    })  # fmt: skip
    assert measured.time_over_server(rows)[0] < 0.4
    # Upkeep of the registry and the table weighs more beside a small model.
    assert measured.bytes_of_update(rows)[0] < 0.3
    assert measured.bytes_of_copies(rows)[0] >= 1.0
    assert charts.peers_with_model(rows)["swarm"][-1][1] == 12.0


@pytest.mark.parametrize("seed", [4, 26, 48])
def test_fault_lists_break_nothing(seed: int) -> None:
    """Lists that once broke something: a peer that comes back after the end, a bad link."""
    found = target("lattica")
    faults = generate(seed, found.network.peers, window_s=21.0)
    trial = Trial(lambda: found.program, found.network, 300.0, found.invariants)
    run, problem = trial.run(seed, faults, False)
    assert problem == ""
    assert run is not None


def test_the_rules_complain_when_they_are_broken() -> None:
    found = target("lattica")
    trial = Trial(lambda: found.program, found.network, 300.0, found.invariants)
    run, problem = trial.run(0, (), False)
    assert run is not None
    assert problem == ""
    for name, rule in (
        ("final", measured.replicas_agree_once_it_is_quiet),
        ("found", measured.keys_are_found_once_it_is_quiet),
        ("version", measured.models_arrive_once_it_is_quiet),
        ("forged", measured.nothing_forged_is_accepted),
        ("verified", measured.only_verified_blobs),
        ("invented", measured.nothing_is_invented),
    ):
        spoilt = [
            replace(row, value=1.0 - row.value if row.value < 2 else 0.0) if row.name == name
            and row.peer in (1, 2) else row
            for row in run.rows
        ]  # fmt: skip
        assert rule(replace(run, rows=spoilt)), name
    late = replace(run, happenings=[Happening(15.0, "partition", (1,))], rows=[])
    assert not measured._calm(late)
    assert measured._calm(run)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="liars=-1"):
        Lattica(liars=-1)
    with pytest.raises(UsageError, match="quiet_s"):
        Lattica(quiet_s=0.0)


def test_real_sockets_carry_the_calls_of_the_card() -> None:
    cells = {cell.arm: cell for cell in Experiment.of_system("lattica", "small").cells()}
    assert cells["calls"].engine == "live"
    assert cells["calls"].scenario.engine.processes == 2
    assert discover.load("lattica").arms["calls"].engine == "live"


@pytest.mark.live
def test_calls_over_sockets_follow_the_number_at_once() -> None:
    small = Lattica("calls", share=0.05)
    run: Run = launch(small, world(peers=2, seconds=100.0), seed=0, engine="live")
    assert run.finished
    rates = {row.labels: row.value for row in run.series("calls_per_s")}
    assert len(rates) == 5
    # A busy machine is slower, and none is faster than its calls at once allow.
    assert all(row.value <= 1.02 for row in run.series("of_little"))
