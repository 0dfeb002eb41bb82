"""Mimicry: everybody votes twice for one honest peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.attack.base import clean_data, honest_mean, need_row, repeated
from shoal.rounds.attack import Knowledge, View
from shoal.tensor.stack import combine, nearest
from shoal.tensor.types import Key, Stack, Vector


@dataclass(frozen=True)
class Mimic:
    """Every Byzantine peer sends a copy of one honest peer's vector.

    No copy is an outlier, yet with different data at each peer the result leans to one of them.
    target: row among the honest peers; None = in each round the row that lies farthest along the
    direction in which honest rows differ most (the paper follows one direction over rounds by Oja's
    method; here each round finds its own, as an attack has no state).
    Source: Karimireddy et al. 2022, section 3 and appendix B (arXiv 2006.09365).

    >>> from shoal.tensor.keyed import key_of
    >>> honest = torch.tensor([[0.0], [1.0], [9.0]])
    >>> Mimic()(View(honest=honest, own=honest[:2], round=0), key_of(0))
    tensor([[9.],
            [9.]])
    """

    target: int | None = None

    knowledge: ClassVar[Knowledge] = Knowledge.ALL
    per_receiver: ClassVar[bool] = False
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"target": 0})

    def __post_init__(self) -> None:
        need_row("mimic", "target", self.target)

    def __call__(self, view: View, key: Key) -> Stack:
        if self.target is None:
            return repeated(_extreme(view), view)
        honest = view.honest.shape[-2]
        if self.target >= honest:
            raise UsageError(
                f"mimic: target={self.target} of {honest} honest peers; need a lower row, or None"
            )
        return repeated(view.honest[..., self.target, :], view)

    poison = clean_data


def _extreme(view: View) -> Vector:
    mean, x, rows = honest_mean(view)
    apart = torch.where(rows.unsqueeze(-1), x - mean.unsqueeze(-2), torch.zeros_like(x[..., :1, :]))
    apart = apart.to(torch.float64)
    # Rows projected on the first principal direction: the Gram matrix's first eigenvector, scaled.
    along = torch.linalg.eigh(apart @ apart.mT).eigenvectors[..., -1].abs()
    farthest = nearest(torch.where(rows, -along, float("nan")), 1)
    return combine(farthest, x)
