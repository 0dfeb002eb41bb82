"""Trees of tensors: a tensor, None, or a dataclass, tuple or dict of trees.

Anything else in a tree is a constant; it must be hashable, and equal in trees that are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError

Tree = Any
Structure = Hashable
"""What is left of a tree when its tensors are taken out; equal structures can be stacked."""


def flatten(tree: Tree) -> tuple[list[Tensor], Structure]:
    """The tensors of a tree in a fixed order, and its structure."""
    leaves: list[Tensor] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Tree, leaves: list[Tensor]) -> Structure:
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return Tensor
    if tree is None:
        return None
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = _fields(type(tree))
        if names:
            start = len(leaves)
            parts = tuple(_flatten(getattr(tree, name), leaves) for name in names)
            if len(leaves) > start or not _hashable(tree):
                return (type(tree), parts)
        return ("constant", tree)
    if isinstance(tree, tuple):
        parts = tuple(_flatten(part, leaves) for part in tree)
        return (type(tree), parts)
    if isinstance(tree, dict):
        names = tuple(sorted(tree))
        return (dict, names, tuple(_flatten(tree[name], leaves) for name in names))
    if not _hashable(tree):
        raise UsageError(
            f"tree: {type(tree).__name__} is neither a tensor, dataclass, tuple or dict nor "
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
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(field.name for field in dataclasses.fields(kind) if field.init)
    return names


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
    if kind is dict:
        return {
            name: _unflatten(part, source)
            for name, part in zip(structure[1], structure[2], strict=True)
        }
    parts = [_unflatten(part, source) for part in structure[1]]
    if issubclass(kind, tuple):
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return kind(**dict(zip(_fields(kind), parts, strict=True)))


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The tree with `function` applied to each tensor."""
    leaves, structure = flatten(tree)
    return unflatten(structure, [function(leaf) for leaf in leaves])


def merge_trees(function: Callable[[list[Tensor]], Tensor], trees: Sequence[Tree]) -> Tree:
    """Equal trees as one: `function` gets the tensors of one place, in the order of the trees."""
    flat = [flatten(tree) for tree in trees]
    structure = flat[0][1]
    if any(other != structure for _, other in flat[1:]):
        raise UsageError("tree: only trees of one structure can be merged")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return unflatten(structure, [function(list(column)) for column in columns])


def stack(trees: Sequence[Tree]) -> Tree:
    """Equal trees as one, with a new leading axis."""
    return merge_trees(torch.stack, trees)


def rows(tree: Tree, count: int) -> list[Tree]:
    """Inverse of `stack`: one tree per leading index, as views."""
    leaves, structure = flatten(tree)
    columns = [leaf.unbind(0) for leaf in leaves]
    return [unflatten(structure, [column[i] for column in columns]) for i in range(count)]


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
