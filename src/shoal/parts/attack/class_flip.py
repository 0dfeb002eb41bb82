"""One class taken for another: honest training on data with one wrong label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack._own_data import classes_of, labels_of, need_class
from shoal.rounds.attack import Aim, Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class ClassFlip:
    """Each Byzantine peer trains with the label `target` for `source`, and sends the result.

    A targeted attack: all other classes are learned as they are, so accuracy over all classes shows
    little of it; the measure `attack_success` says how often samples of `source` are taken for
    `target`. Breaks where Byzantine peers have no sample of `source` (see `sybils`, who have data
    of their own). To mirror all labels, see `label_flip`.
    Source: Tolpegin et al. 2020, section 3 (arXiv 2007.08432).

    >>> own = torch.ones(1, 2)
    >>> from shoal.tensor.keyed import key_of
    >>> ClassFlip(source=7, target=1)(View(honest=own, own=own, round=0), key_of(0))
    tensor([[1., 1.]])
    """

    source: int = 7
    target: int = 1

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"source": 0, "target": 2})

    def __post_init__(self) -> None:
        need_class("class_flip", "source", self.source)
        need_class("class_flip", "target", self.target)
        if self.source == self.target:
            raise UsageError(
                f"class_flip: source and target are both {self.source}; need two classes"
            )

    def __call__(self, view: View, key: Key) -> Stack:
        return view.own

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        labels = labels_of("class_flip", task, shard, key)
        classes_of("class_flip", task, self.source, self.target)
        return replace(shard, labels=torch.where(labels == self.source, self.target, labels))

    def aim(self) -> Aim:
        """What counts as success."""
        return Aim(self.target, self.source)
