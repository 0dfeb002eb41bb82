"""Backdoors: a patch in an image that makes it another class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.attack._own_data import classes_of, labels_of, need_class, samples_of
from shoal.parts.attack.base import need_number
from shoal.rounds.attack import Aim, Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Backdoor:
    """Each Byzantine peer trains on images of which a `share` carry a patch and the label `target`.

    The patch is the square of `size` pixels in the last rows and columns, set to `value`. Which
    samples carry it is drawn by key, once. Images without the patch keep their labels, so that the
    accuracy on them shows nothing; the measure `attack_success` says how often test images of other
    classes are taken for `target` once they carry it. Needs a task whose samples are images
    (two axes or more) and that takes `Shard.inputs`.
    Source: Gu et al. 2017, section 3 (BadNets, arXiv 1708.06733); in federated learning Bagdasaryan
    et al. 2020 (arXiv 1807.00459), here without scaling up.

    >>> Backdoor(size=1).trigger(torch.zeros(1, 2, 2)).tolist()
    [[[0.0, 0.0], [0.0, 1.0]]]
    """

    target: int = 0
    size: int = 2
    value: float = 1.0
    share: float = 0.5

    knowledge: ClassVar[Knowledge] = Knowledge.OWN
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"target": 1, "size": 1, "share": 1.0})

    def __post_init__(self) -> None:
        need_class("backdoor", "target", self.target)
        need_class("backdoor", "size", self.size)
        need_number("backdoor", "value", self.value, "1 is white")
        need_number("backdoor", "share", self.share, "0 to 1", least=0.0)
        if self.size < 1 or self.share > 1:
            raise UsageError(
                f"backdoor: size={self.size}, share={self.share}; need a patch of at least 1 pixel "
                "and a share of at most 1"
            )

    def __call__(self, view: View, key: Key) -> Stack:
        return view.own

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        classes_of("backdoor", task, self.target)
        labels = labels_of("backdoor", task, shard, key)
        images = samples_of(task, shard, key)
        axes = images.dim() - labels.dim()
        if axes < 2:
            raise UsageError(f"backdoor: samples have {axes} axes; need images (two or more)")
        draws = keyed.uniform(keyed.grid(keyed.fold(key, "backdoor"), labels.shape[-1]))
        marked = draws < self.share
        shape = marked.shape + (1,) * (images.dim() - marked.dim())
        return replace(
            shard,
            labels=torch.where(marked, self.target, labels),
            inputs=torch.where(marked.view(shape), self.trigger(images), images),
        )

    def trigger(self, images: Tensor) -> Tensor:
        """Images [..., height, width] with the patch."""
        if images.dim() < 2 or min(images.shape[-2:]) < self.size:
            raise UsageError(
                f"backdoor: samples of shape {tuple(images.shape)} and a patch of {self.size}; "
                "need images that are larger"
            )
        out = images.clone()
        out[..., -self.size :, -self.size :] = self.value
        return out

    def aim(self) -> Aim:
        """What counts as success."""
        return Aim(self.target, None, self.trigger)
