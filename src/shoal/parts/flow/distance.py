"""How far two sets of samples are from each other: energy, sliced Wasserstein, Frechet."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor import keyed
from shoal.tensor.types import Key

ROWS = 1024
"""Distances are taken between so many samples and all others at once; bounds memory."""


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples [n, dim] and [m, dim]; 0 iff equal in law.

    All pairs count, a sample with itself included, so it is never negative. Source: Szekely and
    Rizzo 2013, section 2.

    >>> round(energy_distance(torch.zeros(3, 1), torch.ones(3, 1)), 6)
    2.0
    """
    _check("energy_distance", x, y)
    return 2 * _mean_apart(x, y) - _mean_apart(x, x) - _mean_apart(y, y)


def _mean_apart(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    # Differences, not products: close samples would cancel.
    parts = [
        torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist").sum()
        for part in x.split(ROWS)
    ]
    return float(torch.stack(parts).sum()) / (len(x) * len(y))


def sliced_wasserstein(x: Tensor, y: Tensor, key: Key, projections: int = 512) -> float:
    """Mean first Wasserstein distance of projections on random directions, of as many samples each.

    Source: Bonneel et al. 2015. x, y [n, dim].

    >>> x = torch.tensor([[0.0], [1.0]])
    >>> round(sliced_wasserstein(x, x + 3, keyed.key_of(1)), 6)
    3.0
    """
    _check("sliced_wasserstein", x, y)
    if len(x) != len(y) or projections < 1:
        raise UsageError(
            f"sliced_wasserstein: {len(x)} and {len(y)} samples, {projections} projections; need "
            "as many samples of both, and a projection"
        )
    lines = keyed.normal(keyed.grid(keyed.grid(key, projections), x.shape[1]), dtype=torch.float64)
    lines = lines / lines.norm(dim=-1, keepdim=True)
    first, second = ((part.double() @ lines.T).sort(0).values for part in (x, y))
    return float((first - second).abs().mean())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to features [n, dim] and [m, dim].

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). Source: Heusel et al. 2017, section 3.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> round(frechet_distance(x, 2 * x + 1), 6)
    6.0
    """
    _check("frechet_distance", x, y)
    (mean_x, cov_x), (mean_y, cov_y) = _moments(x.double()), _moments(y.double())
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # tr (A B)^(1/2) by the symmetric matrix of the same eigenvalues.
    both = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    apart = (mean_x - mean_y).square().sum()
    return float(apart + cov_x.trace() + cov_y.trace() - 2 * both)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - 1)


def _check(name: str, x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise UsageError(
            f"{name}: {tuple(x.shape)} and {tuple(y.shape)}; need two tables of at least two "
            "samples each, of one width"
        )
