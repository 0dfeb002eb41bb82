"""FoolsGold: rows that point the same way share one vote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.aggregate._before import lengths
from shoal.parts.aggregate.base import Plain, need_positive
from shoal.tensor.stack import masked_mean, shares, usable
from shoal.tensor.types import Mask, Stack, Vector


@dataclass(frozen=True)
class FoolsGold(Plain):
    """Mean of the rows, each weighing less the more its direction is like another row's.

    x: [..., k, dim], gradients or updates; weights of senders are ignored. The score of a row is 1
    minus its largest cosine with another row, pardoned where the other has the larger one, scaled
    to a largest score of 1 and spread by `confidence` (log(s / (1 - s)) + 1/2), cut to [0, 1].
    Made for sybils: any number of peers with one goal, among honest peers whose data differ. Looks
    at the rows in hand only, where the source keeps each sender's history (the system `sybilwall`
    does). When all are alike nobody is worth anything, and the plain mean counts. Breaks with a
    single attacker, or when honest rows are more alike than faulty ones (equal data): it has no
    bound on the distance to the honest mean. Source: Fung et al. 2020, algorithm 1
    (arXiv 1808.04866).

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-5.0, -5.0], [-5.0, -5.0]])
    >>> FoolsGold()(x, mask=torch.ones(4, dtype=torch.bool))
    tensor([0.5000, 0.5000])
    """

    confidence: float = 1.0

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"confidence": 0.5})
    translation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        need_positive("fools_gold", "confidence", self.confidence, "1 is the source's")

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        score = self.scores(x, rows)
        some = (score > 0).any(-1, keepdim=True)
        return masked_mean(x, rows, torch.where(some, score, 1.0))

    def scores(self, x: Stack, mask: Mask) -> Tensor:
        """What each row counts, float64 [..., k] in [0, 1]; 0 for rows that do not count."""
        x, rows = usable(x, mask)
        if not x.shape[-2]:
            return shares(rows)
        length = lengths(x, rows)
        scale = torch.where(length > 0, length, 1.0).nan_to_num(nan=1.0).unsqueeze(-1)
        cosine = torch.zeros((*rows.shape, rows.shape[-1]), dtype=torch.float64, device=x.device)
        for part in x.split(_WIDTH, -1):
            unit = part.to(torch.float64) / scale
            cosine += unit @ unit.mT
        return scores_of(cosine, rows, self.confidence)

    def tolerates(self, rows: int) -> int:
        """Nothing is proven about the distance to the mean."""
        return 0

    def kappa(self, rows: int) -> float:
        return math.inf

    def breaks_at(self, rows: int) -> int:
        """A single one that points its own way counts like the best."""
        return 1


_WIDTH = 4096
"""Coordinates converted to float64 at a time; a constant."""

_ALIKE = {torch.float64: 1e-7, torch.float32: 1e-5}
"""Rounding of equal directions is no difference."""


def scores_of(cosine: Tensor, rows: Mask, confidence: float) -> Tensor:
    """FoolsGold's scores float64 [..., k] from cosines [..., k, k]; 0 for rows that do not count.

    A row is not compared with itself: its own cosine counts as 0, so that no largest cosine is
    negative. (With negative ones the pardon, a ratio of two of them, could turn opposite directions
    into equal ones.) Scores above 0.99 of the largest count as that much.

    >>> alike = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> scores_of(alike, torch.ones(3, dtype=torch.bool), 1.0).tolist()
    [0.0, 0.0, 1.0]
    """
    same = torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device)
    pairs = rows.unsqueeze(-1) & rows.unsqueeze(-2) & ~same
    alike = torch.where(pairs, cosine.clamp(0, 1), 0.0)
    most = alike.amax(-1)
    mine, theirs = most.unsqueeze(-1), most.unsqueeze(-2)
    pardon = torch.where(mine < theirs, mine / torch.where(theirs > 0, theirs, 1.0), 1.0)
    score = torch.where(rows, 1 - (alike * pardon).amax(-1), 0.0).to(torch.float64)
    score = torch.where(score > _ALIKE[cosine.dtype], score, 0.0)
    top = score.amax(-1, keepdim=True)
    score = (score / torch.where(top > 0, top, 1.0)).clamp(max=0.99)
    spread = confidence * (score.log() - (1 - score).log() + 0.5)
    return spread.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1)
