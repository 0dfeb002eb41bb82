"""Equivocation: one lie for some, another one for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack._wrapped import Settings, Wrapped
from shoal.parts.attack.base import honest_mean
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Equivocate(Wrapped):
    """Byzantine peers tell each camp of honest receivers something else, all out of one attack.

    The honest peers, in the order of their ids, are divided into `camps` of nearly equal size, the
    same in each round. `lie` names another attack in this folder and `settings` are its own (a
    mapping, or pairs). Each camp hears it with draws of its own. With `mirror` every second camp
    hears it reflected at the honest mean, so that the camps are pulled apart: on a ring across two
    cuts, where neighbours alone could notice. An attack that searches asks what happened if
    everybody heard the same. Of no use against a single receiver, such as a hub.
    Source: Lamport et al. 1982, section 1 (The Byzantine Generals Problem): a traitor orders some
    to attack and others to retreat.

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [2.0]])
    >>> Equivocate("sign_flip")(View(honest=honest, own=honest[1:], round=0), key_of(0)).flatten()
    tensor([-2.,  4.])
    """

    lie: str = "alie"
    settings: Settings = ()
    camps: int = 2
    mirror: bool = True

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = True
    names: ClassVar[str] = "lie"
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"lie": "sign_flip", "settings": (("scale", 3.0),), "camps": 3},
        {"lie": "gaussian", "mirror": False},
        {"lie": "label_flip", "camps": 1},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.camps, int) or isinstance(self.camps, bool) or self.camps < 1:
            raise UsageError(
                f"equivocate: camps={self.camps!r}; need a whole number >= 1 (2 is usual)"
            )

    def __call__(self, view: View, key: Key) -> Stack:
        mean = honest_mean(view)[0].unsqueeze(-2)
        told = []
        for camp in range(self.camps):
            lie = self._made(view, keyed.fold(key, "camp", camp))
            told.append(2 * mean - lie if self.mirror and camp % 2 else lie)
        honest = view.honest.shape[-2]
        camp_of = torch.arange(honest, device=view.own.device) * self.camps // honest
        return torch.stack(told, -3).index_select(-3, camp_of).to(view.own.dtype)

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        """What the other attack does to the peer's data."""
        return self.attack.poison(task, shard, key)
