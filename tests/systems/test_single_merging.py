"""A single merging: what merging is, that looking changes nothing, quadratics, engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shoal
from shoal.base.errors import UsageError
from shoal.lab.launch import launch
from shoal.parts.exchange.scheduled import Scheduled
from shoal.systems.training.single_merging import (
    SYSTEM,
    merge,
    mergeability,
    recalibrate,
    single_merging,
)

TINY = shoal.Scenario(
    peers=6, rounds=4, links={"name": "links", "latency_s": 0.02},
    exchange={"name": "scheduled", "schedule": "merge", "rate": 0.5},
    task={"name": "digits", "split": "dirichlet", "hidden": [8], "train_samples": 120},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@given(st.integers(2, 9), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=30)
def test_with_equal_hessians_the_mean_follows_gradient_descent(
    peers: int, share: float, seed: int
) -> None:
    """f_i(x) = (x - c_i)' H (x - c_i) / 2: the merged model is that of the mean of the losses."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(3, 3, generator=g, dtype=torch.float64)
    hessian = root @ root.T / 3 + 0.1 * torch.eye(3, dtype=torch.float64)
    centers = torch.randn(peers, 3, generator=g, dtype=torch.float64)
    x = torch.zeros(peers, 3, dtype=torch.float64)
    alone = torch.zeros(3, dtype=torch.float64)
    exchange = Scheduled(peers, 20, rate=share * (peers - 1))
    for round in range(20):
        x = x - 0.05 * (x - centers) @ hessian
        alone = alone - 0.05 * (alone - centers.mean(0)) @ hessian
        (hop,) = exchange.hops(round, seed)
        assert hop.own is not None
        assert hop.weights is not None
        x = hop.own[:, None] * x + (hop.weights[..., None] * x[hop.sources.clamp_min(0)]).sum(1)
        torch.testing.assert_close(x.mean(0), alone, rtol=1e-9, atol=1e-12)


def test_until_the_last_round_a_merge_is_sparse_gossip() -> None:
    arms = {
        name: launch(
            single_merging(steps=2), TINY.with_settings({"exchange.schedule": name}), seed=1
        )
        for name in ("merge", "fixed")
    }
    for metric in ("accuracy", "consensus", "mean_model_accuracy"):
        for round in range(3):
            values = [
                [row.value for row in run.series(metric) if row.round == round]
                for run in arms.values()
            ]
            assert values[0] == values[1]
    # The mean model of sparse gossip is what merging gives.
    merged = [row.value for row in arms["merge"].series("accuracy") if row.round == 3]
    mean = arms["fixed"].series("mean_model_loss")[-1].value
    assert arms["merge"].series("mean_model_loss")[-1].value == pytest.approx(mean, rel=1e-4)
    assert max(merged) - min(merged) < 0.02
    assert arms["merge"].series("consensus")[-1].value < 1e-9
    assert arms["fixed"].series("consensus")[-1].value > 1e-4


def test_looking_at_the_merged_model_changes_nobody() -> None:
    often, seldom = (
        launch(single_merging(steps=2), TINY.with_settings({"eval_every": n}), seed=1)
        for n in (1, 0)
    )
    assert often.state_digest == seldom.state_digest
    assert len(often.series("mean_model_accuracy")) > len(seldom.series("mean_model_accuracy"))


def test_engines_agree_and_count_the_same_messages() -> None:
    runs = [
        launch(single_merging(steps=2), TINY, seed=2, engine=engine)
        for engine in ("lockstep", "event")
    ]
    wanted = Scheduled(6, 4, 0.5, "merge").messages(seed=2)
    assert [run.messages_sent for run in runs] == [wanted, wanted]
    for peer in range(6):
        torch.testing.assert_close(runs[0].final[peer], runs[1].final[peer], rtol=1e-4, atol=1e-5)


def test_a_peer_that_is_down_at_the_merge_is_left_out() -> None:
    world = TINY.with_settings({"faults": [{"kind": "crash", "who": [2], "at": {"round": 2}}]})
    run = launch(single_merging(steps=2), world, seed=1)
    assert run.finished
    others = torch.stack([run.final[p] for p in range(6) if p != 2])
    # Its weight stays with each of the others, so they agree less than to the last bit.
    assert (others - others.mean(0)).norm() < (others[0] - run.final[2]).norm()


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def test_merge_is_the_weighted_mean_and_leaves_counters() -> None:
    modules = [normalised() for _ in range(3)]
    for i, module in enumerate(modules):
        for tensor in module.state_dict().values():
            tensor.add_(i) if tensor.is_floating_point() else tensor.fill_(7 + i)
    states = [module.state_dict() for module in modules]
    merged = merge(states, [1, 2, 1])
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, states[0][name] + 1)
        else:
            assert torch.equal(tensor, states[0][name])
    assert states[0]["1.num_batches_tracked"] == 7


def test_recalibration_gives_the_statistics_of_the_data() -> None:
    module = normalised().eval()
    module.load_state_dict({k: v + 5 if v.is_floating_point() else v
                            for k, v in module.state_dict().items()})  # fmt: skip
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    before = {k: v.clone() for k, v in module.named_parameters()}
    recalibrate(module, x.split(16))
    inside = module[0](x)
    torch.testing.assert_close(module[1].running_mean, inside.mean(0))
    assert not module.training
    assert module[1].momentum == 0.1
    assert all(torch.equal(before[k], v) for k, v in module.named_parameters())


@pytest.mark.parametrize(
    ("states", "weights", "match"),
    [
        ([], None, "0 states"),
        ([{"a": torch.ones(1)}], [1, 2], "weights"),
        ([{"a": torch.ones(1)}] * 2, [0, 0], "above 0"),
        ([{"a": torch.ones(1)}] * 2, [2, -1], "0 or more"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], None, "differ in"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], None, r"a is \(2,\) in state 1"),
    ],
)
def test_states_that_cannot_be_merged(states: list, weights: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        merge(states, weights)


def test_mergeability_of_a_bowl_and_of_a_ridge() -> None:
    states = [{"a": torch.tensor([v])} for v in (-1.0, 1.0)]

    def bowl(state: dict[str, Tensor]) -> float:
        return -float(state["a"].square())

    assert mergeability(states, bowl) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert mergeability(states, lambda state: -bowl(dict(state))) == pytest.approx(-1.0)


def test_arms_share_all_but_the_schedule() -> None:
    for name in ("single", "sparse", "late", "early", "server", "one shot"):
        arm = SYSTEM.arms[name]
        assert dict(arm.set) == {"steps": 10}
        assert set(arm.scenario) == {"exchange"}
