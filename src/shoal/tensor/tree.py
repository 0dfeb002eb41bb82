"""Trees of tensors: a tensor, None, or a dataclass, tuple or dict of trees.

Anything else in a tree is a constant; it must be hashable, and equal in trees that are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError

Tree = Any
Structure = Hashable
"""What is left of a tree when its tensors are taken out; equal structures can be stacked."""
Column = list[Tensor] | tuple[Tensor, ...]
"""The tensors of one place in many trees."""


def flatten(tree: Tree) -> tuple[list[Tensor], Structure]:
    """The tensors of a tree in a fixed order, and its structure."""
    leaves: list[Tensor] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Tree, leaves: list[Tensor]) -> Structure:
    # Engines flatten every call of every peer, so the common kinds come first, by exact type.
    kind = tree.__class__
    if kind is Tensor:
        leaves.append(tree)
        return Tensor
    if tree is None:
        return None
    if kind is tuple:
        return (tuple, tuple([_flatten(part, leaves) for part in tree]))
    names = _fields(kind)
    if names:
        start = len(leaves)
        parts = tuple([_flatten(getattr(tree, name), leaves) for name in names])
        if len(leaves) > start or not _hashable(tree):
            return (kind, parts)
        return ("constant", tree)
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return Tensor
    if isinstance(tree, tuple):
        return (kind, tuple([_flatten(part, leaves) for part in tree]))
    if isinstance(tree, dict):
        keys = tuple(sorted(tree))
        return (dict, keys, tuple([_flatten(tree[key], leaves) for key in keys]))
    if not _hashable(tree):
        raise UsageError(
            f"tree: {kind.__name__} is neither a tensor, dataclass, tuple or dict nor "
            "hashable (put its numbers into tensors)"
        )
    return ("constant", tree)


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


_names: dict[type, tuple[str, ...]] = {}


def _fields(kind: type) -> tuple[str, ...]:
    """The fields that make a dataclass; () for any other type."""
    names = _names.get(kind)
    if names is None:
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        names = _names[kind] = tuple([field.name for field in fields if field.init])
    return names


def _positional(kind: type) -> bool:
    """Whether `kind(*values)` takes the fields of a dataclass in their order."""
    return not any(field.kw_only for field in dataclasses.fields(kind) if field.init)


def unflatten(structure: Structure, leaves: Sequence[Tensor]) -> Tree:
    """Inverse of `flatten`."""
    source = iter(leaves)
    tree = _unflatten(structure, source)
    if next(source, None) is not None:
        raise UsageError("tree: more tensors than the structure has places")
    return tree


def _unflatten(structure: Any, source: Any) -> Tree:
    if structure is Tensor:
        return next(source)
    if structure is None:
        return None
    kind = structure[0]
    if kind == "constant":
        return structure[1]
    parts = [_unflatten(part, source) for part in structure[-1]]
    if kind is dict:
        return dict(zip(structure[1], parts, strict=True))
    if kind is tuple:
        return tuple(parts)
    if issubclass(kind, tuple):
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return kind(**dict(zip(_fields(kind), parts, strict=True)))


def flatten_all(trees: Sequence[Tree]) -> tuple[list[Column], Structure] | None:
    """`flatten` of many trees at once: the tensors of each place, in the order of the trees.

    None when the trees differ in structure or in a tensor's shape, dtype or device. Goes place by
    place, so that its loops over many trees are C's.
    """
    columns: list[Column] = []
    try:
        structure = _flatten_all(trees, columns)
    except _DifferError:
        return None
    return columns, structure


class _DifferError(Exception):
    pass


def _flatten_all(trees: Sequence[Tree], columns: list[Column]) -> Structure:
    first = trees[0]
    kind = first.__class__
    if len(set(map(type, trees))) > 1:
        raise _DifferError
    if first is None:
        return None
    if isinstance(first, Tensor):
        if not _one_shape(trees):
            raise _DifferError
        columns.append(list(trees))
        return Tensor
    if isinstance(first, tuple):
        if len(set(map(len, trees))) > 1:
            raise _DifferError
        return (kind, tuple([_flatten_all(part, columns) for part in zip(*trees, strict=True)]))
    if isinstance(first, dict):
        keys = tuple(sorted(first))
        if any(tree.keys() != first.keys() for tree in trees):
            raise _DifferError
        places = [list(map(itemgetter(key), trees)) for key in keys]
        return (dict, keys, tuple([_flatten_all(part, columns) for part in places]))
    names = _fields(kind)
    if names:
        start = len(columns)
        places = [list(map(attrgetter(name), trees)) for name in names]
        parts = tuple([_flatten_all(part, columns) for part in places])
        if len(columns) > start:
            return (kind, parts)
    # `_flatten` knows what may be a constant.
    structure = _flatten(first, [])
    if any(tree is not first and _flatten(tree, []) != structure for tree in trees):
        raise _DifferError
    return structure


def _one_shape(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for t in tensors:
        if t is not first and (t.shape != shape or t.dtype != dtype or t.device != device):
            return False
    return True


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The tree with `function` applied to each tensor."""
    leaves, structure = flatten(tree)
    return unflatten(structure, [function(leaf) for leaf in leaves])


def there(tree: Tree, device: torch.device) -> Tree:
    """A tree of the processor's tensors on a device, without waiting for the copies.

    Nothing happens where that is the processor itself.
    """
    if device.type == "cpu":
        return tree
    return map_tree(lambda leaf: leaf.to(device, non_blocking=True), tree)


def merge_trees(function: Callable[[list[Tensor]], Tensor], trees: Sequence[Tree]) -> Tree:
    """Equal trees as one: `function` gets the tensors of one place, in the order of the trees."""
    flat = [flatten(tree) for tree in trees]
    structure = flat[0][1]
    if any(other != structure for _, other in flat[1:]):
        raise UsageError("tree: only trees of one structure can be merged")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return unflatten(structure, [function(list(column)) for column in columns])


def stack(trees: Sequence[Tree]) -> Tree:
    """Equal trees as one, with a new leading axis; not always a copy, so do not write into it."""
    return merge_trees(stack_tensors, trees)


def stack_tensors(column: Column) -> Tensor:
    """`torch.stack`, without a copy of what is one tensor, or the rows of one, already."""
    return stack_columns([column])[0]


def stack_columns(columns: Sequence[Column]) -> list[Tensor]:
    """`stack_tensors` of each column, of equally many tensors each.

    Rows of one tensor that several columns hold in orders of their own are gathered at once and
    lie side by side, so that a stack of the results need not copy them again.
    """
    stacked: list[Tensor] = []
    gathers: dict[int, tuple[Tensor, dict[tuple[int, ...], list[int]]]] = {}
    for place, column in enumerate(columns):
        first = column[0]
        if all(leaf is first for leaf in column):
            stacked.append(first.expand(len(column), *first.shape))
            continue
        rows = _rows_of(first._base, column)
        if rows is None:
            stacked.append(torch.stack(column))
            continue
        stacked.append(first)
        _, orders = gathers.setdefault(id(first._base), (first._base, {}))
        orders.setdefault(rows, []).append(place)
    for base, orders in gathers.values():
        if all(rows == tuple(range(rows[0], rows[0] + len(rows))) for rows in orders):
            parts = [base[rows[0] : rows[0] + len(rows)] for rows in orders]
        else:
            index = torch.tensor(list(orders), device="cpu").to(base.device, non_blocking=True)
            parts = _gathered(base, index)
        for part, places in zip(parts, orders.values(), strict=True):
            for place in places:
                stacked[place] = part
    return stacked


def _gathered(base: Tensor, index: Tensor) -> Sequence[Tensor]:
    """base[index], split along the first axis of index [columns, rows]."""
    made = base.new_empty(*index.shape, *base.shape[1:])
    torch.index_select(base, 0, index.reshape(-1), out=made.view(-1, *base.shape[1:]))
    return made.unbind()


def _rows_of(base: Tensor | None, column: Column) -> tuple[int, ...] | None:
    """Which rows of `base` the tensors are; None when one is not."""
    first = column[0]
    shape, strides, dtype = first.shape, first.stride(), first.dtype
    if (
        base is None
        or not first.numel()
        or base.shape[1:] != shape
        or base.stride()[1:] != strides
        # A view may read the same memory as other numbers.
        or base.dtype != dtype
        or base.is_complex()
        or base.requires_grad
    ):
        return None
    step, start = base.stride(0), base.storage_offset()
    places = []
    for leaf in column:
        if (
            leaf._base is not base
            or leaf.stride() != strides
            or leaf.shape != shape
            or leaf.dtype != dtype
        ):
            return None
        places.append(leaf.storage_offset() - start)
    if step <= 0 or any(place % step for place in places):
        return None
    return tuple([place // step for place in places])


def rows(tree: Tree, count: int) -> list[Tree]:
    """Inverse of `stack`: one tree per leading index, as views."""
    leaves, structure = flatten(tree)
    # What is one tensor in two places of the tree stays one in every row.
    views = {id(leaf): leaf for leaf in leaves}
    columns = {name: leaf.unbind(0) for name, leaf in views.items()}
    return list(_rows(structure, iter([columns[id(leaf)] for leaf in leaves]), count))


def _rows(structure: Any, columns: Iterator[Column], count: int) -> Iterable[Tree]:
    """`_unflatten` of all rows at once, place by place."""
    if structure is Tensor:
        return next(columns)
    if structure is None:
        return [None] * count
    kind = structure[0]
    if kind == "constant":
        return [structure[1]] * count
    parts = [_rows(part, columns, count) for part in structure[-1]]
    made = zip(*parts, strict=True) if parts else iter([()] * count)
    if kind is dict:
        return [dict(zip(structure[1], row, strict=True)) for row in made]
    if kind is tuple:
        return made
    if issubclass(kind, tuple):
        return [kind(*row) for row in made] if hasattr(kind, "_fields") else made
    if _positional(kind):
        return map(kind, *parts)
    return [kind(**dict(zip(_fields(kind), row, strict=True))) for row in made]


def select(tree: Tree, index: Tensor | slice | int) -> Tree:
    """Index the leading axis of every tensor."""
    return map_tree(lambda leaf: leaf[index], tree)


def where(mask: Tensor, yes: Tree, no: Tree) -> Tree:
    """Row by row one tree or the other; mask bool [...], leaves [..., *]."""
    left, structure = flatten(yes)
    right, other = flatten(no)
    if structure != other:
        raise UsageError("tree: only trees of one structure can be merged")
    merged = [
        torch.where(mask.reshape(mask.shape + (1,) * (a.dim() - mask.dim())), a, b)
        for a, b in zip(left, right, strict=True)
    ]
    return unflatten(structure, merged)
