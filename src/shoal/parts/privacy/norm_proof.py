"""A vector of whole numbers, shared so that the holders can check its norm and learn nothing else.

The dealer shares the bits of each entry and of what is left below the bound, slack = bound^2 -
|x|^2. The holders take one random combination of b (b - 1) for every bit b and of the identity
|x|^2 + slack - bound^2, each on its own shares, add a random sharing of zero and open: any vector
that is too long, any bit that is none and any false slack makes it nonzero but for a chance of
about 1 / PRIME. Entries have too few bits for |x|^2 to pass the prime, so that nothing wraps
around. Opened is a zero, and whether the shares are a sharing at all.

After Corrigan-Gibbs and Boneh 2017 (Prio), section 4, with Shamir's shares, whose one product
needs no help of the dealer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.parts.privacy.prime_field import (
    PRIME,
    Elements,
    add,
    element,
    multiply,
    uniform,
    weighted_sum,
)
from shoal.parts.privacy.secret_sharing import Shamir, subtract
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key


@dataclass(frozen=True)
class Dealing:
    """One client's shares: bits of the entries [holders, dim, bits], of the slack [holders, more].

    As a dealer may share anything, nothing is true of them before `NormProof.check`.
    """

    bits: Elements
    slack: Elements


@dataclass(frozen=True)
class NormProof:
    """Vectors of `dim` whole numbers of norm `bound` at most, shared by `scheme` (not packed).

    >>> import torch
    >>> proof = NormProof(Shamir(5, 1), dim=3, bound=10)
    >>> good = proof.deal(np.array([6, -8, 0]), torch.tensor(1))
    >>> proof.check(good, range(5), torch.tensor(2))
    True
    """

    scheme: Shamir
    dim: int
    bound: int

    def __post_init__(self) -> None:
        if self.scheme.pack != 1 or self.scheme.holders <= 2 * self.scheme.threshold:
            raise UsageError(
                f"NormProof: holders={self.scheme.holders}, pack={self.scheme.pack}; need 2 * "
                f"threshold + 1 = {2 * self.scheme.threshold + 1} holders and pack = 1"
            )
        if self.dim < 1 or self.bound < 1 or self.dim << (2 * self.bits) >= PRIME // 2:
            raise UsageError(
                f"NormProof: dim={self.dim}, bound={self.bound}; need at least 1 of each and "
                "squared norms below 2^60 (use a coarser unit)"
            )

    @property
    def bits(self) -> int:
        """Of an entry, which lies from -2^(bits - 1) to 2^(bits - 1) - 1."""
        return (self.bound + 1).bit_length() + 1

    @property
    def slack_bits(self) -> int:
        return (self.bound**2).bit_length()

    def deal(self, numbers: NDArray[np.int64], key: Key) -> Dealing:
        """The shares of numbers [dim]; a vector that is too long is dealt too, for `check`.

        Its entries are limited to their bits, which are too many for the norm by themselves.
        """
        limit = 1 << (self.bits - 1)
        numbers = np.clip(numbers, -limit, limit - 1)
        slack = np.array([self.bound**2 - int((numbers**2).sum())])
        raised = numbers + limit
        own, left = _bits(raised, self.bits), _bits(slack, self.slack_bits)[0]
        share = self.scheme.share
        return Dealing(share(own, fold(key, "bits")), share(left, fold(key, "slack")))

    def numbers(self, dealing: Dealing) -> Elements:
        """Shares [holders, dim] of the entries."""
        powers = _powers(self.bits)
        return subtract(weighted_sum(dealing.bits, powers), np.uint64(1 << (self.bits - 1)))

    def check(self, dealing: Dealing, holders: Sequence[int], key: Key) -> bool:
        """Whether holders [present] who got these shares accept them.

        dealing: of those present alone. key: the holders' common coin, unknown to the dealer
        before. At least 2 * threshold + 1 must be present.
        """
        scheme, present = self.scheme, len(holders)
        twice = 2 * scheme.threshold
        if present <= twice:
            raise UsageError(
                f"check: {present} holders present; need 2 * threshold + 1 = {twice + 1}"
            )
        bits = np.concatenate((dealing.bits.reshape(present, -1), dealing.slack), 1)
        # What is no element does not multiply as one.
        if (bits >= PRIME).any():
            return False
        if not scheme.audit(bits, holders, fold(key, "audit")):
            return False
        weights = uniform(fold(key, "weights"), bits.shape[1] + 1)
        one = np.uint64(1)
        opened = weighted_sum(multiply(bits, subtract(bits, one)), weights[:-1])
        entries = self.numbers(dealing)
        square = _squares(entries)
        slack = weighted_sum(dealing.slack, _powers(self.slack_bits))
        left = subtract(add(square, slack), np.uint64(element(self.bound**2)))
        opened = add(opened, multiply(left, weights[-1:]))
        zero = scheme.share(np.zeros(1, np.uint64), fold(key, "zero"), degree=twice)
        opened = add(opened, zero[list(holders), 0])[:, None]
        if not scheme.consistent(opened, holders, degree=twice):
            return False
        return int(scheme.reconstruct(opened, holders, degree=twice)[0]) == 0


def _powers(bits: int) -> Elements:
    return np.array([element(1 << bit) for bit in range(bits)], np.uint64)


def _bits(numbers: NDArray[np.int64], count: int) -> Elements:
    """[*, count], lowest first; what does not fit is cut off."""
    return ((numbers[..., None] >> np.arange(count)) & 1).astype(np.uint64)


def _squares(entries: Elements) -> Elements:
    """sum_d x_d^2 of shares [holders, dim] -> [holders]."""
    ones = np.ones(entries.shape[1], np.uint64)
    return weighted_sum(multiply(entries, entries), ones)
