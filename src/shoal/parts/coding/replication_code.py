"""Every input to several workers, and a vote: what needs no code.

With K workers it is uncoded computing: nobody checks anybody, and what is missing is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding._answers import prepared, rounding, rows_of, sizes
from shoal.parts.coding.base import Workers
from shoal.parts.coding.decode_result import DecodeResult


@dataclass(frozen=True)
class ReplicationCode:
    """Worker i computes input i mod K; the entrywise median of the copies counts.

    Of c copies, liars fewer than c / 2 change nothing; from c / 2 on they may decide, and if they
    say the same, nobody sees it. The result is trusted where of every input two copies or more, and
    more than half of those that came, are equal but for rounding; the others are errors. An input
    of which every copy is missing gives zeros.

    >>> code = ReplicationCode(2, 6)
    >>> shares = code.encode(torch.tensor([[1.0], [2.0]], device="cpu"))
    >>> shares[3] = 50.0
    >>> result = code.decode_all(shares)
    >>> result.Y.flatten().tolist(), result.errors.nonzero().flatten().tolist()
    ([1.0, 2.0], [3])
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"K": 2, "N": 6}, {"K": 3, "N": 11}, {"K": 1, "N": 5}, {"K": 4, "N": 8}, {"K": 3, "N": 3},
    )  # fmt: skip

    K: int
    N: int

    def __post_init__(self) -> None:
        if not 1 <= self.K <= self.N:
            raise UsageError(
                f"ReplicationCode: K={self.K}, N={self.N}; need 1 <= K <= N (add workers)"
            )

    def corrects(self, missing: int = 0) -> int:
        """How many liars an input stands, if all of them, and all that are missing, have it."""
        return max(0, (self.N // self.K - missing - 1) // 2)

    def encode(self, X: Tensor) -> Tensor:
        """Shares [..., N, dim] of inputs [..., K, dim]."""
        if X.dim() < 2 or X.shape[-2] != self.K or X.is_complex():
            raise UsageError(
                f"ReplicationCode: inputs {tuple(X.shape)} of {X.dtype}; need real [..., {self.K}, "
                "dim]"
            )
        return X[..., torch.arange(self.N, device=X.device) % self.K, :].to(torch.float64)

    def decode(self, ids: Workers, V: Tensor) -> DecodeResult:
        """The results from what workers `ids` answered: V [..., len(ids), dim]."""
        return self.decode_all(*rows_of("ReplicationCode", ids, V, self.N))

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> DecodeResult:
        """The results from a row for every worker, [..., N, dim], and who answered, [..., N]."""
        alike = rounding(values.dtype)
        values, present = prepared(values, present, self.N)
        if not bool(present.any(-1).all()):
            raise UsageError(f"ReplicationCode: none of {self.N} answers are left; need 1 or more")
        # [..., copies, K, dim]; the last row of copies may be short.
        copies = -(-self.N // self.K)
        spare = copies * self.K - self.N
        lead, dim = values.shape[:-2], values.shape[-1]
        votes = torch.nn.functional.pad(values, (0, 0, 0, spare)).view(*lead, copies, self.K, dim)
        there = torch.nn.functional.pad(present, (0, spare)).view(*lead, copies, self.K)
        Y = torch.where(there.unsqueeze(-1), votes, math.nan).nanmedian(-3).values
        Y = Y.nan_to_num(0.0)
        gap, size = sizes(votes - Y.unsqueeze(-3)), sizes(Y)
        agree = there & (gap <= alike * size.unsqueeze(-2))
        whole = (agree.sum(-2) >= 2) & (2 * agree.sum(-2) > there.sum(-2))
        errors = (there & ~agree & whole.unsqueeze(-2)).flatten(-2)[..., : self.N]
        off = torch.where(agree, gap, 0.0).square().sum((-2, -1)) / agree.sum((-2, -1)).clamp(min=1)
        residual = off.sqrt() / torch.where(size > 0, size, 1.0).square().mean(-1).sqrt()
        checked = (there.sum(-2) >= 2).any(-1)
        residual = torch.where(checked, residual, math.nan)
        return DecodeResult(Y, errors, residual, whole.all(-1))
