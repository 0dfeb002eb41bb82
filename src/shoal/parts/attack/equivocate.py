"""Equivocation: one lie for some, another one for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts import find
from shoal.parts.attack.base import honest_mean
from shoal.rounds.attack import Attack, Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Key, Stack

Setting = int | float | str | bool | None
Settings = tuple[tuple[str, Setting], ...]


@dataclass(frozen=True)
class Equivocate:
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
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"lie": "sign_flip", "settings": (("scale", 3.0),), "camps": 3},
        {"lie": "gaussian", "mirror": False},
        {"lie": "label_flip", "camps": 1},
    )

    def __post_init__(self) -> None:
        given = self.settings.items() if isinstance(self.settings, Mapping) else self.settings
        pairs = tuple(sorted((str(name), value) for name, value in given))
        object.__setattr__(self, "settings", pairs)
        if not isinstance(self.camps, int) or isinstance(self.camps, bool) or self.camps < 1:
            raise UsageError(
                f"equivocate: camps={self.camps!r}; need a whole number >= 1 (2 is usual)"
            )
        if getattr(self.attack, "per_receiver", False):
            raise UsageError(
                f"equivocate: lie={self.lie!r} tells every receiver something else by itself "
                "(use it alone, or name another attack)"
            )

    @property
    def attack(self) -> Attack:
        """The attack that is told in several ways."""
        try:
            return find("attack", self.lie)(**dict(self.settings))
        except TypeError as error:
            raise UsageError(
                f"equivocate: {self.lie} with {dict(self.settings)}: {error} (mend the settings)"
            ) from None

    def __call__(self, view: View, key: Key) -> Stack:
        mean = honest_mean(view)[0].unsqueeze(-2)
        told = []
        for camp in range(self.camps):
            lie = self._told(view, keyed.fold(key, "camp", camp))
            told.append(2 * mean - lie if self.mirror and camp % 2 else lie)
        honest = view.honest.shape[-2]
        camp_of = torch.arange(honest, device=view.own.device) * self.camps // honest
        return torch.stack(told, -3).index_select(-3, camp_of).to(view.own.dtype)

    def _told(self, view: View, key: Key) -> Stack:
        """The lie [..., byzantine, dim] that one camp hears."""
        attack = self.attack
        if attack.knowledge is Knowledge.ALL:
            return attack(view, key)
        # As engines do it: each attacker sees itself alone.
        own = view.own.unsqueeze(-2)
        return attack(View(own, own, view.round), keyed.grid(key, own.shape[-3])).squeeze(-2)

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        """What the other attack does to the peer's data."""
        return self.attack.poison(task, shard, key)
