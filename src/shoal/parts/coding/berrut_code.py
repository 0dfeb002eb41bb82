"""Coded computing of any smooth function, with Berrut's rational interpolant.

K inputs are mixed into N shares, the values of a curve that runs through the inputs; workers apply
the function to their shares, and the results are samples of another curve, which is interpolated
where the inputs were. Missing results only make the interpolation coarser. With nodes of the first
kind wrong results are found (`DctCode`) and left out.

BACC: Jahani-Nezhad and Maddah-Ali 2022 (arXiv 2009.08327); securing it: arXiv 2507.01330.
Interpolant: Berrut 1988.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding._answers import prepared, rows_of
from shoal.parts.coding.base import Workers
from shoal.parts.coding.dct_code import DctCode, first_kind
from shoal.parts.coding.decode_result import DecodeResult

Nodes = Literal["chebyshev1", "chebyshev2"]
TOUCHING = 1e-12
"""Nodes that are closer than this are one."""
GROUPS = 5
"""Into how many groups workers are dealt when nobody knows who lies; 2 bad groups do not matter."""


@dataclass(frozen=True)
class BerrutCode:
    """N shares of K inputs for any smooth function; see the module's text.

    nodes: "chebyshev1", which lets wrong results be found, or "chebyshev2" (BACC), which does not.
    code_dim: of the DCT code, K to N - 1: larger means less precision noise and fewer errors that
    can be found; "auto" is (K + N + 1) // 2 (`code_dimension` looks for the best by simulation);
    None = wrong results are not looked for. noise, exchange: see `DctCode`.

    Shares are no secret: each is nearly a mix of two or three inputs. Shapes: inputs [..., K, dim],
    shares [..., N, dim]; leading axes are independent tasks. Arithmetic is float64.

    >>> code = BerrutCode(3, 15)
    >>> x = torch.tensor([[0.0], [1.0], [3.0]], device="cpu", dtype=torch.float64)
    >>> answers = code.encode(x).sin()
    >>> answers[4] = 100.0
    >>> result = code.decode(range(15), answers)
    >>> result.errors.nonzero().flatten().tolist(), bool((result.Y - x.sin()).abs().max() < 0.1)
    ([4], True)
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"K": 3, "N": 15}, {"K": 5, "N": 31, "code_dim": 15}, {"K": 2, "N": 12, "noise": 0.05},
        {"K": 3, "N": 12, "nodes": "chebyshev2"}, {"K": 4, "N": 4},
    )  # fmt: skip

    K: int
    N: int
    nodes: Nodes = "chebyshev1"
    code_dim: int | Literal["auto"] | None = "auto"
    noise: float | None = None
    exchange: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.K <= self.N:
            raise UsageError(f"BerrutCode: K={self.K}, N={self.N}; need 1 <= K <= N (add workers)")
        if self.nodes not in ("chebyshev1", "chebyshev2"):
            raise UsageError(f"BerrutCode: nodes={self.nodes!r}; need 'chebyshev1' or 'chebyshev2'")
        given = self.code_dim
        if given not in ("auto", None) and not self.K <= given < self.N:
            raise UsageError(
                f"BerrutCode: code_dim={given}; need {self.K} to {self.N - 1} (K to N - 1)"
            )
        if self.nodes == "chebyshev2" and given not in ("auto", None):
            raise UsageError(
                "BerrutCode: nodes of the second kind make no DCT code (leave code_dim out)"
            )

    @property
    def dct(self) -> DctCode | None:
        """The code that finds wrong results, if there is one."""
        if self.nodes == "chebyshev2" or self.code_dim is None or self.N == self.K:
            return None
        dim = (self.K + self.N + 1) // 2 if self.code_dim == "auto" else self.code_dim
        return DctCode(self.N, min(dim, self.N - 1), self.noise, self.exchange)

    def inputs_at(self) -> Tensor:
        """Where the curve runs through the inputs, float64 [K]."""
        return first_kind(self.K)

    def workers_at(self) -> Tensor:
        """Where the shares are, float64 [N]."""
        if self.nodes == "chebyshev1":
            return first_kind(self.N)
        places = torch.arange(self.N, device="cpu", dtype=torch.float64)
        return torch.cos(places * (math.pi / self.N))

    def encode(self, X: Tensor) -> Tensor:
        """Shares [..., N, dim] of inputs [..., K, dim]; one that meets an input is that input."""
        if X.dim() < 2 or X.shape[-2] != self.K or X.is_complex():
            raise UsageError(
                f"BerrutCode: inputs {tuple(X.shape)} of {X.dtype}; need real [..., {self.K}, dim]"
            )
        everybody = torch.ones(self.K, dtype=torch.bool, device=X.device)
        weights = berrut_weights(self.workers_at(), self.inputs_at(), everybody)
        return weights @ X.to(torch.float64)

    def corrects(self, missing: int = 0) -> int:
        """How many wrong answers above the precision noise are located, so many missing."""
        return 0 if self.dct is None else self.dct.correctable(missing)

    def decode(self, ids: Workers, V: Tensor, max_errors: int | None = None) -> DecodeResult:
        """The results from what workers `ids` answered: V [..., len(ids), dim].

        Where something was checked and the result is not trusted, it is a median over groups of
        workers. Answers that are no real numbers count as missing. max_errors: look for at most so
        many; with 0 nothing is checked. UsageError when fewer than 2 answers are left.
        """
        values, present = rows_of("BerrutCode", ids, V, self.N)
        return self.decode_all(values, present, max_errors)

    def decode_all(
        self, values: Tensor, present: Tensor | None = None, max_errors: int | None = None
    ) -> DecodeResult:
        """The same from a row for every worker, [..., N, dim], and who answered, bool [..., N]."""
        values, present = prepared(values, present, self.N)
        survivors = present.sum(-1)
        if bool((survivors < 2).any()):
            raise UsageError(
                f"BerrutCode: {int(survivors.min())} of {self.N} answers are left; need 2 or more"
            )
        code = self.dct
        if code is None or max_errors == 0:
            unchecked = torch.full_like(values[..., 0, 0], math.nan)
            Y = self.interpolate(values, present)
            return DecodeResult(
                Y, torch.zeros_like(present), unchecked, torch.zeros_like(unchecked).bool()
            )
        found = code.locate(values, present, max_errors)
        Y = self.interpolate(values, present & ~found.errors)
        # Where nothing could be checked there is no reason to doubt one more than another.
        doubtful = ~found.trusted & ~found.residual.isnan()
        if bool(doubtful.any()):
            robust = self.median_of_groups(values, present)
            Y = torch.where(doubtful[..., None, None], robust, Y)
        return DecodeResult(Y, found.errors, found.residual, found.trusted)

    def interpolate(self, values: Tensor, present: Tensor) -> Tensor:
        """Plain decoding (BACC): [..., K, dim] from [..., N, dim] and who counts."""
        weights = berrut_weights(self.inputs_at(), self.workers_at(), present)
        # Nothing times nothing is nothing, but for what is no number.
        if not bool(present.all()):
            values = torch.where(present.unsqueeze(-1), values, 0.0)
        return weights @ values

    def corrected(self, values: Tensor, errors: Tensor, present: Tensor | None = None) -> Tensor:
        """The samples [..., N, dim] with wrong ones replaced by what the code says they should be.

        Least squares over all parity checks; the other way to use located errors, beside leaving
        them out. Missing samples are replaced, too.
        """
        code = self.dct
        if code is None:
            raise UsageError("BerrutCode: no DCT code, so that nothing tells the right values")
        values, present = prepared(values, present, self.N)
        unknown = (errors | ~present).to(torch.float64)
        checks = code.syndrome(torch.eye(self.N, device=values.device, dtype=torch.float64))
        among = checks * unknown.unsqueeze(-2)
        return values - torch.linalg.pinv(among) @ code.syndrome(values)

    def median_of_groups(self, values: Tensor, present: Tensor) -> Tensor:
        """The entrywise median of decodings that leave out all but every fifth worker."""
        groups = max(1, min(GROUPS, self.N // max(2, self.K)))
        place = torch.arange(self.N, device=values.device) % groups
        answers = []
        for group in range(groups):
            kept = present & (place == group)
            answers.append(self.interpolate(values, kept))
        stacked = torch.stack(answers)
        empty = torch.stack([(present & (place == g)).sum(-1) == 0 for g in range(groups)])
        return torch.where(empty[..., None, None], math.nan, stacked).nanmedian(0).values


def berrut_weights(at: Tensor, nodes: Tensor, present: Tensor) -> Tensor:
    """Weights [..., points, nodes] of Berrut's interpolant at points from the present nodes.

    They sum to 1. Signs alternate over the nodes that are present, which keeps it free of poles.
    A point on a present node takes its value. present: bool [..., nodes].
    """
    at, nodes = at.to(present.device), nodes.to(present.device)
    sign = 1.0 - 2.0 * ((present.cumsum(-1) - 1) % 2).to(torch.float64)
    gap = at[:, None] - nodes
    touching = (gap.abs() < TOUCHING) & present.unsqueeze(-2)
    raw = torch.where(present, sign, 0.0).unsqueeze(-2) / torch.where(gap.abs() < TOUCHING, 1, gap)
    # An absent node at the very point must not count.
    raw = torch.where(present.unsqueeze(-2), raw, 0.0)
    raw = torch.where(touching.any(-1, keepdim=True), touching.to(torch.float64), raw)
    return raw / raw.sum(-1, keepdim=True)
