"""Algebra of masked stacks: absent rows do not matter, and numbers agree with plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.tensor import distances, ordered, stack

NAN, INF = float("nan"), float("inf")


def drawn(data: st.DataObject, lead: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor]:
    """A stack [2, k, dim] in which some rows are absent or hold something that is no number."""
    count, dim = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(*lead, count, dim, generator=generator)
    mask = torch.rand(*lead, count, generator=generator) < 0.7
    for value in data.draw(st.lists(st.sampled_from([NAN, INF, -INF]), max_size=3)):
        place = data.draw(st.integers(0, x.numel() - 1))
        x.view(-1)[place] = value
    return x, mask


@given(st.data())
def test_usable_rows_are_present_and_finite(data: st.DataObject) -> None:
    x, mask = drawn(data)
    clean, rows = stack.usable(x, mask)
    for place in itertools.product(*map(range, mask.shape)):
        good = bool(mask[place]) and all(map(torch.isfinite, x[place]))
        assert bool(rows[place]) == good
        assert torch.equal(clean[place], x[place] if good else torch.zeros_like(x[place]))


@given(st.data())
def test_what_absent_rows_hold_changes_nothing(data: st.DataObject) -> None:
    x, mask = drawn(data)
    other = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 1e30))
    weight = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for version in (x, other):
        clean, rows = stack.usable(version, mask)
        square = distances.squared_distances(clean, rows)
        results.append(
            [
                stack.masked_mean(clean, rows, weight),
                ordered.ordered_mean(clean, rows, weight),
                stack.first_usable(clean, rows),
                distances.distances_to(clean, rows, clean[..., 0, :]).nan_to_num(-1.0),
                square.nan_to_num(-1.0),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(st.data())
def test_means_agree_with_loops(data: st.DataObject) -> None:
    x, mask = drawn(data)
    clean, rows = stack.usable(x, mask)
    weight = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1))
    mean, first = stack.masked_mean(clean, rows, weight), stack.first_usable(clean, rows)
    shares = stack.shares(rows, weight)
    for lead in range(x.shape[0]):
        here = [i for i in range(x.shape[1]) if rows[lead, i]]
        if not here:
            assert mean[lead].tolist() == first[lead].tolist() == [0.0] * x.shape[-1]
            assert shares[lead].sum() == 0.0
            continue
        total = sum(weight[lead, i] for i in here)
        expected = sum(weight[lead, i] * x[lead, i] for i in here) / total
        torch.testing.assert_close(mean[lead], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(first[lead], x[lead, here[0]])
        assert shares[lead].sum().item() == pytest.approx(1.0, abs=1e-12)


def test_a_weight_that_is_no_weight_counts_as_none() -> None:
    mask = torch.ones(5, dtype=torch.bool)
    shares = stack.shares(mask, torch.tensor([1.0, -3.0, NAN, INF, 3.0]))
    assert shares.tolist() == [0.25, 0.0, 0.0, 0.0, 0.75]
    huge = torch.full((2,), 1.7e308, dtype=torch.float64)
    assert stack.shares(mask[:2], huge).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("count", [1, 2, 5, 13, 128, 129, 150])
def test_an_ordered_mean_weighs_places_of_sorted_columns(count: int) -> None:
    """On both sides of the bound where sorting takes over from the network."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    rows = torch.rand(2, count, generator=generator) < 0.8
    rows[:, 0] = True
    clean = torch.where(rows.unsqueeze(-1), x, 0.0)
    # Places up to the number of rows that count.
    place = torch.arange(count) < rows.sum(-1, keepdim=True)
    weight = torch.rand(2, count, generator=generator, dtype=torch.float64) * place
    found = ordered.ordered_mean(clean, rows, weight)
    for lead in range(2):
        column = x[lead][rows[lead]].sort(0).values
        share = weight[lead][: len(column)]
        expected = (share.unsqueeze(-1) * column).sum(0) / share.sum()
        torch.testing.assert_close(found[lead], expected)


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts_every_sequence_of_zeros_and_ones(count: int) -> None:
    """Which by the 0-1 principle (Knuth, volume 3, theorem 5.3.4Z) means every sequence."""
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=count))).mT
    row = list(every.clone().unbind(0))
    ordered._sort_rows(row)
    assert torch.equal(torch.stack(row), every.sort(0).values)


@given(st.data())
def test_distances_agree_with_float64_loops(data: st.DataObject) -> None:
    x, mask = drawn(data)
    x = x + 1000.0
    clean, rows = stack.usable(x, mask)
    point = clean[:, 0] + 0.5
    to_point = distances.distances_to(clean, rows, point)
    square = distances.squared_distances(clean, rows)
    exact = clean.double()
    for lead, i, j in itertools.product(range(2), *[range(x.shape[1])] * 2):
        if not (rows[lead, i] and rows[lead, j]):
            assert square[lead, i, j].isnan()
            continue
        expected = (exact[lead, i] - exact[lead, j]).square().sum()
        torch.testing.assert_close(square[lead, i, j], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            to_point[lead, i], (exact[lead, i] - point[lead].double()).norm(), rtol=1e-9, atol=1e-9
        )


def test_one_huge_row_does_not_blur_the_distances_of_the_others() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [1.0, 2e-3], [1e38, 1e38]])
    rows = torch.ones(4, dtype=torch.bool)
    square = distances.squared_distances(x, rows)
    expected = (x[:3].double().unsqueeze(0) - x[:3].double().unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(square[:3, :3], expected, rtol=1e-9, atol=0.0)
    assert (square[3, :3] > 1e75).all()
    assert distances.majority_row(x, rows)[0] == 1.0


def test_the_nearest_are_taken_by_distance_then_by_index_and_never_absent() -> None:
    distance = torch.tensor([[3.0, 1.0, 1.0, NAN, INF], [NAN, NAN, 0.0, NAN, NAN]])
    assert stack.nearest(distance, 2).tolist() == [
        [False, True, True, False, False],
        [False, False, True, False, False],
    ]
    keep = torch.tensor([4, 0])
    assert stack.nearest(distance, keep).sum(-1).tolist() == [4, 0]
    assert not stack.nearest(distance, keep)[0, 3]


def test_a_center_stands_in_where_nothing_counts() -> None:
    value, some = torch.ones(2, 3), torch.tensor([True, False])
    assert stack.or_center(value, some, None).tolist() == [[1.0] * 3, [0.0] * 3]
    assert stack.or_center(value, some, torch.full((3,), 7.0)).tolist() == [[1.0] * 3, [7.0] * 3]


def test_stacks_without_coordinates_or_rows_are_fine() -> None:
    assert stack.finite_rows(torch.zeros(2, 3, 0)).all()
    empty = torch.zeros(2, 0, 4)
    clean, rows = stack.usable(empty, torch.zeros(2, 0, dtype=torch.bool))
    assert stack.masked_mean(clean, rows).tolist() == [[0.0] * 4] * 2
    assert distances.squared_distances(clean, rows).shape == (2, 0, 0)
    assert not stack.certain(torch.ones(1, dtype=torch.bool, device="meta"))
