"""Decentralized diffusion: isolated islands, one expert as plain training, lost and late ones."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.lab.cell import cell_of, execute
from shoal.lab.launch import launch
from shoal.parts import find
from shoal.rounds.workload import Workload
from shoal.systems.training._decentralized_node import Checkpoint, Taken, Training, learn
from shoal.systems.training.decentralized_diffusion import (
    INVARIANTS,
    SYSTEM,
    Bound,
    DecentralizedDiffusion,
)
from shoal.tensor import keyed
from shoal.testing.ladder import check_program
from shoal.wire.codec import size_of
from shoal.wire.message import Packed
from shoal.world.device import Device
from shoal.world.faults import Crash, Fault, Loss, Round, Slow
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

TINY = DecentralizedDiffusion(
    steps=4, batch_size=16, samples=20, sample_steps=3, router_hidden=(8,), retry_s=2.0,
    patience_s=20.0,
)  # fmt: skip
DEVICE = Device(flops_per_s=1e5, spread=0.3, seed=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def workload(peers: int, rounds: int = 4, **parts: Any) -> Workload:
    settings = {"hidden": (8,), "train_samples": 160, "split": "clusters", **parts.pop("task", {})}
    task = find("tasks", "flow_gaussians")(peers=peers, **settings)
    transform = parts.get("transform", find("transform", "identity")()).bind(task.spec)
    return Workload(task, find("aggregate", "mean")(), transform, rounds, None, seed=3)


def run(
    settings: DecentralizedDiffusion = TINY, peers: int = 4, rounds: int = 4,
    faults: tuple[Fault, ...] = (), batching: str = "lazy", **parts: Any,
) -> Run:  # fmt: skip
    program = settings.bind(workload(peers, rounds, **parts))
    network = Network(peers, links=Links(latency_s=0.05), device=DEVICE, faults=faults)
    engine = EventSettings(batching=batching)
    found = simulate(program, network, seed=3, settings=engine)
    assert found.finished
    assert all(rule(found) is None for rule in INVARIANTS)
    return found


def last(found: Run, name: str) -> float:
    return found.series(name)[-1].value


def test_only_finished_experts_are_sent() -> None:
    found = run()
    load = workload(4)
    payload, _ = load.transform.encode(load.initial, None, torch.tensor(0))
    assert found.messages_sent == 2 * 3
    assert found.bytes_by_kind == {
        "Checkpoint": 3 * size_of(Checkpoint(Packed(payload))),
        "Taken": 3 * size_of(Taken(True)),
    }  # fmt: skip
    assert last(found, "experts") == 4
    # Peer 0 records what the ensemble is worth once, after everybody has trained.
    assert [row.peer for row in found.series("velocity_error_full")] == [0]
    assert sorted(row.peer for row in found.series("expert_flops")) == [0, 1, 2, 3]


def test_climbs_the_ladder() -> None:
    network = Network(3, links=Links(latency_s=0.05), device=DEVICE)
    check_program(TINY.bind(workload(3)), network, seed=3)


def test_an_island_ends_as_it_would_alone() -> None:
    """Whatever the others do, an expert is a function of its own data, key and start."""
    load = workload(4)
    found = run(faults=(Slow(who=(1,), factor=5.0), Crash(who=(3,), at=Round(1))))
    bound = TINY.bind(load)
    start = load.start(2)
    state = (start, bound.expert.optimizer.init(start), start)
    for round in range(4):
        key = keyed.key_of(3, "peer", 2, "expert", round)
        state = learn(*state, load.task.shard(2), key, load.task, bound.expert, round)
    torch.testing.assert_close(found.final[2], state[2])


def test_one_peer_is_plain_flow_matching() -> None:
    """Bit for bit what a loop of AdamW over all data gives."""
    load = workload(1)
    found = run(peers=1)
    assert found.messages_sent == 0
    adam = torch.optim.AdamW([params := load.initial.clone()], lr=TINY.lr, weight_decay=0.0)
    waves = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 16)
    for round in range(4):
        for i in range(4):
            key = keyed.fold(keyed.key_of(3, "peer", 0, "expert", round), i)
            params.grad = load.task.grad(params, load.task.batch(load.task.shard(0), key, 16))
            adam.step()
            waves.step()
    plain = run(replace(TINY, ema=0.0), peers=1)
    torch.testing.assert_close(plain.final[0], params, rtol=1e-4, atol=1e-6)
    values = {word: last(found, f"velocity_error_{word}") for word in TINY.rules}
    assert len(set(values.values())) == 1


def test_the_work_of_all_experts_is_that_of_one_model() -> None:
    work = {n: sum(row.value for row in run(peers=n).series("expert_flops")) for n in (1, 4)}
    assert work[4] == work[1]


def test_an_expert_that_is_lost_is_left_out() -> None:
    found = run(faults=(Crash(who=(3,), at=Round(2)),))
    assert last(found, "experts") == 3
    assert 3 not in {int(row.value) for row in found.series("taken")}
    assert last(found, "mode_error_full") <= 1.0
    # It is waited for as long as the settings say, and no longer.
    complete = last(found, "complete_s")
    assert TINY.patience_s <= found.virtual_s - complete <= 1.2 * TINY.patience_s + 5


@pytest.mark.parametrize("peer", [0, 2])
def test_an_island_that_restarts_goes_on_from_its_store(peer: int) -> None:
    calm = run(batching="off")
    faults = (Crash(who=(peer,), at=Round(2), until=200.0),)
    found = run(replace(TINY, tries=300, patience_s=500.0), faults=faults, batching="off")
    assert last(found, "experts") == 4
    for each in range(4):
        assert torch.equal(found.final[each], calm.final[each])
    assert last(found, "velocity_error_full") == last(calm, "velocity_error_full")


def test_messages_that_are_lost_are_sent_again_and_count_once() -> None:
    found = run(replace(TINY, tries=40, patience_s=90.0), faults=(Loss(probability=0.5),))
    assert last(found, "experts") == 4
    assert found.dropped["lost"] > 0
    assert found.messages_sent > 6


def test_compressed_experts_are_smaller_and_still_count() -> None:
    plain, small = run(), run(transform=find("transform", "quantise")())
    assert small.bytes_by_kind["Checkpoint"] < 0.5 * plain.bytes_by_kind["Checkpoint"]
    assert last(small, "experts") == 4


def test_the_running_mean_is_that_of_its_definition() -> None:
    load = workload(1)
    training = Training(TINY.bind(load).expert.optimizer, 5, 8, 0.9)
    start = load.initial
    state = (start, training.optimizer.init(start), start)
    wanted, params = start.clone(), (start, state[1])
    found = learn(*state, load.task.shard(0), keyed.key_of(1), load.task, training, 0)
    for i in range(5):
        batch = load.task.batch(load.task.shard(0), keyed.fold(keyed.key_of(1), i), 8)
        params = training.optimizer.step(params[0], load.task.grad(params[0], batch), params[1])
        decay = min(0.9, (2 + i) / (11 + i))
        wanted = decay * wanted + (1 - decay) * params[0]
    torch.testing.assert_close(found[0], params[0])
    torch.testing.assert_close(found[2], wanted)
    assert torch.equal(start, load.initial)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps=0"),
        ({"samples": 1}, "samples=1"),
        ({"rules": ()}, "rules=()"),
        ({"rules": ("best",)}, "rule best"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"patience_s": float("inf")}, "patience_s=inf"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match.replace("(", r"\(").replace(")", r"\)")):
        replace(TINY, **settings)


def test_worlds_that_cannot_work() -> None:
    digits = find("tasks", "digits")(peers=3, hidden=(4,))
    with pytest.raises(UsageError, match="Digits is no flow"):
        TINY.bind(replace(workload(3), task=digits))
    with pytest.raises(UsageError, match="no rounds"):
        TINY.bind(replace(workload(3), rounds=None))
    with pytest.raises(UsageError, match="batch_size=16 for 17 peers"):
        TINY.bind(workload(17))


def test_any_strategy_trains_experts_that_an_ensemble_can_use() -> None:
    """The task is one like others: isolated peers in lockstep, put together afterwards."""
    world = shoal.Scenario(
        peers=3,
        rounds=3,
        exchange="isolated",
        task={"name": "flow_gaussians", "hidden": [8], "train_samples": 90},
    )
    runs = {
        engine: launch(find("strategy", "local_steps")(steps=2), world, seed=1, engine=engine)
        for engine in ("lockstep", "event")
    }
    assert runs["lockstep"].messages_sent == 0
    task = find("tasks", "flow_gaussians")(peers=3, seed=1, hidden=(8,), train_samples=90)
    x, t = task.test_points()
    found = [
        task.ensemble([r.final[k] for k in range(3)], task.posterior).velocity(x, t)
        for r in runs.values()
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_arms_differ_in_what_they_say() -> None:
    world = shoal.lab.discover.scenario("training.flow_gaussians")  # type: ignore[attr-defined]
    tiny = {"steps": 1, "samples": 4, "sample_steps": 1}
    for name in ("monolith", "lost"):
        arm = SYSTEM.arms[name]
        cell = cell_of(
            name, replace(arm, set={**arm.set, **tiny}), 0, world, system=SYSTEM.name,
            overrides={"rounds": 7, "task.train_samples": 200, "task.hidden": [8]},
        )  # fmt: skip
        found = execute(cell, partial(launch))
        assert last(found, "experts") == {"monolith": 1, "lost": 7}[name]
    assert isinstance(TINY.bind(workload(2)), Bound)
