"""Every input to several workers, and a vote: what needs no code.

With K workers it is uncoded computing: nobody checks anybody, and what is missing is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding.dct_code import prepared
from shoal.parts.coding.decode_result import DecodeResult


@dataclass(frozen=True)
class ReplicationCode:
    """Worker i computes input i mod K; the entrywise median of the copies counts.

    Of c copies, liars fewer than c / 2 change nothing; from c / 2 on they may decide. An input of
    which every copy is missing gives zeros, and the result is not trusted.

    >>> code = ReplicationCode(2, 6)
    >>> shares = code.encode(torch.tensor([[1.0], [2.0]], device="cpu"))
    >>> shares[3] = 50.0
    >>> code.decode_all(shares).Y.flatten().tolist()
    [1.0, 2.0]
    """

    K: int
    N: int

    def __post_init__(self) -> None:
        if not 1 <= self.K <= self.N:
            raise UsageError(
                f"ReplicationCode: K={self.K}, N={self.N}; need 1 <= K <= N (add workers)"
            )

    def encode(self, X: Tensor) -> Tensor:
        """Shares [..., N, dim] of inputs [..., K, dim]."""
        if X.dim() < 2 or X.shape[-2] != self.K:
            raise UsageError(f"ReplicationCode: inputs {tuple(X.shape)}; need [..., {self.K}, dim]")
        return X[..., torch.arange(self.N, device=X.device) % self.K, :].to(torch.float64)

    def decode_all(self, values: Tensor, present: Tensor | None = None) -> DecodeResult:
        """The results from a row for every worker, [..., N, dim], and who answered, [..., N]."""
        values, present = prepared(values, present, self.N)
        voted = []
        for item in range(self.K):
            copies = torch.where(present.unsqueeze(-1), values, math.nan)[..., item :: self.K, :]
            voted.append(copies.nanmedian(-2).values)
        Y = torch.stack(voted, -2)
        whole = ~Y.isnan().any(-1).any(-1)
        unchecked = torch.full_like(Y[..., 0, 0], math.nan)
        return DecodeResult(Y.nan_to_num(0.0), torch.zeros_like(present), unchecked, whole)
