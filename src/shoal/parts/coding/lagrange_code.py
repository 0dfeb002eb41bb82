"""Coded computing of polynomials, exactly: inputs on a polynomial, results on another.

Lagrange coded computing over real numbers, Yu et al. 2019 (arXiv 1806.00939), with inputs and
workers at Chebyshev nodes, where real arithmetic is best conditioned. In a finite field any answers
that are enough will do; in float64 neighbours that are missing at an end cost digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding._answers import prepared, rounding, rows_of
from shoal.parts.coding.base import Workers
from shoal.parts.coding.dct_code import DctCode, angles, first_kind
from shoal.parts.coding.decode_result import DecodeResult

EXACT = 1e-9
"""How far from exact decoding may be, relative to the largest answer, to be trusted."""


@dataclass(frozen=True)
class LagrangeCode:
    """Shares of K inputs for functions that are polynomials of `degree` in every entry.

    Exact as long as (K - 1) degree + 1 + S + 2 A <= N with S answers missing and A wrong, up to
    rounding, which `amplification` multiplies. Where that is too much for float64, and where more
    lie than are corrected, the result is not trusted. noise: what answers are off such a polynomial
    (see `DctCode`), "rounding" = by that of their type; None = not known, for a function that is no
    such polynomial: results are then those of one nearby, or nonsense.

    >>> code = LagrangeCode(3, 11, degree=2)
    >>> x = torch.tensor([[0.5], [1.0], [3.0]], device="cpu", dtype=torch.float64)
    >>> answers = code.encode(x) ** 2
    >>> answers[2] += 7.0
    >>> bool((code.decode_all(answers).Y - x**2).abs().max() < 1e-9)
    True
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"K": 3, "N": 11, "degree": 2}, {"K": 5, "N": 21, "degree": 3},
        {"K": 1, "N": 4, "degree": 2}, {"K": 4, "N": 10, "degree": 3},
    )  # fmt: skip

    K: int
    N: int
    degree: int
    noise: float | Literal["rounding"] | None = "rounding"

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

    def corrects(self, missing: int = 0) -> int:
        """How many wrong answers are located when so many are missing."""
        return max(0, (self.N - self.needed - missing) // 2)

    def encode(self, X: Tensor) -> Tensor:
        """Shares [..., N, dim] of inputs [..., K, dim], float64."""
        if X.dim() < 2 or X.shape[-2] != self.K or X.is_complex():
            raise UsageError(
                f"LagrangeCode: inputs {tuple(X.shape)} of {X.dtype}; need real [..., {self.K}, "
                "dim]"
            )
        through = torch.linalg.inv(_chebyshev(angles(self.K), self.K))
        weights = _chebyshev(angles(self.N), self.K) @ through
        return weights.to(X.device) @ X.to(torch.float64)

    def decode(self, ids: Workers, V: Tensor) -> DecodeResult:
        """The results from what workers `ids` answered: V [..., len(ids), dim]."""
        return self.decode_all(*rows_of("LagrangeCode", ids, V, self.N))

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> DecodeResult:
        """The results from a row for every worker, [..., N, dim], and who answered, [..., N]."""
        noise = rounding(values.dtype) if self.noise == "rounding" else self.noise
        values, present = prepared(values, present, self.N)
        left = present.sum(-1)
        if bool((left < self.needed).any()):
            raise UsageError(
                f"LagrangeCode: {int(left.min())} of {self.N} answers are left; need {self.needed}"
            )
        errors = torch.zeros_like(present)
        residual = torch.full_like(values[..., 0, 0], math.nan)
        trusted = torch.zeros_like(errors[..., 0])
        if self.needed < self.N:
            found = DctCode(self.N, self.needed, noise).locate(values, present)
            errors, residual, trusted = found.errors, found.residual, found.trusted
        kept = present & ~errors
        weights, off = self._weights(kept)
        Y = weights @ torch.where(kept.unsqueeze(-1), values, 0.0)
        return DecodeResult(Y, errors, residual, trusted & (off <= EXACT))

    def amplification(self, present: Tensor | None = None) -> Tensor:
        """What rounding errors of answers of one size are multiplied by at most, [...].

        About 2 with all answers. With half of those missing that may be, for K = 10, degree 3 and
        N = 40: 800 at worst of 50 draws, 7e6 if they are the first ones; with all of those 7e8 and
        2e12. present: who answered and is right, bool [..., N].
        """
        if present is None:
            present = torch.ones(self.N, dtype=torch.bool, device="cpu")
        return self._weights(present)[0].abs().sum(-1).amax(-1)

    def _weights(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Of answers in results, [..., K, N], and how far from exact results are by them, [...]."""
        there = kept.to(torch.float64).unsqueeze(-1)
        basis = there * _chebyshev(angles(self.N), self.needed).to(kept.device)
        wanted = _chebyshev(angles(self.K), self.needed).to(kept.device)
        weights = (wanted @ torch.linalg.pinv(basis)) * there.mT
        off = (weights @ basis - wanted).abs().amax((-2, -1))
        eps = torch.finfo(torch.float64).eps
        return weights, off + eps * weights.abs().sum(-1).amax(-1)

    def points(self) -> Tensor:
        """Where the workers are, float64 [N]."""
        return first_kind(self.N)


def _chebyshev(theta: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials of degree < count at cos(theta): [points, count]."""
    orders = torch.arange(count, device=theta.device, dtype=torch.float64)
    return torch.cos(theta[:, None] * orders)
