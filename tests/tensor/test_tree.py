"""Trees of tensors, and stacks that are no copies."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import tree

Pair = namedtuple("Pair", ("left", "right"))


@dataclass(frozen=True)
class State:
    params: Tensor
    other: Any = None


@dataclass(frozen=True)
class Setting:
    rate: float


tensors = st.integers(0, 99).map(lambda n: torch.tensor([float(n), 1.0]))
trees = st.recursive(
    tensors | st.none() | st.integers(0, 3) | st.just("text") | st.builds(Setting, st.just(0.5)),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.builds(State, tensors, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, State):
        return same(a.params, b.params) and same(a.other, b.other)
    return a == b


@given(trees)
def test_unflatten_is_the_inverse_of_flatten(value: Any) -> None:
    leaves, structure = tree.flatten(value)
    assert same(tree.unflatten(structure, leaves), value)
    assert hash(structure) == hash(tree.flatten(value)[1])
    with pytest.raises(UsageError, match="more tensors"):
        tree.unflatten(structure, [*leaves, torch.zeros(1)])


@given(trees, st.integers(1, 3))
def test_rows_are_the_inverse_of_stack(value: Any, count: int) -> None:
    parts = [
        tree.map_tree(lambda leaf, n=number: leaf + n, value)  # type: ignore[misc]
        for number in range(count)
    ]
    stacked = tree.stack(parts)
    for number, row in enumerate(tree.rows(stacked, count)):
        assert same(row, parts[number])
        assert same(tree.select(stacked, number), parts[number])


def test_a_constant_belongs_to_the_structure() -> None:
    one, other = State(torch.zeros(1), 3), State(torch.zeros(1), 4)
    assert tree.flatten(one)[1] != tree.flatten(other)[1]
    with pytest.raises(UsageError, match="one structure"):
        tree.stack([one, other])
    with pytest.raises(UsageError, match="neither a tensor"):
        tree.flatten([torch.zeros(1)])


@given(trees, st.integers(1, 4), st.data())
def test_flatten_all_is_flatten_of_each(value: Any, count: int, data: st.DataObject) -> None:
    parts = [
        tree.map_tree(lambda leaf, n=number: leaf + n, value)  # type: ignore[misc]
        for number in range(count)
    ]
    found = tree.flatten_all(parts)
    assert found is not None
    columns, structure = found
    assert structure == tree.flatten(value)[1]
    for number, part in enumerate(parts):
        assert same(tree.unflatten(structure, [column[number] for column in columns]), part)
    other = data.draw(trees)
    if tree.flatten(other)[1] != structure:
        assert tree.flatten_all([*parts, other]) is None


def test_flatten_all_tells_shapes_and_types_apart() -> None:
    for other in (torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1)):
        assert tree.flatten_all([(torch.zeros(2),), (other,)]) is None


def test_one_tensor_in_two_places_is_one_in_every_row() -> None:
    whole = base()
    for row in tree.rows((State(whole, (whole, None)), whole), 5):
        state, again = row
        assert state.params is again
        assert state.other[0] is again


@dataclass(frozen=True, kw_only=True)
class Named:
    one: Tensor
    two: Any


def test_rows_of_dataclasses_that_take_names_only() -> None:
    found = tree.rows(Named(one=base(), two=base() + 1), 5)
    assert all(torch.equal(row.two, row.one + 1) for row in found)


def test_where_chooses_row_by_row() -> None:
    yes, no = State(torch.ones(3, 2), torch.ones(3)), State(torch.zeros(3, 2), torch.zeros(3))
    merged = tree.where(torch.tensor([True, False, True]), yes, no)
    assert merged.params.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert merged.other.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(UsageError, match="one structure"):
        tree.where(torch.tensor([True]), yes, (torch.ones(3, 2),))


def base(peers: int = 5, dim: int = 4) -> Tensor:
    # A clone, for views lead back to the tensor that owns the numbers.
    return torch.arange(float(peers * dim)).reshape(peers, dim).clone()


def column(kind: str) -> list[Tensor]:
    """Tensors of one shape [4] of which `stack` knows, or does not know, where they come from."""
    one = base()
    rows = list(one.unbind(0))
    if kind == "same object":
        return [rows[2]] * 3
    if kind == "all rows in order":
        return rows
    if kind == "some rows in order":
        return rows[1:4]
    if kind == "permuted":
        return [rows[i] for i in (3, 0, 4, 1)]
    if kind == "repeated":
        return [rows[i] for i in (1, 1, 3)]
    if kind == "backwards":
        return rows[::-1]
    if kind == "different bases":
        return [rows[0], base()[1], rows[2]]
    if kind == "own tensors":
        return [row.clone() for row in rows]
    if kind == "columns of a square":
        return list(base(4, 4).unbind(1))
    if kind == "a column among rows":
        square = base(4, 4)
        return [square[0], square[:, 1], square[2]]
    if kind == "the first column among rows":
        square = base(4, 4)
        return [square[1], square[:, 0], square[3]]
    if kind == "rows of a sliced view":
        return list(base(5, 8)[:, 2:6].unbind(0))
    if kind == "slices that are no rows":
        flat = base(1, 20)[0]
        return [flat[2:6], flat[9:13]]
    if kind == "every other row":
        return rows[::2]
    if kind == "rows of a transpose":
        return list(base(4, 6).mT.unbind(0))
    if kind == "rows of an expanded row":
        return list(torch.arange(4.0).expand(3, 4).unbind(0))
    if kind == "a base in itself":
        square = base(4, 4)
        return [square[0], square[1], base(1, 4)[0]]
    if kind == "shifted rows":
        # As long as a row, but across two of them.
        wide = base(5, 4)
        return [wide[1], wide.view(-1)[2:6]]
    if kind == "read as other numbers":
        return [rows[0].view(torch.int32), rows[1].view(torch.int32)]
    if kind == "conjugates":
        return [row.conj() for row in torch.complex(base(), base() + 1).unbind(0)]
    if kind == "single":
        return [rows[3]]
    raise AssertionError(kind)


KINDS = (
    "same object", "all rows in order", "some rows in order", "permuted", "repeated", "backwards",
    "different bases", "own tensors", "columns of a square", "a column among rows",
    "the first column among rows",
    "rows of a sliced view", "slices that are no rows", "every other row", "rows of a transpose",
    "rows of an expanded row", "a base in itself", "shifted rows", "single",
    "read as other numbers", "conjugates",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_what_torch_stacks(kind: str) -> None:
    parts = column(kind)
    found = tree.stack(parts)
    assert found.shape == (len(parts), *parts[0].shape)
    assert found.dtype == parts[0].dtype
    assert torch.equal(found, torch.stack(parts))


@given(st.data())
def test_any_views_of_any_base_stack_as_in_torch(data: st.DataObject) -> None:
    """Bases with an offset and a stride of their own, and views of views."""
    whole = torch.arange(7.0 * 6).reshape(7, 6).clone()
    start, step = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
    left = data.draw(st.integers(0, 2))
    part = data.draw(
        st.sampled_from([whole, whole[start::step], whole[:, left : left + 3], whole.clone()[1:]])
    )
    picks = data.draw(st.lists(st.integers(0, part.shape[0] - 1), min_size=1, max_size=6))
    parts = [part[i] for i in picks]
    assert torch.equal(tree.stack(parts), torch.stack(parts))


@pytest.mark.parametrize("kind", ["same object", "all rows in order", "some rows in order"])
def test_what_lies_in_one_tensor_already_is_not_copied(kind: str) -> None:
    parts = column(kind)
    stacked = tree.stack(parts)
    assert stacked.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()


@given(st.data())
def test_columns_of_one_tensor_are_gathered_side_by_side(data: st.DataObject) -> None:
    count, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    whole, other = base(6, 3), base(4, 2)
    pick = st.lists(st.integers(0, 5), min_size=count, max_size=count)
    columns = [[whole[i] for i in data.draw(pick)] for _ in range(width)]
    alien = [other[i % 4] for i in data.draw(pick)]
    columns.insert(data.draw(st.integers(0, width)), alien)
    for column, found in zip(columns, tree.stack_columns(columns), strict=True):
        assert torch.equal(found, torch.stack(column))


def test_a_stack_of_gathered_columns_is_no_copy() -> None:
    whole = base(5, 3)
    rows = whole.unbind(0)
    columns = [[rows[i] for i in order] for order in ((0, 1, 2), (4, 0, 1), (2, 2, 3))]
    gathered = tree.stack_columns(columns)
    together = tree.stack_tensors(gathered)
    assert together.untyped_storage().data_ptr() == gathered[0].untyped_storage().data_ptr()
    assert torch.equal(together, torch.stack([torch.stack(column) for column in columns]))


def test_rows_with_a_gradient_stack() -> None:
    whole = base().requires_grad_()
    stacked = tree.stack([whole[1], whole[0]])
    stacked.sum().backward()
    assert whole.grad is not None


def test_rows_and_a_piece_of_a_row_do_not_stack() -> None:
    one, other = base()[:2].clone().unbind(0)
    with pytest.raises(RuntimeError):
        tree.stack([one, other[:2]])


def test_rows_of_empty_and_of_higher_tensors_stack() -> None:
    for shape in ((3, 0), (3, 2, 0), (4, 2, 3)):
        parts = list(torch.rand(shape).unbind(0))
        assert torch.equal(tree.stack(parts), torch.stack(parts))
