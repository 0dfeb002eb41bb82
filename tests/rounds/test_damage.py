"""Messages of rounds that are damaged on their way count as lost, in every strategy's hands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import shoal
from shoal.engine.event import EventSettings, simulate
from shoal.lab.cell import cell_of, make
from shoal.lab.launch import program_of
from shoal.wire.message import declared_kinds
from shoal.world.faults import Corrupt, Partition

WHO = (3,)


def ends(system: str, fault: Any) -> torch.Tensor:
    world = shoal.Scenario(
        peers=6, rounds=5, topology="ring",
        task={"name": "digits", "train_samples": 60, "hidden": [8]},
        links={"name": "links", "latency_s": 0.01},
    )  # fmt: skip
    what, scenario = make(cell_of(system, shoal.Arm(system), 1, world))  # type: ignore[misc]
    program, network = program_of(what, scenario, 1)
    network = replace(network, faults=(fault,))
    run = simulate(program, network, seed=1, settings=EventSettings(horizon_s=1e6))
    return torch.stack([run.final[peer] for peer in sorted(run.final)])


@pytest.mark.parametrize("system", ["dpsgd", "sgp", "fedavg"])
def test_damage_is_loss_bit_for_bit(system: str) -> None:
    """Whatever bit flips, in a number, a weight or a round: nobody averages it."""
    damaged = ends(system, Corrupt(who=WHO, probability=1.0))
    cut = ends(system, Partition(who=WHO, one_way=True))
    calm = ends(system, Corrupt(who=WHO, probability=0.0))
    assert torch.equal(damaged, cut)
    assert not torch.equal(damaged, calm)


def test_what_rounds_say_is_checked() -> None:
    ours = [kind for kind in declared_kinds() if kind.__module__ == "shoal.rounds.adapter"]
    assert [kind.__name__ for kind in ours] == ["Model", "Update"]
    assert all(kind.checked for kind in ours)
