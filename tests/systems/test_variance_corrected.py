"""Gossip learning with corrected variances: the rule's invariants, and engines that agree."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal
from shoal.base.errors import UsageError
from shoal.lab.launch import launch, method_of
from shoal.parts.aggregate.variance_corrected import (
    VarianceCorrected,
    variance_corrected_average,
)
from shoal.systems.training.variance_corrected import GossipLearning, spread
from shoal.tensor.flat import FlatSpec
from shoal.testing.ladder import check_strategy

TINY = shoal.Scenario(
    peers=6, rounds=3, topology={"name": "random_peers", "degree": 3}, initial="independent",
    task={"name": "digits", "hidden": [8, 8], "initialise": "xavier", "train_samples": 120},
    exchange={"name": "gossip", "own_weight": 0.5}, links={"name": "links", "latency_s": 0.02},
    device={"name": "device", "flops_per_s": 1e8},
)  # fmt: skip


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 12), st.floats(0.1, 3.0), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_strangers_average_to_an_nth_of_the_variance_and_are_corrected(
    count: int, deviation: float, seed: int
) -> None:
    x = deviation * drawn(seed, count, 100_000)
    rule = VarianceCorrected().bind(FlatSpec(("w",), ((100_000,),)))
    merged = rule(x, mask=torch.ones(count, dtype=torch.bool))
    assert float(x.mean(0).var()) == pytest.approx(deviation**2 / count, rel=0.02)
    assert float(merged.var()) == pytest.approx(deviation**2, rel=0.01)
    assert float(merged.mean()) == pytest.approx(float(x.mean()), abs=1e-6 * deviation)


@given(st.sampled_from(["conservative", "self", "others"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_models_that_agree_are_a_fixed_point_and_order_does_not_matter(
    target: str, seed: int
) -> None:
    model = {"w": drawn(seed, 7, 5), "b": torch.zeros(5).double(), "one": drawn(seed + 1, 1)}
    same = variance_corrected_average([model] * 3, model, target=target)  # type: ignore[arg-type]
    for name, value in model.items():
        torch.testing.assert_close(same[name], value)
    others = [{name: v + drawn(i, *v.shape) for name, v in model.items()} for i in range(4)]
    shuffled = random.Random(seed).sample(others, 4)
    first = variance_corrected_average(others, model, 0.3, target)  # type: ignore[arg-type]
    again = variance_corrected_average(shuffled, model, 0.3, target)  # type: ignore[arg-type]
    for name in model:
        torch.testing.assert_close(first[name], again[name])


@given(st.floats(0.0, 1.0), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_targets_are_what_they_say(own: float, count: int, seed: int) -> None:
    model = {"w": drawn(seed, 50)}
    others = [{"w": (i + 2) * drawn(seed + 7 + i, 50)} for i in range(count)]
    received = sum(float(o["w"].var()) for o in others) / count
    mine = float(model["w"].var())
    goals = {"self": mine, "others": received, "conservative": own * mine + (1 - own) * received}
    for target, goal in goals.items():
        if target == "others" and own == 1.0:
            continue  # Nothing of theirs is in it.
        merged = variance_corrected_average(others, model, own, target)  # type: ignore[arg-type]
        assert float(merged["w"].var()) == pytest.approx(goal, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_a_tensor_without_variance_stays_as_averaged(value: float) -> None:
    flat = {"w": torch.full((4,), value)}
    merged = variance_corrected_average([flat, flat], flat)
    assert torch.equal(merged["w"], flat["w"])


@pytest.mark.parametrize(
    ("models", "own", "weight", "named"),
    [
        ([], None, 0.5, "no models"),
        ([{"a": torch.ones(2)}], {"a": torch.ones(3)}, 0.5, "'a' has shapes"),
        ([{"a": torch.ones(2)}], {"b": torch.ones(2)}, 0.5, "is not in every model"),
        ([{"a": torch.tensor([1.0, float("nan")])}], None, 0.5, "'a' is not finite"),
        ([{"a": torch.ones(2)}], None, 1.5, "self_weight=1.5"),
    ],
)
def test_wrong_input_is_named(models, own, weight, named) -> None:
    with pytest.raises(ValueError, match=named):
        variance_corrected_average(models, own, weight)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="target='mean'"):
        VarianceCorrected("mean")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="bind it first"):
        VarianceCorrected()(torch.ones(2, 3), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(UsageError, match="steps=-1"):
        GossipLearning(steps=-1)
    with pytest.raises(UsageError, match="combines what its peers hear by itself"):
        method_of(GossipLearning(), TINY.with_settings({"aggregator": "median"}), 0)


@pytest.mark.parametrize("target", ["conservative", "none"])
def test_every_engine_does_the_same(target: str) -> None:
    strategy = GossipLearning(target=target, batch_size=4)
    method, network, *_ = method_of(strategy, TINY, 3, least_s=5.0)
    check_strategy(method, network, live=target == "conservative")


def test_strangers_differ_and_start_where_the_report_says() -> None:
    method, *_ = method_of(GossipLearning(), TINY, 3)
    starts = torch.stack([method.start(p) for p in range(6)])
    assert torch.unique(starts, dim=0).shape[0] == 6
    xavier = torch.tensor([2 / (64 + 8), 2 / (8 + 8), 2 / (8 + 10)])
    assert torch.allclose(spread(starts, method.task.spec).mean(0), xavier, rtol=0.3)


def test_plain_averages_lose_variance_as_theory_says() -> None:
    """A merge of k strangers with weight c for oneself leaves c^2 + (1 - c)^2 / k."""
    world = TINY.with_settings(
        {"peers": 8, "rounds": 1, "topology.degree": 6, "task.hidden": [64, 64]}
    )
    run = launch(GossipLearning(steps=0, target="none"), world, seed=1)
    found = [row.value for row in run.series("variance_ratio")]
    assert sum(found) / len(found) == pytest.approx(0.25 + 0.25 / 6, rel=0.05)


def test_it_runs_as_an_aggregator_of_any_strategy() -> None:
    world = TINY.with_settings({"aggregator": "variance_corrected"})
    from shoal.parts.strategy.local_steps import LocalSteps

    method, network, *_ = method_of(LocalSteps(batch_size=4), world, 3)
    check_strategy(method, network)
