"""Output layers merged class by class, as far as a receiver's own tests speak for them.

A receiver puts the output layers that it was sent on its own features, and looks how well each does
on each class of its own test samples (F1). A column of its layer, one class, is averaged with those
columns of others that do not do worse. Classes that it has no samples of cannot be tested: their
columns are taken from peers that do well on the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.screening.nearness import most, prioritised, quotas
from shoal.tensor.distances import distances_to
from shoal.tensor.stack import nearest, usable
from shoal.tensor.types import Index, Key, Mask, Scalar, Stack, Vector

RULES = ("announced", "count")
_LOWEST = -100.0
"""A score of a familiar class is never lower; weights are 0 far above it, at -100 ln 1.5."""


@dataclass(frozen=True)
class OwnTests:
    """A receiver's own test samples: outputs(models [..., m, dim]) -> [..., m, samples, classes];
    y and mask [..., samples]."""

    outputs: Callable[[Stack], Tensor]
    y: Index
    mask: Mask
    classes: int

    @property
    def familiar(self) -> Mask:
        """The classes that there are samples of: bool [..., classes]."""
        return familiar(self.y, self.mask, self.classes)

    def f1(self, models: Stack) -> Tensor:
        """F1 of each class: [..., m, classes]."""
        return f1_scores(self.outputs(models).argmax(-1), self.y, self.mask, self.classes)


@dataclass(frozen=True)
class Judgement:
    """What a receiver makes of others' models, from F1 scores alone.

    certainty [..., n]: mean minus deviation of F1 over the classes that count; weights
    [..., n, classes]: what each column counts beside the own one, which counts 1; foreign [..., n]:
    the weight of columns that no own test speaks of; selected bool [..., n, classes].
    """

    certainty: Scalar
    weights: Tensor
    foreign: Scalar
    selected: Mask


@dataclass(frozen=True)
class ClassMerge:
    """The integrator of Bristle: settings, and what it does with a receiver's inbox.

    k, alpha: about k models are tested, alpha moves from near to far ones (see `nearness`).
    classes: which familiar classes a sender is judged on. "announced": those that it announces, or
    its best one if it announces none of them; "count": as many as it says it has, those that it
    does best on. With classes that differ from peer to peer, count selects classes that the sender
    has never seen, on which it fails, and so nobody learns anything from anybody.

    A sender's claim selects classes and cannot raise a weight. Tests see which output is largest,
    not how large: a right layer times 1e30 passes them and takes the average along. Assumes that
    all use the same features: distances and tests of a layer on other features mean nothing.
    Source: Verbraeken et al. 2021 (arXiv 2110.11006), section 5.

    >>> ClassMerge(alpha=0.3).quotas
    (5, 4, 1)
    """

    alpha: float = 0.4
    k: int = 10
    classes: str = "announced"

    def __post_init__(self) -> None:
        quotas(self.alpha, self.k)
        if self.classes not in RULES:
            raise UsageError(f"ClassMerge: classes={self.classes!r}; need {' or '.join(RULES)}")

    @property
    def quotas(self) -> tuple[int, int, int]:
        return quotas(self.alpha, self.k)

    def integrate(
        self, own: Vector, rows: Stack, mask: Mask, told: Tensor, tests: OwnTests, column: Index,
        key: Key,
    ) -> tuple[Vector, Judgement, Index]:  # fmt: skip
        """The own layer after an inbox: (vector [..., dim], judgement of those tested, place).

        own [..., dim]; rows [..., n, dim]; mask [..., n]; told: see `judge`, for all n; column: see
        `merged`; place [..., m]: which rows were tested, -1 = none.
        """
        rows, place = self.shortlist(own, rows, mask, key)
        at = place.clamp_min(0)
        told = (
            told.gather(-1, at)
            if self.classes == "count"
            else told.gather(-2, at.unsqueeze(-1).expand(*at.shape, told.shape[-1]))
        )
        scores = tests.f1(torch.cat((own.unsqueeze(-2), rows), -2))
        found = self.judge(scores[..., 0, :], scores[..., 1:, :], tests.familiar, told, place >= 0)
        return self.merged(own, rows, found, column), found, place

    def shortlist(self, own: Vector, rows: Stack, mask: Mask, key: Key) -> tuple[Stack, Index]:
        """The models to test, and where they were: rows [..., m, dim], place [..., m], -1 = none.

        own [..., dim], rows [..., n, dim], mask bool [..., n]; rows that are not finite are none.
        """
        rows, here = usable(rows, mask)
        chosen = prioritised(distances_to(rows, here, own), self.alpha, self.k, key)
        width = min(rows.shape[-2], most(self.alpha, self.k))
        order = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[..., :width]
        place = torch.where(chosen.gather(-1, order), order, -1)
        taken = rows.gather(-2, order.unsqueeze(-1).expand(*order.shape, rows.shape[-1]))
        return taken, place

    def judge(
        self, own: Tensor, others: Tensor, familiar: Mask, told: Tensor, there: Mask
    ) -> Judgement:
        """Weights from F1: own [..., classes], others [..., n, classes], each 0 to 1.

        familiar bool [..., classes]; told [..., n, classes] > 0 where a sender announces a class,
        or with "count" [..., n], how many it has; there bool [..., n].
        """
        familiar = familiar.unsqueeze(-2)
        selected = self._selected(others, familiar, told) & there.unsqueeze(-1)
        own = own.unsqueeze(-2)
        gap = 10.0 * (own - others).abs()
        score = torch.where(others > own, gap ** (3.0 + own), -(gap ** (4.0 + own)))
        score = torch.where(selected, score, 0.0)
        count = selected.sum(-1).clamp_min(1)
        mean = torch.where(selected, others, 0.0).sum(-1) / count
        apart = torch.where(selected, others - mean.unsqueeze(-1), 0.0)
        certainty = (mean - (apart.square().sum(-1) / count).sqrt()).clamp_min(0.0)
        known = certainty.unsqueeze(-1) * trust(score.clamp_min(_LOWEST))
        foreign = certainty * trust(score.sum(-1))
        weights = torch.where(familiar, known * selected, foreign.unsqueeze(-1))
        return Judgement(certainty, weights, foreign, selected)

    def _selected(self, others: Tensor, familiar: Mask, told: Tensor) -> Mask:
        """The familiar classes that senders are judged on: bool [..., n, classes]."""
        order = torch.where(familiar, -others, torch.nan)
        if self.classes == "count":
            count = torch.minimum(told.long().clamp_min(1), familiar.sum(-1))
            return nearest(order, count)
        announced = (told > 0) & familiar
        return torch.where(announced.any(-1, keepdim=True), announced, nearest(order, 1))

    def merged(self, own: Vector, rows: Stack, found: Judgement, column: Index) -> Vector:
        """own [..., dim] averaged with rows [..., n, dim], entry by entry.

        column: int64 [dim], the class that each entry belongs to; -1 = none, which counts as
        foreign. Every entry is a convex combination of the own one and others'.
        """
        table = torch.cat((found.weights, found.foreign.unsqueeze(-1)), -1).to(own.dtype)
        weight = table[..., column]
        return (own + (weight * rows).sum(-2)) / (1.0 + weight.sum(-2))


def trust(score: Tensor) -> Tensor:
    """A weight from a score: 1 at 0, nothing below -100 ln 1.5, at most 6.

    >>> trust(torch.tensor([0.0, -50.0, 1e6])).tolist()
    [1.0, 0.0, 6.0]
    """
    return (10.0 * torch.sigmoid(score / 100.0) - 4.0).clamp_min(0.0)


def familiar(y: Index, mask: Mask, classes: int) -> Mask:
    """Which classes there are samples of: bool [..., classes] from y and mask [..., samples]."""
    kinds = torch.arange(classes, device=y.device)
    return ((y.unsqueeze(-1) == kinds) & mask.unsqueeze(-1)).any(-2)


def f1_scores(predicted: Index, y: Index, mask: Mask, classes: int) -> Tensor:
    """F1 of each class: float64 [..., n, classes]; 0 for a class that is neither there nor said.

    predicted: [..., n, samples], y and mask: [..., samples].

    >>> right = torch.ones(3, dtype=torch.bool)
    >>> f1_scores(torch.tensor([[0, 0, 1]]), torch.tensor([0, 1, 1]), right, 3).tolist()
    [[0.6666666666666666, 0.6666666666666666, 0.0]]
    """
    kinds = torch.arange(classes, device=y.device)
    true = ((y.unsqueeze(-1) == kinds) & mask.unsqueeze(-1)).unsqueeze(-3)
    said = (predicted.unsqueeze(-1) == kinds) & mask.unsqueeze(-1).unsqueeze(-3)
    right = (said & true).sum(-2).to(torch.float64)
    total = said.sum(-2) + true.sum(-2)
    return 2.0 * right / total.clamp_min(1)
