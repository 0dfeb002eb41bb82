"""Centred clipping: a step whose length no sender controls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.aggregate.base import need_count, need_positive
from shoal.parts.aggregate.median import middle
from shoal.tensor.distances import distances_to, squared_distances
from shoal.tensor.stack import certain, combine, finite_rows, or_center, shares, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight


@dataclass(frozen=True)
class CenteredClipping:
    """From the center, the mean of the differences to the rows, each clipped to length `radius`.

    x: [..., k, dim], weights honoured. With the receiver's own vector as center it is self-centred
    clipping (He et al. 2022, equation 5; one iteration, the mixing weights as weights); a hub gives
    its last aggregate (Karimireddy et al. 2021, algorithm 2). Without a finite center it starts at
    the coordinate-wise median. Rows that are not finite are absent. f of n arbitrary rows with
    equal weights move the result by at most 2 f/n * radius an iteration: `radius` is in units of x
    and must fit the honest spread; a radius far above it is the plain mean.

    >>> x = torch.tensor([[0.0], [1.0], [99.0]])
    >>> rule = CenteredClipping(radius=2.0)
    >>> rule(x, mask=torch.ones(3, dtype=torch.bool), center=torch.tensor([0.0]))
    tensor([1.])
    """

    radius: float = 10.0
    iterations: int = 1

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"radius": 0.5, "iterations": 3})
    centered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need_positive("centered_clipping", "radius", self.radius, "longest honest difference")
        need_count("centered_clipping", "iterations", self.iterations, 1, "1 is usual")

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        share = shares(rows, weight)
        some = share.sum(-1) > 0
        there = None if center is None else finite_rows(center.unsqueeze(-2))
        if center is not None and there is not None and certain(there):
            point = center.to(x.dtype)
        else:
            point = or_center(middle(x, rows), rows.any(-1), None)
            if center is not None:
                point = torch.where(there, center.to(x.dtype), point)
        for _ in range(self.iterations):
            pull = share * self._clip(distances_to(x, rows, point))
            # Not x - point: that difference may overflow in a row whose pull is tiny.
            stay = (1 - pull.sum(-1, keepdim=True)).to(x.dtype)
            point = stay * point + combine(pull, x)
        return or_center(point, some, center)

    def among(self, x: Stack, heard: Mask) -> Stack:
        """All receivers: one Gram matrix has the distances of the first iteration."""
        own = x
        x, good = usable(x)
        heard = heard.expand(*good.shape, good.shape[-1])
        if self.iterations > 1 or not certain(good):
            # Later centers are no rows, and a center that is not finite needs a median.
            seen = own.unsqueeze(-3).expand(*own.shape[:-1], *own.shape[-2:])
            return self(seen, mask=heard, center=own)
        pull = shares(heard) * self._clip(squared_distances(x, good).sqrt())
        stay = (1 - pull.sum(-1, keepdim=True)).to(x.dtype)
        return or_center(stay * x + pull.to(x.dtype) @ x, heard.any(-1), own)

    def tolerates(self, rows: int) -> int:
        """Nothing is proven about the distance to the mean: `radius` is no multiple of a spread."""
        return 0

    def kappa(self, rows: int) -> float:
        return math.inf

    def breaks_at(self, rows: int) -> None:
        """From an honest center no rows move it farther than `iterations` times `radius`."""
        return None

    def _clip(self, apart: Tensor) -> Tensor:
        return (self.radius / apart.clamp(min=self.radius)).nan_to_num(nan=0.0)
