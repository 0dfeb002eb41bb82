"""The code of smooth functions at Chebyshev nodes: whose value does not fit is found and left out.

Samples of a smooth function at the nodes cos((2i + 1) pi / (2 N)) are nearly a codeword of the
discrete cosine transform: coefficients beyond `dimension` vanish, up to the precision noise. A
wrong sample shows in all of them, and as sin(m theta_i) is, but for a factor, a polynomial in the
node, wrong samples are found as in a Reed-Solomon code, with real numbers.

The paper's section on error location (arXiv 2507.01330); polynomials are kept in the Chebyshev
basis, as powers of the node are ill-conditioned beyond 8 errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding._answers import prepared, typical

ABSURD = 1e8
"""A sample that is so many times the typical one is wrong, whatever the code says."""
ROUNDING = 1e-13
"""What does not fit relative to the samples, and is rounding alone."""
STANDS_OUT = 8.0
"""By how much one error more must lessen the mean square of what does not fit (per degree of
freedom) to be believed, when the precision noise is not known."""
UNLIKELY = 0.3
"""Nor is what does not fit by so much believed to be precision noise then."""
NOISE_MARGIN = 2.0
"""What does not fit may be this many times the stated noise before an error is suspected."""


@dataclass(frozen=True)
class Located:
    """errors: who is wrong, bool [..., nodes]. residual: what still does not fit, root mean square
    relative to the samples, [...]. trusted: whether that is as small as it should be, bool [...].
    """

    errors: Tensor
    residual: Tensor
    trusted: Tensor


@dataclass(frozen=True)
class DctCode:
    """Codewords are polynomials of degree < dimension at `nodes` Chebyshev nodes of the first kind.

    Of a codeword with S samples missing, floor((nodes - dimension - S) / 2) wrong ones are found,
    whatever they hold. With one more the rest may look like a codeword, and is then trusted: once
    in 20 times for a smooth function and random lies, where the noise is not known.

    noise: what samples are off such a polynomial, root mean square of the parity checks relative to
    that of the samples; None = not known, in which case the number of errors is where what does not
    fit falls most. exchange: whether each error that the locator names is exchanged once for the
    node that explains most; without it noise moves errors to neighbouring nodes. It assumes that
    errors are above the noise.

    >>> code = DctCode(15, 5)
    >>> values = code.points()[:, None] ** torch.arange(3, device="cpu")
    >>> values[7] += 1.0
    >>> code.locate(values).errors.nonzero().flatten().tolist()
    [7]
    """

    nodes: int
    dimension: int
    noise: float | None = None
    exchange: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.dimension < self.nodes:
            raise UsageError(
                f"DctCode: dimension={self.dimension} of {self.nodes} nodes; need 1 to "
                f"{self.nodes - 1} (with all of them nothing checks the samples)"
            )
        if self.noise is not None and not (math.isfinite(self.noise) and self.noise >= 0):
            raise UsageError(f"DctCode: noise={self.noise}; need a finite number >= 0, or None")

    @property
    def checks(self) -> int:
        """How many coefficients should vanish."""
        return self.nodes - self.dimension

    def correctable(self, missing: int = 0) -> int:
        """How many wrong samples are found when so many are missing."""
        return max(0, (self.checks - missing) // 2)

    def points(self) -> Tensor:
        """The nodes, float64 [nodes], from the largest to the smallest."""
        return first_kind(self.nodes)

    def syndrome(self, values: Tensor) -> Tensor:
        """What should vanish, [..., checks, dim], of samples [..., nodes, dim]."""
        return transform(self.nodes).to(values.device)[self.dimension :] @ values.to(torch.float64)

    def locate(
        self, values: Tensor, present: Tensor | None = None, max_errors: int | None = None
    ) -> Located:
        """Who is wrong, from samples [..., nodes, dim]; all entries have the same culprits.

        present: bool [..., nodes]; samples that are missing may hold anything. max_errors: at most
        so many are looked for (None = as many as the code finds).
        """
        values, present = prepared(values, present, self.nodes)
        lead = values.shape[:-2]
        rows, there = values.reshape(-1, *values.shape[-2:]), present.reshape(-1, self.nodes)
        # What is so large would drown the others in its own rounding.
        scale = typical(rows, there)[:, None]
        peak = torch.linalg.vector_norm(rows, math.inf, dim=-1)
        absurd = (peak > ABSURD * scale) & (scale > 0)
        if bool(absurd.any()):
            there = there & ~absurd
            rows = torch.where(there.unsqueeze(-1), rows, 0.0)
        errors = absurd
        residual = rows.new_full(there.shape[:1], math.nan)
        trusted = torch.zeros_like(there[:, 0])
        missing = self.nodes - there.sum(-1)
        for count in missing.unique().tolist():
            chosen = (missing == count).nonzero().flatten()
            most = self.correctable(count)
            if max_errors is not None:
                most = min(most, max_errors)
            if count <= self.checks - 1:
                found = self._locate(rows[chosen], there[chosen], count, most)
                errors[chosen] |= found[0]
                residual[chosen], trusted[chosen] = found[1:]
        shape = (*lead, self.nodes)
        return Located(errors.reshape(shape), residual.reshape(lead), trusted.reshape(lead))

    def _locate(
        self, values: Tensor, present: Tensor, missing: int, most: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`locate` for [rows, nodes, dim], each with `missing` samples away."""
        scale = typical(values, present)
        scale = torch.where(scale > 0, scale, 1.0)
        # Entries share their culprits, so that a rotation of the entries changes nothing: as many
        # of them as there are checks hold all that can be known.
        rows = transform(self.nodes).to(values.device)[self.dimension :]
        full = compact(rows / scale[:, None, None] @ values)
        weight = self._weights(values)
        sigma = forget(top_rows(full, self.nodes), ~present, missing, self.nodes)
        full = weight * full
        entries = math.sqrt(values.shape[-1])
        columns = weight * rows
        candidates, misfits = [torch.zeros_like(present)], []
        for count in range(1, most + 1):
            score = locator(sigma, count, self.nodes)
            score = torch.where(present, score, math.inf)
            worst = score.topk(count, -1, largest=False).indices
            errors = torch.zeros_like(present).scatter(-1, worst, True)
            if self.exchange:
                errors = exchanged(full, columns, errors, ~present, missing + count)
            candidates.append(errors)
        for count, errors in enumerate(candidates):
            # Root mean square per degree of freedom, after the best values for what is unknown.
            free = self.checks - missing - count
            left = unexplained(full, columns, errors | ~present, missing + count)
            misfits.append(left / (entries * math.sqrt(free)))
        misfit = torch.stack(misfits, -1)
        count = self._count(misfit)
        each = torch.arange(len(count), device=count.device)
        residual = misfit[each, count]
        limit = self._limit(misfit)
        return torch.stack(candidates, 1)[each, count], residual, residual <= limit

    def _weights(self, like: Tensor) -> Tensor:
        """Of the checks in least squares, [checks, 1], mean square 1.

        Precision noise falls with the order, like its square where a function has kinks and faster
        where not; a wrong sample is as large in all checks.
        """
        orders = torch.arange(self.dimension, self.nodes, device=like.device, dtype=like.dtype)
        weights = orders.square()
        return (weights / weights.square().mean().sqrt()).unsqueeze(-1)

    def _limit(self, misfit: Tensor) -> Tensor:
        """What may be left, [rows]."""
        if self.noise is not None:
            return torch.full_like(misfit[:, 0], max(NOISE_MARGIN * self.noise, ROUNDING))
        return torch.full_like(misfit[:, 0], UNLIKELY)

    def _count(self, misfit: Tensor) -> Tensor:
        """How many errors explain what does not fit: [rows] from misfits [rows, counts]."""
        if self.noise is not None:
            good = misfit <= self._limit(misfit)[:, None]
            # The first that is good enough; the best of all if none is.
            first = good.to(torch.int64).argmax(-1)
            return torch.where(good.any(-1), first, misfit.argmin(-1))
        count = torch.zeros_like(misfit[:, 0], dtype=torch.int64)
        for more in range(1, misfit.shape[-1]):
            fall = misfit[:, more - 1] > math.sqrt(STANDS_OUT) * misfit[:, more]
            count = torch.where(fall & (misfit[:, more - 1] > ROUNDING), more, count)
        return count


def first_kind(count: int) -> Tensor:
    """Chebyshev nodes of the first kind, cos((2i + 1) pi / (2 count)), float64 [count]."""
    return torch.cos(angles(count))


@lru_cache(maxsize=64)
def angles(count: int) -> Tensor:
    """Their angles, float64 [count]."""
    return (2 * torch.arange(count, device="cpu", dtype=torch.float64) + 1) * (
        math.pi / (2 * count)
    )


@lru_cache(maxsize=64)
def transform(count: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II), float64 [count, count]."""
    orders = torch.arange(count, device="cpu", dtype=torch.float64)
    rows = math.sqrt(2.0 / count) * torch.cos(orders[:, None] * angles(count))
    rows[0] *= math.sqrt(0.5)
    return rows


def compact(syndrome: Tensor) -> Tensor:
    """As many entries as there are checks, with equal inner products: [rows, checks, <= checks]."""
    if syndrome.shape[-1] <= syndrome.shape[-2]:
        return syndrome
    return torch.linalg.qr(syndrome.mT, mode="r").R.mT


def top_rows(syndrome: Tensor, nodes: int) -> Tensor:
    """sigma_m = sum_i (-1)^i V_i sin(m theta_i) for m = 1, 2, ..: [rows, checks, dim]."""
    return syndrome.flip(-2) * math.sqrt(nodes / 2)


def times_x(sigma: Tensor) -> Tensor:
    """The sequence of samples that were multiplied by their nodes; one shorter."""
    before = torch.cat([torch.zeros_like(sigma[:, :1]), sigma[:, :-2]], 1)
    return (sigma[:, 1:] + before) / 2


def forget(sigma: Tensor, absent: Tensor, count: int, nodes: int) -> Tensor:
    """The sequence without what `count` absent nodes do to it; as many shorter."""
    points = first_kind(nodes).to(sigma.device)
    who = absent.to(torch.int8).topk(count, -1).indices if count else absent[:, :0].long()
    for place in range(count):
        node = points[who[:, place], None, None]
        sigma = times_x(sigma) - node * sigma[:, :-1]
    return sigma


def locator(sigma: Tensor, count: int, nodes: int) -> Tensor:
    """|Lambda| at every node, [rows, nodes]: of the polynomials of degree `count`, the one that
    silences the sequence [rows, length, dim] best; its zeros are the errors."""
    length = sigma.shape[1]
    zero = torch.zeros_like(sigma[:, :1])
    odd = torch.cat([-sigma.flip(1), zero, sigma], 1)  # the place of m is m + length
    m = torch.arange(1, length - count + 1, device=sigma.device)
    k = torch.arange(count + 1, device=sigma.device)
    plus, minus = (m[:, None] + k) + length, (m[:, None] - k) + length
    # T_k(x) sigma = (sigma_{m+k} + sigma_{m-k}) / 2, all entries below each other.
    products = (odd[:, plus] + odd[:, minus]) / 2
    stacked = products.permute(0, 1, 3, 2).flatten(1, 2)
    if stacked.shape[1] > count + 1:
        stacked = torch.linalg.qr(stacked, mode="r").R
    # Fewer rows than columns: the null vector is in the full decomposition only.
    weights = torch.linalg.svd(stacked, full_matrices=True).Vh[:, -1]
    basis = torch.cos(k[:, None] * angles(nodes).to(sigma.device))
    return (weights @ basis).abs()


def exchanged(
    syndrome: Tensor, columns: Tensor, errors: Tensor, absent: Tensor, count: int
) -> Tensor:
    """The errors, each exchanged for the node that explains most, given all others: [rows, nodes].

    Noise moves a zero of the locator to a neighbouring node; least squares over all checks tells
    them apart. count: of errors and absent nodes together.
    """
    wrong = count - int(absent[0].sum())
    order = errors.to(torch.int8).topk(wrong, -1).indices
    for place in range(wrong):
        others = (errors | absent).scatter(-1, order[:, place : place + 1], False)
        rest, free = syndrome, columns.expand(len(syndrome), *columns.shape)
        if count > 1:
            basis = spanned(columns, others, count - 1)
            rest, free = (each - basis @ (basis.mT @ each) for each in (rest, free))
        size = free.square().sum(1)
        gain = (free.mT @ rest).square().sum(-1) / size.clamp(min=1e-9)
        best = torch.where(others, -math.inf, gain).argmax(-1, keepdim=True)
        errors = (others & ~absent).scatter(-1, best, True)
    return errors


def spanned(columns: Tensor, nodes: Tensor, count: int) -> Tensor:
    """An orthonormal basis [rows, checks, count] of the columns of the marked nodes."""
    who = nodes.to(torch.int8).topk(count, -1).indices
    return torch.linalg.qr(columns.T[who].mT).Q


def unexplained(syndrome: Tensor, columns: Tensor, unknown: Tensor, count: int) -> Tensor:
    """Norm of what no values at `count` unknown nodes explain, [rows]; columns: [checks, nodes]."""
    if not count:
        return syndrome.flatten(1).norm(dim=-1)
    basis = spanned(columns, unknown, count)
    return (syndrome - basis @ (basis.mT @ syndrome)).flatten(1).norm(dim=-1)
