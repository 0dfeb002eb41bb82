"""Label flipping, sharpened: what wrong labels teach, minus what right ones do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.attack.base import honest_mean
from shoal.parts.attack.label_flip import LabelFlip
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class LabelFlipDifference:
    """Each Byzantine peer trains as with `label_flip` and sends that minus the honest mean.

    It pulls towards wrong labels and away from right ones at once. An attacker that is a client
    could subtract its own honest vector; here the mean of the honest vectors stands for it, which
    is the same but for sampling where data are spread alike. Meant for gradients and updates: the
    difference of two sets of parameters is none.
    Source: Gu et al. 2025 (DP-BREM, arXiv 2306.12608), section 6.

    >>> import torch
    >>> from shoal.tensor.keyed import key_of
    >>> honest, own = torch.tensor([[1.0], [3.0]]), torch.tensor([[-1.0]])
    >>> LabelFlipDifference()(View(honest=honest, own=own, round=0), key_of(0))
    tensor([[-3.]])
    """

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, view: View, key: Key) -> Stack:
        mean, _, _ = honest_mean(view)
        return view.own - mean.unsqueeze(-2).to(view.own.dtype)

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        return LabelFlip().poison(task, shard, key)
