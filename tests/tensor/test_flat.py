"""FlatSpec: names and shapes of one vector."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.base.errors import UsageError
from shoal.tensor.flat import FlatSpec

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)
leads = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@given(shapes, leads)
def test_views_and_flatten_are_inverse(parts: list[tuple[int, ...]], lead: tuple[int, ...]) -> None:
    spec = FlatSpec(tuple(f"p{i}" for i in range(len(parts))), tuple(parts))
    assert spec.dim == sum(math.prod(shape) for shape in parts)
    flat = torch.arange(math.prod(lead) * spec.dim, dtype=torch.float32).reshape(*lead, spec.dim)
    views = spec.views(flat)
    assert {name: tuple(v.shape) for name, v in views.items()} == {
        f"p{i}": lead + shape for i, shape in enumerate(parts)
    }
    assert torch.equal(spec.flatten(views), flat)
    assert torch.equal(spec.flatten(dict(reversed(views.items()))), flat)


def test_views_share_memory_and_flatten_copies() -> None:
    spec = FlatSpec(("w", "b"), ((2, 3), (3,)))
    flat = torch.zeros(4, 9)
    views = spec.views(flat)
    views["b"][2] = 5.0
    assert flat[2, 6:].tolist() == [5.0] * 3
    assert views["w"].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    copy = spec.flatten(views)
    copy += 1.0
    assert flat[0].sum() == 0.0


def test_of_a_module_holds_trainable_parameters_in_order_and_tied_ones_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
            self.register_buffer("steps", torch.zeros(2))

    spec = FlatSpec.of(Tied())
    assert spec.names == ("first.weight", "first.bias", "second.bias")
    assert spec.dim == 9 + 3 + 3
    assert spec.offsets == (0, 9, 12)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="2 names for 1 shapes"):
        FlatSpec(("a", "b"), ((1,),))
    with pytest.raises(UsageError, match="names repeat"):
        FlatSpec(("a", "a"), ((1,), (1,)))
    spec = FlatSpec(("w", "b"), ((2, 3), (3,)))
    with pytest.raises(UsageError, match="no tensor named 'b'"):
        spec.flatten({"w": torch.zeros(2, 3)})
    with pytest.raises(UsageError, match=r"'w' has shape \(3, 2\); need \[..., 2, 3\]"):
        spec.flatten({"w": torch.zeros(3, 2), "b": torch.zeros(3)})
    with pytest.raises(UsageError, match="last axis is 8; the specification has 9"):
        spec.views(torch.zeros(2, 8))
