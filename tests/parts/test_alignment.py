"""Orders of hidden units: functions that stay, permutations that are found, wrong inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal.base.errors import UsageError
from shoal.parts.alignment.matching import (
    activation_orders,
    assignment,
    correlations,
    weight_orders,
)
from shoal.parts.alignment.units import Units
from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.tensor.flat import FlatSpec

NETWORKS: dict[str, Any] = {
    "mlp": lambda: (MLP(hidden=(12, 9)).build((7,), 4), (7,)),
    "flattened": lambda: (MLP(hidden=(10,)).build((1, 4, 4), 3), (1, 4, 4)),
    "cnn": lambda: (CNN(channels=(4, 6), hidden=8).build((1, 8, 8), 5), (1, 8, 8)),
    "normed": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.GroupNorm(1, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5),
            nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3),
        ),
        (2, 6, 6),
    ),
}  # fmt: skip


def made(name: str, seed: int = 0) -> tuple[Units, torch.Tensor, torch.Tensor]:
    """(units, parameters, inputs) of a network with normal weights."""
    module, features = NETWORKS[name]()
    units = Units.of(module, FlatSpec.of(module), features)
    generator = torch.Generator().manual_seed(seed)
    params = torch.randn(units.spec.dim, generator=generator) * 0.5
    return units, params, torch.randn(64, *features, generator=generator)


def output(units: Units, params: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    named = units.spec.views(params)
    with torch.no_grad():
        return torch.func.functional_call(units.module, named, (inputs,))


def shuffled(units: Units, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(layer.units, generator=generator) for layer in units.layers]


@pytest.mark.parametrize("name", NETWORKS)
@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_new_order_of_units_leaves_the_function_as_it_was(name: str, seed: int) -> None:
    units, params, inputs = made(name, seed)
    moved = units.permuted(params, shuffled(units, seed))
    assert not torch.equal(moved, params)
    torch.testing.assert_close(
        output(units, moved, inputs), output(units, params, inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", NETWORKS)
@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_a_planted_order_is_found_by_activations_and_by_weights(name: str, seed: int) -> None:
    units, params, inputs = made(name, seed)
    moved = units.permuted(params, shuffled(units, seed + 1))
    (orders,), matched = activation_orders(units, params, moved.unsqueeze(0), inputs)
    torch.testing.assert_close(units.permuted(moved, orders), params)
    alive = [bool((values[0].std(-1) > 0).all())
             for values in units.values(params.unsqueeze(0), inputs)]  # fmt: skip
    if all(alive):
        assert float(matched[0]) == pytest.approx(1.0, abs=1e-6)
    # Without data the search may end in a local optimum, but never in no permutation.
    for order, layer in zip(weight_orders(units, params, moved), units.layers, strict=True):
        assert sorted(order.tolist()) == list(range(layer.units))


def test_weights_find_a_planted_order_of_a_wide_network() -> None:
    module = MLP(hidden=(64, 64)).build((32,), 10)
    units = Units.of(module, FlatSpec.of(module), (32,))
    params = torch.randn(units.spec.dim, generator=torch.Generator().manual_seed(3))
    moved = units.permuted(params, shuffled(units, 4))
    torch.testing.assert_close(units.permuted(moved, weight_orders(units, params, moved)), params)


def test_units_that_never_speak_are_told_apart_by_their_weights() -> None:
    module = MLP(hidden=(6,)).build((4,), 2)
    units = Units.of(module, FlatSpec.of(module), (4,))
    params = torch.randn(units.spec.dim, generator=torch.Generator().manual_seed(1))
    units.spec.views(params)["0.bias"][2:5] = -100.0
    inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    moved = units.permuted(params, shuffled(units, 5))
    (orders,), _ = activation_orders(units, params, moved.unsqueeze(0), inputs)
    torch.testing.assert_close(units.permuted(moved, orders), params)


@given(st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_assignments_are_permutations_of_the_largest_sum(count: int, seed: int) -> None:
    score = torch.rand(count, count, generator=torch.Generator().manual_seed(seed))
    order = assignment(score)
    assert sorted(order.tolist()) == list(range(count))
    assert assignment(torch.eye(count)).tolist() == list(range(count))
    best = float(score.gather(1, order.unsqueeze(-1)).sum())
    for shift in range(count):
        other = (torch.arange(count) + shift) % count
        assert float(score.gather(1, other.unsqueeze(-1)).sum()) <= best + 1e-6


def test_correlations_are_numpys() -> None:
    import numpy as np

    a = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).double()
    b = torch.randn(4, 20, generator=torch.Generator().manual_seed(2)).double()
    expected = np.corrcoef(a.numpy(), b.numpy())[:3, 3:]
    torch.testing.assert_close(correlations(a, b), torch.from_numpy(expected))
    a[1] = 0.1
    assert correlations(a, b)[1].tolist() == [0.0] * 4


def test_what_cannot_be_traced_is_named() -> None:
    for module, features, named in (
        (nn.Linear(3, 2), (3,), "only an nn.Sequential"),
        (nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1)), (3,), "layer 1 is a Softmax"),
        (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)), (2, 5, 5), "groups=2"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), (1, 5, 5), "groups of units"),
    ):
        with pytest.raises(UsageError, match=named):
            Units.of(module, FlatSpec.of(module), features)


def test_no_inputs_and_broken_models_are_refused() -> None:
    units, params, inputs = made("mlp")
    with pytest.raises(UsageError, match="no inputs"):
        activation_orders(units, params, params.unsqueeze(0), inputs[:0])
    with pytest.raises(UsageError, match="not finite"):
        activation_orders(units, params, torch.full_like(params, float("nan"))[None], inputs)
