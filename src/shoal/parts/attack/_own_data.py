"""What attacks on data share: a peer's samples and labels in the order of its shard."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor.keyed import grid
from shoal.tensor.types import Key


def need_class(part: str, name: str, value: object) -> None:
    """Refuse a setting that is no whole number of 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{part}: {name}={value!r}; need a whole number, 0 or more")


def classes_of(part: str, task: Task, *named: int) -> int:
    """How many classes the task has; UsageError if it has none, or fewer than those named need."""
    classes = getattr(task, "classes", None)
    if classes is None:
        raise UsageError(
            f"{part}: {type(task).__name__} has no `classes`; need a classification task"
        )
    for each in named:
        if each >= classes:
            raise UsageError(f"{part}: class {each}; the task has 0 to {classes - 1}")
    return classes


def labels_of(part: str, task: Task, shard: Shard, key: Key) -> Tensor:
    """Labels [..., most] in the order of the shard's index; whole numbers."""
    classes_of(part, task)
    labels = shard.labels if shard.labels is not None else _each(task, shard, key).y
    if labels.is_floating_point():
        raise UsageError(f"{part}: labels are {labels.dtype}; need whole numbers 0..c-1")
    return labels


def samples_of(task: Task, shard: Shard, key: Key) -> Tensor:
    """Samples [..., most, *features] in the order of the shard's index."""
    return shard.inputs if shard.inputs is not None else _each(task, shard, key).x


def _each(task: Task, shard: Shard, key: Key) -> Batch:
    # A task hands out samples in batches only, in an order of its own. One shard per sample, each
    # with a batch of one, brings them in the order of the index.
    most = shard.index.shape[-1]
    single = Shard(index=shard.index.unsqueeze(-1), size=torch.ones_like(shard.index))
    keys = grid(key.expand(shard.index.shape[:-1]), most)
    found = task.batch(single, keys, 1)
    place = shard.index.dim()
    return Batch(found.x.squeeze(place), found.y.squeeze(place), found.mask.squeeze(place))
