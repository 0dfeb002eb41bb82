"""Coded computing of polynomials, exactly: inputs on a polynomial, results on another.

Lagrange coded computing over real numbers, Yu et al. 2019 (arXiv 1806.00939), with inputs and
workers at Chebyshev nodes, where real arithmetic is best conditioned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding.dct_code import DctCode, angles, first_kind, prepared
from shoal.parts.coding.decode_result import DecodeResult


@dataclass(frozen=True)
class LagrangeCode:
    """Shares of K inputs for functions that are polynomials of `degree` in every entry.

    Exact as long as (K - 1) degree + 1 + S + 2 A <= N with S answers missing and A wrong. For any
    other function the results are those of a polynomial of that degree nearby, or nonsense.

    >>> code = LagrangeCode(3, 11, degree=2)
    >>> x = torch.tensor([[0.5], [1.0], [3.0]], device="cpu", dtype=torch.float64)
    >>> answers = code.encode(x) ** 2
    >>> answers[2] += 7.0
    >>> bool((code.decode_all(answers).Y - x**2).abs().max() < 1e-9)
    True
    """

    K: int
    N: int
    degree: int

    def __post_init__(self) -> None:
        if self.K < 1 or self.degree < 1 or self.needed > self.N:
            raise UsageError(
                f"LagrangeCode: K={self.K}, degree={self.degree}, N={self.N}; need N >= (K - 1) "
                f"degree + 1 = {self.needed} (add workers)"
            )

    @property
    def needed(self) -> int:
        """Answers without which nothing is decoded, (K - 1) degree + 1."""
        return (self.K - 1) * self.degree + 1

    def encode(self, X: Tensor) -> Tensor:
        """Shares [..., N, dim] of inputs [..., K, dim], float64."""
        if X.dim() < 2 or X.shape[-2] != self.K:
            raise UsageError(f"LagrangeCode: inputs {tuple(X.shape)}; need [..., {self.K}, dim]")
        through = torch.linalg.inv(_chebyshev(angles(self.K), self.K))
        weights = _chebyshev(angles(self.N), self.K) @ through
        return weights.to(X.device) @ X.to(torch.float64)

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> DecodeResult:
        """The results from a row for every worker, [..., N, dim], and who answered, [..., N]."""
        values, present = prepared(values, present, self.N)
        left = present.sum(-1)
        if bool((left < self.needed).any()):
            raise UsageError(
                f"LagrangeCode: {int(left.min())} of {self.N} answers are left; need {self.needed}"
            )
        if self.needed < self.N:
            found = DctCode(self.N, self.needed).locate(values, present)
        else:
            found = None
        errors = torch.zeros_like(present) if found is None else found.errors
        kept = (present & ~errors).to(torch.float64).unsqueeze(-1)
        basis = _chebyshev(angles(self.N), self.needed).to(values.device)
        coefficients = torch.linalg.pinv(kept * basis) @ (kept * values)
        Y = _chebyshev(angles(self.K), self.needed).to(values.device) @ coefficients
        if found is None:
            unchecked = torch.full_like(Y[..., 0, 0], math.nan)
            return DecodeResult(Y, errors, unchecked, ~unchecked.isinf())
        return DecodeResult(Y, errors, found.residual, found.trusted)

    def points(self) -> Tensor:
        """Where the workers are, float64 [N]."""
        return first_kind(self.N)


def _chebyshev(theta: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials of degree < count at cos(theta): [points, count]."""
    orders = torch.arange(count, device=theta.device, dtype=torch.float64)
    return torch.cos(theta[:, None] * orders)
