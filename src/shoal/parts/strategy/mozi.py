"""MOZI: the nearest models, and of those the ones that do no worse on a local batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.optimise.sgd import SGD
from shoal.rounds.local import descend
from shoal.rounds.strategy import Heard, Parcel, Step
from shoal.rounds.task import Batch
from shoal.tensor import keyed
from shoal.tensor.distances import distances_to
from shoal.tensor.stack import masked_mean, nearest, or_center, usable
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class Mozi:
    """Local SGD, then two filters on what neighbours sent: distance, then performance.

    Of n vectors received the ceil(rho n) nearest to the own one stay; of those the ones whose loss
    on a batch of own samples is not above the own vector's. The result is own_weight times the own
    vector and the rest times their mean, or the nearest vector alone when none passes. rho is the
    share of neighbours that are believed honest. Breaks where honest neighbours hold other classes:
    they fail the test, and the nearest one then is whoever is alike, honest or not.
    Source: Guo et al. 2022 (arXiv 2002.08569), algorithm 1, there called UBAR.

    >>> Mozi(rho=0.6).kept(19)
    12
    """

    lr: float = 0.1
    steps: int = 1
    batch_size: int = 32
    rho: float = 0.5
    own_weight: float = 0.5

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"batch_size": 8}, {"steps": 2, "batch_size": 4, "rho": 1.0, "own_weight": 0.0},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1 or not 0 <= self.own_weight < 1 or self.steps < 1:
            raise UsageError(
                f"Mozi: rho={self.rho}, own_weight={self.own_weight}, steps={self.steps}; need a "
                "share above 0, up to 1, a weight in [0, 1) and at least one step"
            )

    def kept(self, count: int) -> int:
        """How many of `count` vectors the first filter keeps."""
        # 0.55 * 20 is a little more than 11.
        return math.ceil(self.rho * count - 1e-9)

    def init(self, params: Vector) -> Vector:
        return params

    def local(self, state: Vector, step: Step) -> tuple[Vector, Parcel]:
        sgd = SGD(self.lr)
        params, _ = descend(
            step.task, sgd, state, sgd.init(state), step, steps=self.steps,
            batch_size=self.batch_size,
        )  # fmt: skip
        return params, Parcel(params)

    def combine(
        self, state: Vector, rows: Stack, mask: Mask, share: Tensor, extra: Mapping[str, Tensor],
        step: Step,
    ) -> Heard:  # fmt: skip
        own, count = rows[..., 0, :], mask.sum(-1)
        others, here = usable(rows[..., 1:, :], mask[..., 1:])
        if not others.shape[-2]:
            return Heard(own, count)
        apart = distances_to(others, here, own)
        order = apart.argsort(dim=-1, stable=True)[..., : self.kept(others.shape[-2])]
        near = others.gather(-2, order.unsqueeze(-1).expand(*order.shape, others.shape[-1]))
        apart = apart.gather(-1, order)
        limit = torch.ceil(self.rho * here.sum(-1, keepdim=True) - 1e-9)
        places = torch.arange(order.shape[-1], device=order.device)
        first = (places < limit) & ~torch.isnan(apart)
        loss = self._loss(torch.cat((own.unsqueeze(-2), near), -2), step)
        good = first & (loss[..., 1:] <= loss[..., :1])
        chosen = torch.where(good.any(-1, keepdim=True), good, nearest(apart, 1))
        mean = masked_mean(near, chosen)
        mixed = self.own_weight * own + (1.0 - self.own_weight) * mean
        return Heard(or_center(mixed, chosen.any(-1), own), count)

    def _loss(self, models: Stack, step: Step) -> Tensor:
        """Losses [..., m] of models [..., m, dim] on one batch of own samples."""
        lead = step.key.dim()
        batch = step.task.batch(step.shard, keyed.fold(step.key, "judge"), self.batch_size)
        shared = [part.unsqueeze(lead) for part in (batch.x, batch.y, batch.mask)]
        return step.task.loss(models, Batch(*shared))

    def apply(self, state: Vector, heard: Heard, step: Step) -> Vector:
        return heard.vector

    def params(self, state: Vector) -> Vector:
        return state
