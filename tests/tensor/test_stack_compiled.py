"""Compiled loops over large stacks give what torch gives on small ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.parts import find
from shoal.tensor import distances, ordered, stack
from shoal.testing.aggregate import check_aggregator

LEADS = [((), ()), ((2,), (2,)), ((1,), (3,)), ((2, 1), (2, 3))]
"""Leading axes of the rows' numbers, and of which rows count."""


def both(monkeypatch: pytest.MonkeyPatch, function, *args):
    """By torch, and by compiled loops."""
    found = []
    for least in (1 << 60, 0):
        monkeypatch.setattr(stack, "_LEAST", least)
        found.append(function(*args))
    return found


def drawn(lead: tuple, here: tuple, count: int, dim: int, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.rand(*here, count, generator=generator) < 0.8
    return x, rows, generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lead", "here"), LEADS)
@pytest.mark.parametrize(("count", "dim"), [(1, 5), (6, 300), (13, 129), (50, 128)])
def test_ordered_means_are_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, dtype, lead: tuple, here: tuple, count: int, dim: int
) -> None:
    x, rows, generator = drawn(lead, here, count, dim, dtype, 3)
    for weight in (
        ordered.middle_places(rows), ordered.trimmed_places(rows, 2),
        torch.rand(rows.shape, generator=generator),
    ):  # fmt: skip
        plain, fast = both(monkeypatch, ordered.ordered_mean, x, rows, weight)
        assert torch.equal(plain, fast)
    strided = x.mT.contiguous().mT
    plain, fast = both(
        monkeypatch, ordered.ordered_mean, strided, rows, ordered.middle_places(rows)
    )
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("here", [(), (2,), (2, 3)])
def test_distances_are_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype, offset: float, here: tuple
) -> None:
    x, rows, _ = drawn(here, here, 7, 600, dtype, 5)
    x = x + offset
    plain, fast = both(monkeypatch, distances.squared_distances, x, rows)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=0.0, equal_nan=True)
    point = x.mean(-2)
    inner = both(monkeypatch, distances.inner_products, x, rows, point)
    exact = (x - point.unsqueeze(-2)).double().square().sum(-1)
    for found in inner:
        norm = found.diagonal(dim1=-2, dim2=-1)
        square = norm[..., :-1] - 2 * found[..., -1, :-1] + norm[..., -1:]
        some = rows & rows.any(-1, keepdim=True)
        torch.testing.assert_close(square[some], exact[some], rtol=1e-5, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(0, 2), st.sampled_from([1e10, 1e30]), st.booleans())
def test_rows_far_away_cost_the_others_no_digits(
    seed: int, bad: int, size: float, together: bool
) -> None:
    """Also where the first row, which is tried as the pivot, is one of them."""
    x, _, generator = drawn((), (), 7, 40, torch.float32, seed)
    x = 1.0 + 1e-3 * x
    order = torch.randperm(7, generator=generator)
    liars = order[:bad]
    x[liars] = size if together else size * torch.randn(bad, 40, generator=generator)
    if bad:
        x[0] = size
    good = [i for i in range(7) if float(x[i].abs().max()) < 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "_LEAST", 0)
        square = distances.squared_distances(x, torch.ones(7, dtype=torch.bool))
    exact = (x[:, None].double() - x.double()).square().sum(-1)
    torch.testing.assert_close(square[good][:, good], exact[good][:, good], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("step", [6, 8, 9])
def test_a_ladder_of_rows_hides_the_others_from_no_pivot(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """From each far row the next one is as near as the rounding, and all below it are one."""
    x, _, _ = drawn((), (), 13, 40, torch.float32, 1)
    x[:6] = (10.0 ** (38 - step * torch.arange(6.0, dtype=torch.float64))).float().unsqueeze(-1)
    square = both(monkeypatch, distances.squared_distances, x, torch.ones(13, dtype=torch.bool))
    exact = (x[6:, None].double() - x[6:].double()).square().sum(-1)
    for found in square:
        torch.testing.assert_close(found[6:, 6:], exact, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("size", [1e160, 1e300])
def test_rows_whose_squares_overflow_are_infinitely_far(
    monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    x = torch.arange(50.0, dtype=torch.float64).reshape(5, 10).sin()
    x[0] = size
    plain, fast = both(monkeypatch, distances.squared_distances, x, torch.ones(5, dtype=torch.bool))
    assert plain[0, 1:].isinf().all()
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    "name",
    ["median", "trimmed_mean", "krum", "geometric_median", "nnm", "nna", "bulyan", "mda", "caf"],
)
def test_the_contract_holds_for_rules_on_compiled_loops(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(stack, "_LEAST", 0)
    kind = find("aggregate", name)
    check_aggregator(kind(**kind.examples[0]), trials=2)


def test_which_stacks_are_large() -> None:
    def large(x: Tensor) -> bool:
        return stack.large(x)

    assert not large(torch.zeros(8, 1000))
    assert large(torch.zeros(8, 20_000))
    # A stack counts by itself, so that it is treated alike wherever it stands.
    assert not large(torch.zeros(100, 8, 1000))
    assert not large(torch.zeros(8, 20_000, dtype=torch.float16))
    assert not large(torch.zeros(200, 20_000))
    assert not large(torch.zeros(8, 20_000, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("here", [(), (2, 3)])
def test_distances_to_a_point_and_means_of_groups_are_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype, here: tuple
) -> None:
    x, rows, generator = drawn(here, here, 9, 3000, dtype, 7)
    point = torch.randn(*here, 3000, generator=generator).to(dtype)
    plain, fast = both(monkeypatch, distances.distances_to, x, rows, point)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=0.0, equal_nan=True)
    group = torch.randint(-1, 5, rows.shape, generator=generator)
    plain, fast = both(monkeypatch, stack.grouped_means, x, group, 6)
    assert torch.equal(plain[1], fast[1])
    assert not fast[1][..., 5].any()
    torch.testing.assert_close(fast[0], plain[0])
    assert not fast[0][..., 5, :].any()
