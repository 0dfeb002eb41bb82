"""Nearest-neighbour averaging, MoNNA's rule, and the measure of how well a rule contracts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate.base import around_pivot, need_count, need_told
from shoal.rounds.attack import View
from shoal.tensor.distances import distances_to, squared_distances
from shoal.tensor.stack import finite_rows, first_usable, masked_mean, nearest, or_center, usable
from shoal.tensor.types import Key, Mask, Scalar, Stack, Vector, Weight


@dataclass(frozen=True)
class NNA:
    """Mean of the rows nearest to the receiver's own vector, all but `byzantine` of them.

    x: [..., k, dim] with the own row in it, center: [..., dim] the own vector; the first row stands
    in for a center that is missing or not finite. Of r rows received r - byzantine are averaged (at
    least one); ties go to the lower index. With `expect`, the number of vectors that a full round
    brings, missing ones count as faulty and expect - byzantine are averaged: the synchronous form;
    without it the form that does not wait for everybody. Rows that are not finite are the farthest.
    Breaks when more than `byzantine` rows are arbitrary; agreement in one round needs 11 times as
    many rows as faults. Source: Farhadkhani et al. 2023 (arXiv 2209.10931), algorithm 1.

    >>> x = torch.tensor([[1.0], [0.0], [2.0], [0.5]])
    >>> NNA(1)(x, mask=torch.ones(4, dtype=torch.bool), center=x[0])
    tensor([0.5000])
    """

    byzantine: int = 1
    expect: int | None = None

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"byzantine": 2},
        {"byzantine": 2, "expect": 12},
        {"byzantine": 0},
    )
    centered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need_told(self, self.byzantine)
        if self.expect is not None:
            need_count(
                "nna", "expect", self.expect, 2 * self.byzantine + 1, "more than 2*byzantine rows"
            )

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        point = first_usable(x, rows)
        if center is not None:
            good = finite_rows(center.unsqueeze(-2))
            point = torch.where(good, center.to(x.dtype), point)
        kept = nearest(distances_to(x, rows, point), self._keep(mask.expand(rows.shape)))
        return or_center(masked_mean(x, kept), rows.any(-1), center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        """One Gram matrix serves all pivots, one product with 0/1 rows all means."""
        return self.among(x, mask.unsqueeze(-2).expand(*mask.shape, mask.shape[-1]))

    def among(self, x: Stack, heard: Mask) -> Stack:
        """The same with other rows in hand at each receiver."""
        own = x
        x, good = usable(x)
        heard = heard.expand(*good.shape, good.shape[-1])
        rows = heard & good.unsqueeze(-2)
        square = pivoted(squared_distances(x, heard.any(-2) & good), rows)
        kept = nearest(square, self._keep(heard)).to(x.dtype)
        mean = (kept / kept.sum(-1, keepdim=True).clamp(min=1)) @ x
        return or_center(mean, rows.any(-1), own)

    def _keep(self, mask: Mask) -> Tensor:
        received = mask.sum(-1)
        if self.expect is not None:
            received = received.clamp(min=self.expect)
        return (received - self.byzantine).clamp(min=1)

    def _faults(self, rows: int) -> int:
        missing = 0 if self.expect is None else max(0, self.expect - rows)
        return max(0, self.byzantine - missing)

    def tolerates(self, rows: int) -> int:
        return max(0, min(self._faults(rows), (rows - 1) // 2))

    def kappa(self, rows: int) -> float:
        """For the worst-placed honest receiver; over receivers, 8f/(n - f) on average."""
        bad = self.tolerates(rows)
        return around_pivot(rows - bad, max(1, rows - self._faults(rows)), bad)

    def breaks_at(self, rows: int) -> int:
        """One more than are left out."""
        return min(rows, self._faults(rows) + 1)


def pivoted(square: Tensor, rows: Mask) -> Tensor:
    """Distances [..., n, n] from every row to every row, each row's own place before all others.

    rows: [..., n, n], which rows count for the pivot of each line; the others become NaN.
    A rounded distance could otherwise put a near-copy with a lower index ahead of the row itself.
    A row that does not count has no distances of its own: it takes those of the first that counts.
    """
    count = rows.shape[-1]
    place = torch.arange(count, device=square.device)
    first = rows.to(torch.int64).argmax(-1) if count else place
    pivot = torch.where(rows.diagonal(dim1=-2, dim2=-1), place, first)
    square = square.take_along_dim(pivot.unsqueeze(-1), -2)
    square = torch.where(rows, square, float("nan"))
    own = (pivot.unsqueeze(-1) == place) & rows
    return torch.where(own, torch.full((), -1.0, dtype=square.dtype, device=square.device), square)


def nearest_neighbor_average(own: Vector, received: Stack, f: int) -> Vector:
    """Mean of the n - f vectors nearest to `own` [..., dim], `received` [..., n - 1, dim] included.

    NaN vectors are the farthest. A vector that did not arrive may be given as NaN.

    >>> nearest_neighbor_average(torch.tensor([0.0]), torch.tensor([[1.0], [2.0], [0.5]]), 1)
    tensor([0.5000])
    """
    x = torch.cat((own.unsqueeze(-2), received), -2)
    _need_majority(x, f)
    return NNA(f)(x, mask=torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device), center=own)


def nna_all(x: Stack, f: int) -> Stack:
    """`nearest_neighbor_average` at each of n vectors [..., n, dim], when all see the same ones.

    >>> nna_all(torch.tensor([[0.0], [1.0], [2.0], [100.0]]), 1)[:3].flatten()
    tensor([1., 1., 1.])
    """
    _need_majority(x, f)
    return NNA(f).everyone(x, torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device))


def _need_majority(x: Stack, f: int) -> None:
    need_count("nna", "f", f, 0, "how many peers may be faulty")
    if x.shape[-2] <= 2 * f:
        raise UsageError(
            f"nna: f={f} of {x.shape[-2]} vectors; need more than 2*f (lower f, or hear more peers)"
        )


@dataclass(frozen=True)
class Reduction:
    """Measured (alpha, lambda)-reduction, each [...]: how far honest outputs still spread, and how
    far their mean moved, both in units of the honest inputs' variance."""

    alpha: Scalar
    lam: Scalar


def estimate_reduction(
    mix: Callable[[Stack], Stack],
    honest: Stack,
    byzantine: int,
    adversary: Callable[[View, Key], Stack],
    key: Key,
) -> Reduction:
    """What one call of `mix` does to honest vectors [..., honest, dim] under an adversary.

    mix: [..., n, dim] -> [..., n, dim], the honest rows first; leading axes are trials; adversary:
    an attack, which may search against `mix` through `view.rule`, or any such function.
    Source: Farhadkhani et al. 2023, definition 1.

    >>> from shoal.tensor.keyed import key_of
    >>> def beside(view, key):
    ...     return torch.full_like(view.own, 2.0)
    >>> honest = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> measured = estimate_reduction(lambda x: nna_all(x, 1), honest, 1, beside, key_of(0))
    >>> round(measured.alpha.item(), 4), round(measured.lam.item(), 4)
    (0.3333, 0.1667)
    """
    count = honest.shape[-2]

    def rule(candidate: Stack) -> Stack:
        return mix(torch.cat((honest, candidate), -2))[..., :count, :]

    own = honest[..., :1, :].expand(*honest.shape[:-2], byzantine, honest.shape[-1])
    after = rule(adversary(View(honest=honest, own=own, round=0, rule=rule), key))
    variance = _variance(honest)
    moved = (after.mean(-2) - honest.mean(-2)).square().sum(-1)
    return Reduction(_variance(after) / variance, moved / variance)


def _variance(x: Stack) -> Scalar:
    return (x - x.mean(-2, keepdim=True)).square().sum(-1).mean(-1)
