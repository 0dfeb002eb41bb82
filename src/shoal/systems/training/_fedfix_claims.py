"""How FedFix's claims are measured: worlds of clients of known speeds, numbers from their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from shoal.lab.build import build
from shoal.lab.chart import Points
from shoal.lab.faults import FaultSetting
from shoal.lab.rows import Rows
from shoal.lab.scenario import Scenario
from shoal.rounds.task import Task
from shoal.tensor import keyed
from shoal.world.record import Row

SETTINGS = ("clean_02", "clean_10", "clean_50", "noisy_02", "noisy_10", "noisy_50")
"""With and without wrong labels, and hundredths of the learning rate."""


def clients_of(scenario: Scenario) -> Scenario:
    """All data are with the clients; peer 0 is the server and has none."""
    return scenario.with_settings({"task.holders": tuple(range(1, scenario.peers))})


def slowed(scenario: Scenario, factors: dict[int, float]) -> Scenario:
    """Each of these clients takes so many times as long for everything that it computes."""
    faults = tuple(
        FaultSetting("slow", who=(client,), settings={"factor": factor})
        for client, factor in sorted(factors.items())
    )
    return replace(scenario, faults=(*scenario.faults, *faults))


def fastest_by_80(scenario: Scenario) -> Scenario:
    """F-80: times from 1 down to 0.2 in even steps, in the order of the clients' main labels."""
    world = clients_of(scenario)
    task = build(replace(world, measures=())).task
    order = sorted(range(1, world.peers), key=lambda client: (_main_label(task, client), client))
    step = 0.8 / max(1, len(order) - 1)
    return slowed(world, {client: 1.0 - rank * step for rank, client in enumerate(order)})


def equally_fast(scenario: Scenario) -> Scenario:
    """F-0: everybody takes the same time."""
    return clients_of(scenario)


def _main_label(task: Task, client: int) -> int:
    shard = task.shard(client)
    key = keyed.key_of(0, "labels", device=shard.size.device)
    labels = torch.cat([batch.y[batch.mask] for batch in task.epoch(shard, key, 4096)])
    return int(labels.flatten().bincount().argmax())


# Measures: Rows -> one number per seed.


def _losses(rows: Rows, arm: str, seed: int) -> list[Row]:
    return rows.series(arm, seed, "federated_loss")


def _final(rows: Rows, arm: str, seed: int) -> float:
    found = _losses(rows, arm, seed)
    return found[-1].value if found else math.nan


def _time_over_fedavg(rows: Rows, arm: str, calm: str, seed: int) -> float:
    """When an arm has the loss that federated averaging has at half time, over that time."""
    reference = _losses(rows, calm, seed)
    if not reference:
        return math.nan
    half_s = reference[-1].time_s / 2
    known = next(row for row in reference if row.time_s >= half_s - 1e-6)
    for row in _losses(rows, arm, seed):
        if row.value <= known.value:
            return row.time_s / known.time_s
    return 2.0 if _losses(rows, arm, seed) else math.nan


def upward(rows: Rows, arm: str, seed: int) -> float:
    """The sum of all rises of the loss: 0 when it only falls."""
    found = _losses(rows, arm, seed)
    if not found:
        return math.nan
    return math.fsum(max(0.0, b.value - a.value) for a, b in itertools.pairwise(found))


def _each(rows: Rows, number: Callable[[int], float]) -> dict[int, float]:
    return {seed: number(seed) for seed in rows.seeds}


def bias_is_real(rows: Rows) -> dict[int, float]:
    """Loss with the same weight for all over that with unbiased weights, without wrong labels."""
    return _each(
        rows, lambda s: _final(rows, "same_clean_02", s) / _final(rows, "async_clean_02", s)
    )


def async_is_fast(rows: Rows) -> dict[int, float]:
    """Time to the loss of federated averaging at half time, as a share of that time."""
    return _each(rows, lambda s: _time_over_fedavg(rows, "async_clean_02", "fedavg_clean_02", s))


def fedfix_is_faster(rows: Rows) -> dict[int, float]:
    """The same for FedFix, the worst of all settings; 2 = never."""
    return _each(
        rows,
        lambda s: max(
            _time_over_fedavg(rows, f"fixed_{each}", f"fedavg_{each}", s) for each in SETTINGS
        ),
    )


def fedfix_is_steady(rows: Rows) -> dict[int, float]:
    """Rises of FedFix's loss over those of asynchronous averaging, with wrong labels."""
    return _each(
        rows, lambda s: upward(rows, "fixed_noisy_10", s) / upward(rows, "async_noisy_10", s)
    )


def fedfix_ends_lower(rows: Rows) -> dict[int, float]:
    """FedFix's last loss less that of federated averaging, with wrong labels."""
    return _each(
        rows, lambda s: _final(rows, "fixed_noisy_10", s) - _final(rows, "fedavg_noisy_10", s)
    )


def schemes_agree(rows: Rows) -> dict[int, float]:
    """Equal speeds and equal rates per second: the largest relative distance to FedAvg's loss."""

    def worst(seed: int) -> float:
        calm = _final(rows, "fedavg_equal", seed)
        return max(
            abs(_final(rows, arm, seed) / calm - 1.0)
            for arm in ("fixed_equal", "async_equal", "buffer_equal")
        )

    return _each(rows, worst)


def losses_over_time(rows: Rows) -> Points:
    """The federated loss of each scheme with wrong labels, rate 0.1, first seed."""
    lines = {}
    for arm in ("fedavg_noisy_10", "fixed_noisy_10", "fifth_noisy_10", "buffer_noisy_10",
                "async_noisy_10", "same_noisy_10"):  # fmt: skip
        found = _losses(rows, arm, rows.seeds[0])
        lines[arm] = [(row.time_s, min(row.value, 5.0)) for row in found]
    return {name: points for name, points in lines.items() if points}
