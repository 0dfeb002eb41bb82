"""How well the loss of a model tells the samples that it was trained on from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.task import Batch, Task
from shoal.tensor.types import Vector

ROW_NUMBERS = 16 << 20
"""Numbers of parameters in one call, a row for each sample."""


@dataclass(frozen=True)
class Membership:
    """`membership_auc` and `membership_tpr`, of the last mean model: an attack by its losses alone.

    A sample is guessed to be one of some peer's training data if its loss is below a threshold; all
    training data are members, the test set is not. membership_auc: the chance that a member's loss
    is below that of another sample (0.5 = nothing is told). membership_tpr: the share of members
    that is found when `false_positives` of the others are taken for members, which is what hurts
    (Carlini et al. 2022, arXiv 2112.03570, section 3). Yeom et al. 2018 (arXiv 1709.01604).

    A weak attack: it bounds from below what is leaked, and it proves nothing about epsilon, since
    nobody tossed coins about who is a member (`shoal.parts.privacy.audit_bounds` needs that).

    >>> Membership().false_positives
    0.01
    """

    false_positives: float = 0.01

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"false_positives": 0.2})

    def __post_init__(self) -> None:
        if not 0 < self.false_positives < 1:
            raise UsageError(
                f"Membership: false_positives={self.false_positives}; need a share above 0 and "
                "below 1"
            )

    def __call__(self, task: Task, params: Vector) -> Mapping[str, float]:
        data: list[Any] = [getattr(task, name, None) for name in ("x", "y", "test_x", "test_y")]
        if any(each is None for each in data):
            raise UsageError(
                f"membership: task {type(task).__name__} has no samples (name a data set, such as "
                "digits)"
            )
        x, y, test_x, test_y = data
        shard = task.shard(torch.arange(task.peers, device="cpu"))
        places = torch.arange(shard.index.shape[-1], device=shard.size.device)
        own = places < shard.size.unsqueeze(-1)
        if shard.labels is not None:
            members = _losses(task, params, x[shard.index[own]], shard.labels[own])
        else:
            index = shard.index[own].unique()
            members = _losses(task, params, x[index], y[index])
        others = _losses(task, params, test_x, test_y).sort().values
        if not len(members):
            raise UsageError("measure: no peer has data (give the task samples)")
        above = len(others) - torch.searchsorted(others, members, right=True)
        level = len(others) - torch.searchsorted(others, members)
        auc = (above + level).double().mean() / (2 * len(others))
        # The threshold lets so many others through at most.
        threshold = others[int(self.false_positives * len(others))]
        found = (members < threshold).double().mean()
        return {"membership_auc": float(auc), "membership_tpr": float(found)}


def _losses(task: Task, params: Vector, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each sample, [samples]."""
    return torch.cat(list(_parts(task, params, x, y)))


def _parts(task: Task, params: Vector, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    rows = max(1, ROW_NUMBERS // params.shape[-1])
    yield x.new_zeros(0, dtype=torch.float64)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        mask = torch.ones(len(x[part]), 1, dtype=torch.bool, device=x.device)
        batch = Batch(x[part].unsqueeze(1), y[part].unsqueeze(1), mask)
        yield task.loss(params.expand(len(mask), -1), batch).double()
