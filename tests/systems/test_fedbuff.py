"""FedBuff as a baseline: its formula on its server, what its settings refuse, faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.lab.explore import explore
from shoal.parts import find
from shoal.rounds.workload import Workload
from shoal.systems.baselines.fedbuff import INVARIANTS, FedBuff
from shoal.testing.ladder import check_program
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

LINKS = Links(latency_s=0.02, latency_spread=0.3, seed=1)
DEVICE = Device(spread=1.0, seed=1)


def program(peers: int = 6, versions: int = 20, **settings: Any) -> Any:
    task = find("tasks", "quadratics")(peers=peers, dim=3, condition=1.0)
    transform = find("transform", "identity")().bind(task.spec)
    workload = Workload(task, find("aggregate", "mean")(), transform, versions, None, seed=3)
    return FedBuff(**{"buffer": 3, "step_s": 0.1, "give_up_s": 30.0, **settings}).bind(workload)


def run(program: Any, peers: int = 6) -> Run:
    network = Network(peers, links=LINKS, device=DEVICE)
    return simulate(program, network, seed=3, settings=EventSettings())


def test_the_model_follows_from_who_was_how_late() -> None:
    """Every version by hand: x <- x + rate / 3 * sum of (local - x_begun) * (late + 1) ** -0.5."""
    bound = program(steps=2, server_lr=0.8)
    found = run(bound)
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)
    models, centres, most = [bound.initial], bound.workload.task.centres, 0
    for row in found.series("applied"):
        labels = dict(row.labels)
        moved = torch.zeros(3, dtype=torch.float64)
        for work, late in zip(
            labels["works"].split(), map(int, labels["late"].split()), strict=True
        ):
            begun, centre = models[len(models) - 1 - late], centres[int(work.split(".")[1])]
            local = centre + (begun - centre) * (1 - 0.1) ** 2
            moved += (local - begun) * (late + 1) ** -0.5 / 3
            most = max(most, late)
        models.append(models[-1] + 0.8 * moved)
    assert len(models) == 21
    assert most > 0
    torch.testing.assert_close(found.final[0], models[-1])


def test_late_updates_are_dropped_beyond_the_bound() -> None:
    found = run(program(buffer=1, max_staleness=3))
    late = [int(n) for row in found.series("applied") for n in dict(row.labels)["late"].split()]
    assert max(late) <= 3
    assert next(row.value for row in found.rows if row.name == "works_stale") > 0
    assert [rule(found) for rule in INVARIANTS] == [None] * len(INVARIANTS)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"buffer": 0}, "size=0"),
        ({"server_lr": 0.0}, "lr=0.0"),
        ({"server_momentum": 1.0}, "momentum=1.0"),
        ({"exponent": -0.5}, "exponent=-0.5"),
        ({"max_staleness": -1}, "bound=-1"),
        ({"steps": 0}, "0 to 0"),
        ({"steps": 3, "most_steps": 2}, "3 to 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"step_s": -1.0}, "step_s=-1.0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        FedBuff(**settings)


def test_the_ladder() -> None:
    found = check_program(program(versions=8), Network(6, links=LINKS, device=DEVICE), seed=3)
    assert found.finished


def test_fault_lists_find_nothing() -> None:
    found = explore(
        lambda: program(versions=8), Network(6, links=LINKS, device=DEVICE), seeds=18,
        horizon_s=3000.0, invariants=INVARIANTS,
    )  # fmt: skip
    assert [failure.problem for failure in found.failures] == []
    assert found.traces >= 15
