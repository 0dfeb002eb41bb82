"""DIMAT: merging with itself, plain gossip as a special case, engines that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shoal
from shoal.base.errors import UsageError
from shoal.lab.launch import launch, method_of
from shoal.parts import find
from shoal.parts.strategy.local_steps import LocalSteps
from shoal.rounds.strategy import Step
from shoal.systems.training.dimat import MatchedMerging, barrier, units_of
from shoal.tensor import keyed
from shoal.testing.ladder import check_strategy

TINY = shoal.Scenario(
    peers=4, rounds=2, topology="ring", exchange="gossip", initial="independent",
    task={"name": "digits", "hidden": [12, 10], "train_samples": 120},
    links={"name": "links", "latency_s": 0.02}, device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def task(peers: int = 2) -> Any:
    return find("tasks", "digits")(peers=peers, hidden=(12, 10), train_samples=100)


def step_of(data: Any, peer: int = 0) -> Step:
    return Step(1, data, data.shard(peer), keyed.key_of(3), torch.tensor(True))


@pytest.mark.parametrize("match", ["activation", "weight"])
def test_merging_a_model_with_any_order_of_itself_returns_it(match: str) -> None:
    data = task()
    params = data.init(keyed.key_of(1))
    units = units_of(data)
    orders = [torch.randperm(layer.units, generator=torch.Generator().manual_seed(8))
              for layer in units.layers]  # fmt: skip
    twin = units.permuted(params, orders)
    strategy = MatchedMerging(match=match)
    heard = strategy.combine(
        strategy.init(params), torch.stack((params, twin)), torch.tensor([True, True]),
        torch.tensor([0.5, 0.5]).double(), {}, step_of(data),
    )  # fmt: skip
    probes = data.batch(data.shard(0), keyed.key_of(4), 64).x
    for made, own in zip(units.values(heard.vector[None], probes),
                         units.values(params[None], probes), strict=True):  # fmt: skip
        torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-5)
    assert barrier(data, params, twin) > 10 * barrier(data, params, heard.vector)


def test_without_matching_and_with_one_batch_it_is_dpsgd() -> None:
    merging = MatchedMerging(match="none", steps=1, batch_size=8, lr=0.1)
    plain = LocalSteps(lr=0.1, steps=1, batch_size=8)
    runs = [launch(strategy, TINY, seed=2) for strategy in (merging, plain)]
    for peer in range(4):
        torch.testing.assert_close(runs[0].final[peer], runs[1].final[peer])


def test_who_was_not_heard_has_no_part() -> None:
    data = task()
    params = data.init(keyed.grid(keyed.key_of(1), 3))
    strategy = MatchedMerging(match="none", watch=True)
    rows = params.clone()
    rows[2] = float("nan")
    heard = strategy.combine(
        strategy.init(params[0]), rows, torch.tensor([True, True, False]),
        torch.tensor([0.25, 0.75, 0.0]).double(), {}, step_of(data),
    )  # fmt: skip
    torch.testing.assert_close(heard.vector, 0.25 * params[0] + 0.75 * params[1])


@pytest.mark.parametrize("place", range(len(MatchedMerging.examples)))
def test_every_engine_does_the_same(place: int) -> None:
    strategy = MatchedMerging(**MatchedMerging.examples[place])
    method, network, *_ = method_of(strategy, TINY, 3, least_s=5.0)
    check_strategy(method, network, live=place == 0)


def test_seeds_stack() -> None:
    from shoal.lab.launch import launch_seeds

    strategy = MatchedMerging(batch_size=8, probes=32)
    both = launch_seeds(strategy, [TINY, TINY], [1, 2])
    alone = [launch(strategy, TINY, seed=seed) for seed in (1, 2)]
    for one, other in zip(both, alone, strict=True):
        for peer in range(4):
            torch.testing.assert_close(one.final[peer], other.final[peer])


@pytest.mark.parametrize(
    "bad", [{"match": "luck"}, {"probe": "public"}, {"optimizer": "lion"}, {"epochs": 0}]
)
def test_wrong_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="MatchedMerging"):
        MatchedMerging(**bad)


def test_a_task_without_a_module_is_refused() -> None:
    with pytest.raises(UsageError, match="has no module"):
        units_of(object())
