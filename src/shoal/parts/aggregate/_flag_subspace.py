"""The subspace of the Flag Aggregator, found in the span of the rows from their Gram matrix alone.

With K = V L V^T, the columns of B = L^(1/2) V^T are the unit rows in an orthonormal basis of their
span: whatever happens there takes k x k matrices, however long the rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.tensor.stack import certain, shares
from shoal.tensor.types import Mask, Scalar

SMOOTHING = 1e-7
"""Added under each root or logarithm, so that rows wholly inside have a finite weight."""
_ALIKE = 1e-12
"""Squared distance of unit rows below which they are one row: the rest is rounding."""
_SETTLED = 1e-10
_RANK = 16 * torch.finfo(torch.float64).eps

Spread = Callable[[Tensor], tuple[Scalar, Tensor]]
"""What a basis [..., k, k] (combinations of the unit rows) costs for the coordinates that it is
spread over, and the scatter [..., k, k] of the unit rows with the weights of that cost."""


@dataclass(frozen=True)
class Likelihood:
    """What a subspace minimises: v^2 ~ Beta(alpha, beta) of each row, and of pairs' differences."""

    alpha: float
    beta: float
    exact: bool
    regulariser: float

    def term(self, inside: Tensor) -> Tensor:
        """-log likelihood, up to a constant, of shares v^2 inside; linearised unless exact."""
        least, left = inside + SMOOTHING, 1 - inside + SMOOTHING
        if self.exact:
            return (1 - self.alpha) * least.log() + (1 - self.beta) * left.log()
        return 2 * (1 - self.alpha) * least.sqrt() + 2 * (1 - self.beta) * left.sqrt()

    def weight(self, inside: Tensor) -> Tensor:
        """How fast `term` falls with v^2."""
        power = 1.0 if self.exact else 0.5
        rise = (self.alpha - 1) * (inside + SMOOTHING) ** -power
        return rise + (1 - self.beta) * (1 - inside + SMOOTHING) ** -power


@dataclass(frozen=True)
class Subspace:
    """share [..., k]: the projected mean as a combination of unit rows; values [..., k];
    basis [..., k, k]: orthonormal columns as such combinations; objective [...]."""

    share: Tensor
    values: Tensor
    basis: Tensor
    objective: Scalar


@dataclass(frozen=True)
class _Iterate:
    """bend: what the cost of spreading takes from the matrix of the next step, in the span."""

    axes: Tensor
    inside: Tensor
    between: Tensor
    bend: Tensor
    objective: Scalar


def subspace(
    gram: Tensor, here: Mask, dim: int | None, iterations: int, likelihood: Likelihood,
    spread: Spread | None = None,
) -> Subspace:  # fmt: skip
    """Iteratively reweighted least squares; the best iterate counts.

    gram: float64 [..., k, k] of unit rows, zero where a row is not `here`.
    """
    count = here.sum(-1)
    wanted = (count + 2) // 2 if dim is None else torch.full_like(count, dim)
    wanted = torch.minimum(wanted, count)
    size, vectors = torch.linalg.eigh(gram)
    size = size.clamp(min=0)
    sound = size > _RANK * size.amax(-1, keepdim=True)
    root = torch.where(sound, size, 0.0).sqrt()
    rows = root.unsqueeze(-1) * vectors.mT
    inverse = torch.where(sound, 1 / torch.where(sound, root, 1.0), 0.0)
    back = vectors * inverse.unsqueeze(-2)
    both = here.unsqueeze(-1) & here.unsqueeze(-2)
    apart = torch.where(both, 2 - 2 * gram, 0.0).clamp(min=0)
    search = _Search(rows, here, wanted, _Pairs(apart, count, likelihood), back, sound, spread)
    zero = torch.zeros_like(gram)
    best = now = search.look(here.to(torch.float64), zero, zero)
    settled = torch.zeros_like(best.objective, dtype=torch.bool)
    for _ in range(iterations):
        after = search.after(now)
        # A world that has settled stays, so that it ends alike whatever other worlds still do.
        better = ~settled & (after.objective < best.objective)
        settled = settled | ((now.objective - after.objective).abs() < _SETTLED)
        best, now = _choose(better, after, best), after
        if certain(settled):
            break
    mean = rows @ shares(here).unsqueeze(-1)
    share = (back @ (best.axes @ (best.axes.mT @ mean))).squeeze(-1)
    # A subspace that holds all rows holds their mean: exactly, not to rounding.
    whole = (wanted >= sound.sum(-1)).unsqueeze(-1)
    share = torch.where(whole, shares(here), share)
    values = best.inside.sqrt()
    return Subspace(
        torch.where(here, share, 0.0), torch.where(here, values, 0.0), back @ best.axes,
        best.objective,
    )  # fmt: skip


@dataclass(frozen=True)
class _Pairs:
    """Squared distances of the unit rows, and how often each pair counts."""

    apart: Tensor
    count: Tensor
    likelihood: Likelihood

    @property
    def portion(self) -> Tensor:
        """Of each ordered pair: lambda/(p (p - 1)), 0 for pairs that are alike."""
        ordered = (self.count * (self.count - 1)).clamp(min=1)[..., None, None]
        return torch.where(self.apart > _ALIKE, self.likelihood.regulariser / ordered, 0.0)

    def weight(self, between: Tensor) -> Tensor:
        far = self.apart > _ALIKE
        distance = torch.where(far, self.apart, 1.0)
        return self.portion * self.likelihood.weight(between) / distance


@dataclass(frozen=True)
class _Search:
    """rows: unit rows in the span's coordinates, as columns; back: from there to combinations of
    them; sound: which of these coordinates there are."""

    rows: Tensor
    here: Mask
    dim: Tensor
    pairs: _Pairs
    back: Tensor
    sound: Mask
    spread: Spread | None

    def after(self, now: _Iterate) -> _Iterate:
        """The next iterate: least squares with the weights of this one."""
        single = torch.where(self.here, self.pairs.likelihood.weight(now.inside), 0.0)
        return self.look(single, self.pairs.weight(now.between), now.bend)

    def look(self, single: Tensor, double: Tensor, bend: Tensor) -> _Iterate:
        """The subspace of these weights, and what it is worth."""
        rows, pairs = self.rows, self.pairs
        laplacian = torch.diag_embed(single + 2 * double.sum(-1)) - 2 * double
        _, vectors = torch.linalg.eigh(rows @ laplacian @ rows.mT - bend)
        place = torch.arange(rows.shape[-1], device=rows.device)
        axes = vectors * (place >= rows.shape[-1] - self.dim.unsqueeze(-1)).unsqueeze(-2)
        across = axes.mT @ rows
        inside = across.square().sum(-2).clamp(max=1)
        inner = across.mT @ across
        norm = inner.diagonal(dim1=-2, dim2=-1)
        square = norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * inner
        far = pairs.apart > _ALIKE
        between = (square / torch.where(far, pairs.apart, 1.0)).clamp(0, 1)
        cost = torch.where(self.here, pairs.likelihood.term(inside), 0.0).sum(-1)
        cost = cost + (pairs.portion * pairs.likelihood.term(between)).sum((-2, -1))
        if self.spread is not None:
            more, bend = self._bent(axes)
            cost = cost + more
        return _Iterate(axes, inside, between, bend, cost)

    def _bent(self, axes: Tensor) -> tuple[Scalar, Tensor]:
        assert self.spread is not None
        cost, scatter = self.spread(self.back @ axes)
        bend = self.back.mT @ scatter @ self.back
        # Coordinates that the rows do not span cost nothing, and must not be taken for that.
        last = 1 + bend.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        return cost, bend + torch.diag_embed(torch.where(self.sound, 0.0, last))


def _choose(first: Mask, one: _Iterate, other: _Iterate) -> _Iterate:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first.reshape(first.shape + (1,) * (a.dim() - first.dim())), a, b)

    return _Iterate(
        pick(one.axes, other.axes), pick(one.inside, other.inside),
        pick(one.between, other.between), pick(one.bend, other.bend),
        pick(one.objective, other.objective),
    )  # fmt: skip
