"""The Flag Aggregator: the mean gradient direction within the subspace that most rows agree on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate._flag_subspace import SMOOTHING, Likelihood, Spread, subspace
from shoal.parts.aggregate.base import need_count, same_for_all
from shoal.tensor.stack import or_center, usable
from shoal.tensor.types import Mask, Scalar, Stack, Vector, Weight

_CHUNK = 1 << 18
"""Numbers converted to float64 at a time; a constant."""


@dataclass(frozen=True)
class FlagResult:
    """What an aggregation found out.

    update: [..., dim]; values: [..., k] in [0, 1], how much of each row's direction lies in the
    subspace (0 for rows that do not count), a quality report of the senders; basis: [..., k, k],
    the subspace's orthonormal basis as combinations of the unit rows, one column each, other
    columns zero; objective: [...], what the subspace minimises.
    """

    update: Vector
    values: Tensor
    basis: Tensor
    objective: Scalar


@dataclass(frozen=True)
class Flag:
    """Rows scaled to length 1, projected on the subspace that reconstructs them best, averaged.

    x: [..., k, dim]; weights are ignored; rows that are not finite are absent, and so are rows of
    zeros, which have no direction. With `dim=None` the subspace of p rows has ceil((p + 1)/2)
    dimensions. Of each unit row, v^2 is the share inside; v^2 ~ Beta(alpha, beta) makes the
    subspace a maximum likelihood estimate, found by `iterations` reweighted least squares from the
    equally weighted start (principal components without centring: `iterations=0`), the best one
    kept. With the logarithm linearised as in the source the default minimises the sum of sines,
    sqrt(1 - v^2); `exact=True` keeps the logarithm. `regulariser` (lambda) times the mean over
    ordered pairs of the sines of their differences keeps what tells rows apart inside.

    `sparsity` adds an L1 norm of the subspace Y: times the sum over coordinates of the lengths of
    Y's rows, over the root of their number, so that directions which few coordinates carry are
    preferred. Rows' lengths, and not the entries, since these change with the basis that is taken
    of the same subspace. Only subspaces of the rows' span are compared, and one more pass over the
    rows is made per iteration. The update then no longer turns with the space.

    The update is no longer than 1 whatever arrives: choose the learning rate for that, or
    `rescale="median_norm"` to give it the median length of the rows. There is no proven bound on
    the distance to the honest mean. Breaks when faulty rows that are alike hold more than their
    share, 1/dim, of the weight: they own a direction, and `detail(...).values` shows it as values
    near 1; and always when half of the rows are faulty.
    Source: Almasi et al. 2024, sections 2 and 3 (arXiv 2302.05865). All work beside one pass over
    the rows each way is on k x k matrices in float64.

    >>> x = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    >>> update = Flag(dim=1, iterations=1)(x, mask=torch.ones(3, dtype=torch.bool))
    >>> round(float(update[0]), 4)
    0.6667
    """

    dim: int | None = None
    regulariser: float = 0.0
    iterations: int = 5
    alpha: float = 1.0
    beta: float = 0.5
    exact: bool = False
    rescale: str | None = None
    sparsity: float = 0.0

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"rescale": "median_norm", "regulariser": 4.0},
        {"dim": 3, "alpha": 1.5, "beta": 0.3, "exact": True, "iterations": 3},
        {"sparsity": 2.0, "iterations": 3},
    )
    centered: ClassVar[bool] = False
    translation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dim is not None:
            need_count("flag", "dim", self.dim, 1, "dimensions; None takes (rows + 1)/2")
        need_count("flag", "iterations", self.iterations, 0, "5 is usual")
        for name in ("regulariser", "sparsity"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(
                    f"flag: {name}={getattr(self, name)!r}; need a finite number >= 0 (0 = none)"
                )
        if not (1 <= self.alpha < float("inf") and 0 < self.beta <= 1) or (
            self.alpha == 1 and self.beta == 1
        ):
            raise UsageError(
                f"flag: alpha={self.alpha!r}, beta={self.beta!r}; need alpha >= 1 and 0 < beta <= "
                "1, not both 1 (1 and 0.5 are usual)"
            )
        if self.rescale not in (None, "median_norm"):
            raise UsageError(
                f"flag: rescale={self.rescale!r}; need None or 'median_norm' (None keeps length 1)"
            )

    @property
    def keeps_length(self) -> bool:
        """Whether the result is in units of the rows, not of directions."""
        return self.rescale is not None

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        return or_center(self._detail(x, rows).update, rows.any(-1), center)

    def detail(self, x: Stack, mask: Mask) -> FlagResult:
        """The update with the report on the senders."""
        return self._detail(*usable(x, mask))

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def tolerates(self, rows: int) -> int:
        """Nothing is proven about the distance to the mean."""
        return 0

    def kappa(self, rows: int) -> float:
        return float("inf")

    def breaks_at(self, rows: int) -> int | None:
        """A direction is no longer than 1; with `rescale`, half of the rows set the length, too."""
        return None if self.rescale is None else (rows + 1) // 2

    def _detail(self, x: Stack, rows: Mask) -> FlagResult:
        if not x.shape[-2] or not x.shape[-1]:
            none = x.new_zeros(rows.shape, dtype=torch.float64)
            square = none.unsqueeze(-1) * none.unsqueeze(-2)
            return FlagResult(x.sum(-2), none, square, none.sum(-1))
        top = x.abs().amax(-1).to(torch.float64)
        here = rows & (top >= torch.finfo(torch.float64).tiny)
        top = torch.where(here, top, 1.0)
        gram = torch.zeros((*rows.shape, rows.shape[-1]), dtype=torch.float64, device=x.device)
        for part, _ in _scaled(x, top, here):
            gram += part @ part.mT
        length = torch.where(here, gram.diagonal(dim1=-2, dim2=-1).sqrt(), 1.0)
        gram = gram / (length.unsqueeze(-1) * length.unsqueeze(-2))
        likelihood = Likelihood(self.alpha, self.beta, self.exact, self.regulariser)
        spread = self._spread(x, top, here, length) if self.sparsity else None
        found = subspace(gram, here, self.dim, self.iterations, likelihood, spread)
        share = found.share / length
        if self.rescale is not None:
            share = share * _median_length(torch.where(here, length * top, 0.0), rows)
        update = torch.zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float64, device=x.device)
        for part, place in _scaled(x, top, here):
            update[..., place] = (share.unsqueeze(-2) @ part).squeeze(-2)
        return FlagResult(update.to(x.dtype), found.values, found.basis, found.objective)

    def _spread(self, x: Stack, top: Tensor, here: Mask, length: Tensor) -> Spread:
        factor = self.sparsity / math.sqrt(x.shape[-1])

        def spread(basis: Tensor) -> tuple[Scalar, Tensor]:
            scatter, cost = torch.zeros_like(basis), torch.zeros_like(basis[..., 0, 0])
            for part, _ in _scaled(x, top, here):
                unit = part / length.unsqueeze(-1)
                root = ((basis.mT @ unit).square().sum(-2) + SMOOTHING).sqrt()
                cost += factor * root.sum(-1)
                scatter += (unit * (0.5 * factor / root).unsqueeze(-2)) @ unit.mT
            return cost, scatter

        return spread


def _scaled(x: Stack, top: Tensor, here: Mask) -> Iterator[tuple[Stack, slice]]:
    """Rows over their largest entries in float64, some coordinates at a time: no square overflows.

    Rows that are not here are zeros.
    """
    width = max(64, _CHUNK * x.shape[-1] // max(1, x.numel()))
    scale = (here / top).unsqueeze(-1)
    for start in range(0, x.shape[-1], width):
        place = slice(start, start + width)
        yield x[..., place].to(torch.float64) * scale, place


def _median_length(length: Tensor, rows: Mask) -> Tensor:
    """Median length of the rows, [..., 1]; rows of zeros have length 0 and count."""
    order = torch.where(rows, length, float("inf")).sort(-1).values
    count = rows.sum(-1, keepdim=True)
    low = order.take_along_dim(((count - 1) // 2).clamp(min=0), -1)
    high = order.take_along_dim((count // 2).clamp(max=length.shape[-1] - 1), -1)
    return torch.where(count > 0, low + 0.5 * (high - low), 0.0)
