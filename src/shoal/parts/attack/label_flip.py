"""Label flipping: honest training on wrong labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from shoal.parts.attack._own_data import classes_of, labels_of
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class LabelFlip:
    """Each Byzantine peer trains on labels c - 1 - y of c classes and sends the result.

    The task must be a classification task with an attribute `classes`; labels are whole numbers
    0..c-1. With an odd number of classes the middle one stays. Source: Tolpegin et al. 2020; the
    mirrored form is that of Farhadkhani et al. 2023 (arXiv 2209.10931), section 6.

    >>> import torch
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
        classes = classes_of("label_flip", task)
        labels = labels_of("label_flip", task, shard, key)
        return replace(shard, labels=classes - 1 - labels)
