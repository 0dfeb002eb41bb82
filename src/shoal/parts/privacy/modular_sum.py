"""A sum of integers modulo a power of two of which the adder sees no summand.

Every pair of clients agrees on a random mask; one adds it, the other subtracts it. Each masked
vector alone is uniform, and in the sum all masks cancel, as long as nobody is missing. This is the
algebra of secure aggregation without its key agreement and its recovery of clients that drop out.

Bonawitz et al. 2017, section 4.0.1 (Practical Secure Aggregation for Privacy-Preserving Machine
Learning).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.tensor.keyed import fold, grid
from shoal.tensor.types import Key


@dataclass(frozen=True)
class ModularSum:
    """Codes 0 to levels - 1 of `clients` clients, added modulo the least fitting power of two.

    >>> group = ModularSum(levels=16, clients=40)
    >>> group.bits
    10
    >>> codes = torch.randint(16, (40, 3))
    >>> masked = group.masked(codes, torch.tensor(7))
    >>> torch.equal(group.total(masked), codes.sum(0)), torch.equal(masked, codes)
    (True, False)
    """

    levels: int
    clients: int

    def __post_init__(self) -> None:
        if self.levels < 2 or self.clients < 1 or self.bits > 62:
            raise UsageError(
                f"ModularSum: levels={self.levels}, clients={self.clients}; need 2 levels, 1 "
                "client, and sums below 2**62"
            )

    @property
    def bits(self) -> int:
        """Bits of a masked entry, ceil(log2(clients * (levels - 1) + 1))."""
        return (self.clients * (self.levels - 1)).bit_length()

    def masked(self, codes: Tensor, key: Key) -> Tensor:
        """What the clients send: int64 [clients, dim] from codes [clients, dim].

        key: a scalar from which each pair's secret is derived; the adder must not have it.
        """
        if codes.shape[0] != self.clients or codes.min() < 0 or codes.max() >= self.levels:
            raise UsageError(
                f"ModularSum: codes {tuple(codes.shape)} from {int(codes.min())} to "
                f"{int(codes.max())}; need one row for each of {self.clients} clients and codes "
                f"from 0 to {self.levels - 1}"
            )
        total = codes.to(torch.int64, copy=True)
        for first in range(self.clients):
            others = torch.arange(first + 1, self.clients, device=codes.device)
            mask = grid(fold(key, first, others), codes.shape[1]) & self._most
            total[first] += mask.sum(0)
            total[first + 1 :] -= mask
        return total & self._most

    def total(self, masked: Tensor) -> Tensor:
        """The sum of the codes, int64 [dim]; without all clients' rows it is nothing but noise."""
        return masked.sum(0) & self._most

    @property
    def _most(self) -> int:
        return (1 << self.bits) - 1
