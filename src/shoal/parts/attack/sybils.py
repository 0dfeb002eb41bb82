"""Sybils: many identities of one adversary, all with one poisoned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.attack._own_data import need_class
from shoal.parts.attack._wrapped import Settings, Wrapped
from shoal.parts.attack.base import repeated
from shoal.rounds.attack import Knowledge, View
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed
from shoal.tensor.stack import masked_mean, usable
from shoal.tensor.types import Key, Stack


@dataclass(frozen=True)
class Sybils(Wrapped):
    """All Byzantine peers send the mean of what their `goal` attack makes of each.

    Each Sybil trains from the model of its own neighbourhood, on `samples` of the adversary's data:
    drawn by key from the whole training set, then poisoned by `goal` (another attack in this
    folder, such as `class_flip` or `backdoor`; `settings` are its own). samples = 0: on the data
    that the task gives it. The adversary pools what its Sybils make, so they share one poisoned
    model in each round, and whoever compares directions sees them point the same way.

    gossip: what they tell single receivers where a method has them pass on what they know of
    others: "drop" nothing (zeros, but for an `edge` certificate, without which nobody would
    listen), "truth" as an honest peer would, "false" the history of another peer than the one
    named, so that two honest peers look alike (methods whose state holds `history`).
    To connect them see the topology `sybil_graph`; to let them flood in later, the fault `join`.
    Source: Fung et al. 2020, section 3 (arXiv 1808.04866); Werthenbach and Pouwelse 2023, section 3
    (arXiv 2306.15044).

    >>> from shoal.tensor.keyed import key_of
    >>> own = torch.tensor([[1.0], [3.0]])
    >>> Sybils()(View(honest=own, own=own, round=0), key_of(0)).tolist()
    [[2.0], [2.0]]
    """

    goal: str = "class_flip"
    settings: Settings = ()
    samples: int = 200
    gossip: str = "drop"

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    own_data: ClassVar[bool] = True
    names: ClassVar[str] = "goal"
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"samples": 12},
        {"goal": "label_flip", "samples": 0},
        {"goal": "sign_flip", "settings": (("scale", 2.0),), "samples": 5, "gossip": "truth"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        need_class("sybils", "samples", self.samples)
        if self.gossip not in ("drop", "truth", "false"):
            raise UsageError(f"sybils: gossip={self.gossip!r}; need drop, truth or false")

    def __call__(self, view: View, key: Key) -> Stack:
        x, rows = usable(self._made(view, key))
        return repeated(masked_mean(x, rows).to(view.own.dtype), view)

    def poison(self, task: Task, shard: Shard, key: Key) -> Shard:
        """Samples of the adversary's own, and what the goal does to them."""
        if self.samples:
            pool = getattr(task, "y", None)
            if pool is None:
                raise UsageError(
                    f"sybils: {type(task).__name__} has no table `y` to draw {self.samples} "
                    "samples from (set samples = 0)"
                )
            keys = keyed.grid(keyed.fold(key, "sybils"), self.samples)
            index = (keyed.uniform(keys) * len(pool)).long().clamp(max=len(pool) - 1)
            size = torch.full_like(shard.size, self.samples)
            shard = replace(shard, index=index, size=size, labels=None, inputs=None)
        return self.attack.poison(task, shard, key)

    def tells(self, said: Mapping[str, Tensor], state: Any) -> dict[str, Tensor]:
        """What goes to single receivers in place of `said`, name -> [..., t, *]."""
        if self.gossip == "truth":
            return dict(said)
        if self.gossip == "drop":
            nothing = {name: torch.zeros_like(value) for name, value in said.items()}
            return {**nothing, **{name: said[name] for name in said.keys() & {"edge"}}}
        history, told = getattr(state, "history", None), said.get("history")
        if history is None or told is None or history.shape[-1] != told.shape[-1]:
            raise UsageError(
                "sybils: gossip='false' needs a method that gossips histories (use 'drop')"
            )
        # The longest history that the Sybil knows goes out under every name.
        longest = torch.linalg.vector_norm(history, dim=-1).argmax(-1)
        place = longest[..., None, None].expand(*longest.shape, 1, history.shape[-1])
        return {**said, "history": history.gather(-2, place).expand_as(told).contiguous()}
