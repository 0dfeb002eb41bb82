"""Label flipping: honest training on wrong labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor.keyed import grid
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class LabelFlip:
    """Each Byzantine peer trains on labels c - 1 - y of c classes and sends the result.

    The task must be a classification task with an attribute `classes`; labels are whole numbers
    0..c-1. With an odd number of classes the middle one stays. Source: Tolpegin et al. 2020; the
    mirrored form is that of Farhadkhani et al. 2023 (arXiv 2209.10931), section 6.

    >>> from shoal.tensor.keyed import key_of
    >>> own = torch.ones(1, 2)
    >>> LabelFlip()(View(honest=own, own=own, round=0), key_of(0))
    tensor([[1., 1.]])
    """

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, view: View, key: Key) -> Stack:
        return view.own

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        classes = getattr(task, "classes", None)
        if classes is None:
            raise UsageError(
                f"label_flip: {type(task).__name__} has no `classes`; need a classification task"
            )
        labels = _labels(task, shard, key)
        if labels.is_floating_point():
            raise UsageError(f"label_flip: labels are {labels.dtype}; need whole numbers 0..c-1")
        return replace(shard, labels=classes - 1 - labels)


def _labels(task: Task, shard: Shard, key: Key) -> torch.Tensor:
    if shard.labels is not None:
        return shard.labels
    # A task hands out targets in batches only, in an order of its own. One shard per sample, each
    # with a batch of one, brings them in the order of the index.
    most = shard.index.shape[-1]
    single = Shard(index=shard.index.unsqueeze(-1), size=torch.ones_like(shard.index))
    keys = grid(key.expand(shard.index.shape[:-1]), most)
    return task.batch(single, keys, 1).y.squeeze(shard.index.dim())
