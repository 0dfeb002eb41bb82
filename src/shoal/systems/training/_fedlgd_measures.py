"""Besides models: how far apart clients' data are, and how many images there are."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from shoal.lab.rows import Rows
from shoal.parts.distillation.network import network_of
from shoal.parts.distillation.virtual_data import labels, members
from shoal.parts.tasks.digits_domains import DigitsDomains
from shoal.rounds.strategy import Heard, Step
from shoal.rounds.task import Batch, Task
from shoal.systems.training._fedlgd_strategy import FedLgd, State
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread

LGD: Mapping[str, Any] = {
    "ipc": 5, "server_ipc": 5, "lr": 0.15, "start_steps": 300, "update_steps": 60,
    "match_steps": 100, "match_lr": 0.1,
}  # fmt: skip
"""FedLGD's settings in the comparison."""


def played(
    strategy: FedLgd, task: Task, rounds: int, seed: int, hub: int = 0
) -> tuple[State, State]:
    """All clients' states, stacked, and the hub's after some rounds of a star where nothing fails.

    Engines keep models alone; this keeps the images, too. A test holds it to an engine's models.
    """
    peers = torch.arange(task.peers)
    shard = task.shard(peers)
    initial = task.init(keyed.key_of(seed, "init"))
    clients, center = strategy.init(initial.expand(task.peers, -1)), strategy.init(initial[None])
    active = torch.ones(task.peers, dtype=torch.bool)
    for round in range(rounds):
        key = keyed.fold(keyed.key_of(seed, "peer"), peers, "round", round)
        given = {n: t.expand(task.peers, *t.shape[1:]) for n, t in strategy.down(center).items()}
        step = Step(round, task, shard, key, active, given=given)
        received = strategy.params(center).expand(task.peers, -1)
        clients, parcel = strategy.local(strategy.adopt(clients, received, step), step)
        heard = Heard(
            parcel.vector.mean(0, keepdim=True),
            torch.tensor([task.peers]),
            {name: value.mean(0, keepdim=True) for name, value in parcel.extra.items()},
        )
        one = slice(hub, hub + 1)
        own = replace(step, shard=task.shard(peers[one]), key=key[one], active=active[one])
        center = strategy.apply(center, heard, own)
    return clients, center


def distance(means: Tensor, there: Tensor) -> float:
    """Mean distance between two clients' mean features of a class, over pairs and classes.

    means [clients, classes, width], there bool [clients, classes]: the maximum mean discrepancy
    with a linear kernel.
    """
    first, second = torch.triu_indices(len(means), len(means), 1)
    apart = (means[first] - means[second]).norm(dim=-1)
    both = there[first] & there[second]
    return float(apart[both].mean())


def heterogeneity(scenario: str, strategy: FedLgd, seed: int) -> tuple[float, float]:
    """Distance between clients' virtual images over that between their real ones: after one
    distillation with random networks, and after FedLGD. Features of FedLGD's last model."""
    world: dict[str, Any] = json.loads(scenario)
    task_settings = {k: v for k, v in world["task"].items() if k != "name"}
    task = DigitsDomains(peers=world["peers"], seed=seed, **task_settings)
    with one_thread():
        clients, center = played(strategy, task, world["rounds"], seed)
        once, _ = played(replace(strategy, server_ipc=0, lam=0.0), task, 1, seed)
    network, params = network_of(task), strategy.params(center)[0]
    shard = task.shard(torch.arange(task.peers))
    real: Batch = next(iter(task.epoch(shard, keyed.key_of(seed, "all"), 1 << 30)))

    def apart(x: Tensor, y: Tensor, mask: Tensor) -> float:
        own, there = members(y, mask, strategy.classes, x.dtype)
        features = vmap(lambda images: network.features(params, images))(x)
        return distance(own @ features, there)

    base = apart(real.x, real.y, real.mask)
    targets = labels(strategy.classes, strategy.ipc, params.device).expand(task.peers, -1)
    found = [
        apart(state.own, targets, state.have.repeat_interleave(strategy.ipc, -1))
        for state in (once, clients)
    ]
    return found[0] / base, found[1] / base


def all_images(rows: Rows) -> dict[int, float]:
    """Virtual images of all clients and the hub over all real ones, ipc = 5."""
    return _images(rows, everybody=True)


def client_images(rows: Rows) -> dict[int, float]:
    """Images that one client trains on, the hub's included, over its real ones."""
    return _images(rows, everybody=False)


def _images(rows: Rows, everybody: bool) -> dict[int, float]:
    out = {}
    for seed in rows.seeds:
        world = rows.scenarios.get(("fedlgd", seed))
        if world is None:
            out[seed] = math.nan
            continue
        settings = {k: v for k, v in world.to_json()["task"].items() if k != "name"}
        task, strategy = DigitsDomains(peers=world.peers, seed=seed, **settings), FedLgd(**LGD)
        clients = task.peers if everybody else 1
        virtual = strategy.classes * (clients * strategy.ipc + strategy.server_ipc)
        real = int(task.shard(torch.arange(task.peers)).size.sum())
        out[seed] = virtual / (real if everybody else real / task.peers)
    return out


def distilled_once(rows: Rows) -> dict[int, float]:
    """How far apart clients' images are after one distillation, over real ones."""
    return {seed: once for seed, (once, _) in _ratios(rows).items()}


def distilled_globally(rows: Rows) -> dict[int, float]:
    """FedLGD's ratio minus that of one distillation."""
    return {seed: last - once for seed, (once, last) in _ratios(rows).items()}


def _ratios(rows: Rows) -> dict[int, tuple[float, float]]:
    """`heterogeneity` of each seed; not a number where FedLGD has no run."""
    found = dict.fromkeys(rows.seeds, (math.nan, math.nan))
    worlds = {
        seed: json.dumps(world.to_json())
        for seed in rows.seeds
        if (world := rows.scenarios.get(("fedlgd", seed))) and rows.run("fedlgd", seed)
    }
    return found | dict(zip(worlds, _all(tuple(worlds.items())), strict=True))


@lru_cache(maxsize=2)
def _all(worlds: tuple[tuple[int, str], ...]) -> list[tuple[float, float]]:
    """Some 20 s for a seed, so each has a process; two claims ask for the same."""
    if len(worlds) < 2:
        return [_one(world) for world in worlds]
    workers = min(len(worlds), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_one, worlds))


def _one(world: tuple[int, str]) -> tuple[float, float]:
    seed, scenario = world
    return heterogeneity(scenario, FedLgd(**LGD), seed)
