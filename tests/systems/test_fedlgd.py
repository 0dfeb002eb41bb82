"""FedLGD: its own loop against the engines, what leaves a client, labels, ablated parts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.launch import launch
from shoal.parts.tasks.digits import Digits
from shoal.parts.tasks.digits_domains import DigitsDomains
from shoal.rounds.strategy import Step
from shoal.rounds.task import Shard
from shoal.systems.training._fedlgd_measures import distance, played
from shoal.systems.training._fedlgd_strategy import FedLgd, State
from shoal.tensor import keyed

SMALL = FedLgd(
    ipc=2, server_ipc=1, every=2, max_updates=2, start_steps=2, update_steps=2, match_steps=2,
    match_lr=0.1,
)  # fmt: skip
TASK = {"name": "digits_domains", "samples_per_peer": 40, "hidden": [12]}
TINY = shoal.Scenario(
    peers=3, rounds=5, eval_every=5, task=TASK, exchange={"name": "star"},
    links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e9},
)  # fmt: skip


@cache
def usual(rounds: int) -> tuple[State, State]:
    """The small setting's clients and hub after some rounds."""
    return played(SMALL, task_of(), rounds, 0)


def task_of(seed: int = 0) -> DigitsDomains:
    return DigitsDomains(peers=3, seed=seed, samples_per_peer=40, hidden=(12,))


def step_of(round: int, task: DigitsDomains | Digits, seed: int = 0) -> Step:
    peers = torch.arange(task.peers)
    key = keyed.fold(keyed.key_of(seed, "peer"), peers, "round", round)
    return Step(round, task, task.shard(peers), key, torch.ones(task.peers, dtype=torch.bool))


def begun(strategy: FedLgd, task: DigitsDomains):
    params = task.init(keyed.key_of(0, "init")).expand(task.peers, -1)
    return strategy.local(strategy.init(params), step_of(0, task))


@pytest.mark.parametrize("strategy", [SMALL, replace(SMALL, server_ipc=0, prox=0.1)])
def test_the_loop_that_keeps_images_is_the_run(strategy: FedLgd) -> None:
    run = launch(strategy, TINY, seed=3, engine="lockstep")
    _, center = played(strategy, task_of(3), 5, 3)
    torch.testing.assert_close(run.final[0], center.params[0], rtol=1e-4, atol=1e-5)


def test_only_models_and_statistics_leave_a_client() -> None:
    """Message audit: names, sizes, and bytes of all that is sent."""
    task = task_of()
    state, parcel = begun(SMALL, task)
    assert parcel.vector.shape == (3, task.spec.dim)
    shapes = {name: tuple(value.shape) for name, value in parcel.extra.items()}
    assert shapes == {"mean": (3, 10, 1), "deviation": (3, 10, 1), "there": (3, 10)}
    later = replace(SMALL, every=2).local(state, step_of(1, task))[1]
    assert dict(later.extra) == {}
    # Images that differ change what goes up through the model alone.
    other = replace(state, own=state.own + 1.0)
    moved = SMALL.local(other, step_of(1, task))[1]
    assert not torch.equal(moved.vector, later.vector)
    assert dict(moved.extra) == {}
    run = launch(SMALL, TINY, seed=1, engine="event")
    frames = run.bytes_by_kind["Update"]
    # Two clients send for five rounds, in two of which statistics of 30 numbers go along.
    plain = frames - 10 * 4 * task.spec.dim - 4 * 30 * 4
    assert 0 < plain < 10 * 400


def test_anchors_go_down_and_nothing_else_does() -> None:
    task = task_of()
    state = SMALL.init(task.init(keyed.key_of(0, "init")).expand(1, -1))
    assert {n: tuple(t.shape) for n, t in SMALL.down(state).items()} == {"images": (1, 10, 1, 8, 8)}
    assert replace(SMALL, server_ipc=0).down(state) == {}
    given = {"images": torch.ones(3, 10, 1, 8, 8)}
    clients, _ = begun(SMALL, task)
    step = replace(step_of(1, task), given=given)
    adopted = SMALL.adopt(clients, clients.params + 1.0, step)
    assert torch.equal(adopted.anchors, given["images"])
    assert torch.equal(adopted.own, clients.own)


def test_rounds_of_distillation() -> None:
    chosen = [r for r in range(100) if FedLgd(every=5, max_updates=10).selected(r)]
    assert chosen == list(range(0, 50, 5))
    first, _ = usual(1)
    clients, center = usual(2)
    again, later = usual(4)
    assert torch.equal(first.own, clients.own)
    assert not torch.equal(clients.own, again.own)
    assert not torch.equal(center.anchors, later.anchors)


def test_a_class_that_a_client_lacks_stays_out() -> None:
    task = task_of()
    shard = task.shard(torch.arange(3))
    kept = task.y[shard.index] != 7
    order = kept.to(torch.int64).argsort(dim=-1, descending=True, stable=True)
    without = Shard(shard.index.gather(1, order), kept.sum(-1))
    params = task.init(keyed.key_of(0, "init")).expand(3, -1)
    step = replace(step_of(0, task), shard=without)
    state, parcel = SMALL.local(SMALL.init(params), step)
    assert not state.have[:, 7].any()
    assert state.have[:, :7].all()
    assert not state.own.view(3, 10, -1)[:, 7].any()
    assert (parcel.extra["there"][:, 7] == 0).all()
    # Nothing teaches class 7: the head's row moves as with a set that was never there.
    nobody = replace(without, size=torch.zeros(3, dtype=torch.int64))
    idle, _ = SMALL.local(SMALL.init(params), replace(step, shard=nobody))
    assert torch.equal(idle.params, params)
    assert not idle.have.any()


def test_rows_are_what_they_are_alone() -> None:
    task = task_of()
    together, _ = begun(SMALL, task)
    params = task.init(keyed.key_of(0, "init"))
    step = step_of(0, task)
    single = replace(step, shard=task.shard(1), key=step.key[1], active=step.active[1])
    alone, parcel = SMALL.local(SMALL.init(params), single)
    assert parcel.vector.shape == params.shape
    torch.testing.assert_close(alone.own, together.own[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.params, together.params[1], rtol=1e-4, atol=1e-5)


def test_without_anchors_contrast_or_proximal_term_it_is_averaging() -> None:
    """Against plain SGD on the client's images with the task's own gradient."""
    task = task_of()
    plain = replace(SMALL, server_ipc=0, lam=0.0, max_updates=1, batch_size=1000, epochs=1)
    state, _ = begun(plain, task)
    after, _ = plain.local(state, step_of(1, task))
    targets = torch.arange(10).repeat_interleave(2).expand(3, -1)
    batch = shoal.rounds.task.Batch(state.own, targets, torch.ones(3, 20, dtype=torch.bool))
    expected = state.params - plain.lr * task.grad(state.params, batch)
    torch.testing.assert_close(after.params, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"anchors": "noise", "match_steps": 0}, {"psi": "random"}, {"start": "real"},
        {"augment": False}, {"lam": 0.0},
    ],
)  # fmt: skip
def test_options_change_what_is_learned(change: dict) -> None:
    _, plain = usual(4)
    _, other = played(replace(SMALL, **change), task_of(), 4, 0)
    assert other.params.isfinite().all()
    assert not torch.equal(plain.params, other.params)


def test_distance_between_clients_by_hand() -> None:
    means = torch.tensor([[[0.0], [1.0]], [[3.0], [1.0]], [[0.0], [9.0]]])
    there = torch.tensor([[True, True], [True, True], [True, False]])
    assert distance(means, there) == pytest.approx((3 + 0 + 3 + 0) / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ipc": 0}, "ipc=0; need at least 1"),
        ({"server_ipc": -1}, "server_ipc=-1"),
        ({"lr": 0.0}, "lr=0.0; need a finite number above 0"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"psi": "local"}, "psi='local'; need global or random"),
        ({"shape": (8, 8)}, r"shape=\(8, 8\); need \(channels"),
    ],
)
def test_errors_name_the_setting(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FedLgd(**change)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"images \(1, 8, 8\) of 10 classes.*shape=\(3, 8, 8\)"):
        begun(replace(SMALL, shape=(3, 8, 8)), task_of())
