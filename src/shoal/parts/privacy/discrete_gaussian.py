"""Gaussian noise on whole numbers, drawn exactly, and what it buys, for sums over clients as well.

Noise in floating point is not the noise of the theorem: its low bits tell (Mironov 2012), and it
cannot be added up modulo a number under masks. The discrete Gaussian gives each whole number x a
chance in proportion to exp(-x^2 / (2 variance)), and hides as much as the continuous one.

Draws are exact: only whole numbers are compared, and no logarithm or exponential is ever rounded
(Canonne, Kamath and Steinke 2020, arXiv 2004.00010, algorithms 1 to 3). Compiled, since an entry
takes some tens of keyed draws, as many as it needs.

A sum of discrete Gaussians is not one, but nearly: Kairouz, Liu and Steinke 2021 (arXiv
2102.06387), whose bound is used for sums over clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.privacy.accountant import Neighbours
from shoal.tensor.types import Key

FINEST = 1 << 23
"""The variance as a fraction has a numerator of at most this, so that products fit into 64 bits."""

_GOLDEN, _MIX_1, _MIX_2 = map(np.uint64, (keyed.GOLDEN, keyed.MIX_1, keyed.MIX_2))
_30, _27, _31, _0, _1 = map(np.uint64, (30, 27, 31, 0, 1))
_FAR = np.uint64(40)


@njit(cache=True)
def _bits(stream: Any) -> Any:
    """The next 64 bits of stream [key, how many were drawn]: the key folded with the number."""
    z = (stream[0] ^ stream[1]) + _GOLDEN
    stream[1] += _1
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@njit(cache=True)
def _below(stream: Any, count: Any) -> Any:
    """Uniform among 0 .. count - 1; what would make the first of them likelier is drawn again."""
    surplus = (_0 - count) % count
    bits = _bits(stream)
    while bits < surplus:
        bits = _bits(stream)
    return bits % count


@njit(cache=True)
def _heads_exp_small(stream: Any, a: Any, b: Any) -> bool:
    """True with chance exp(-a / b), a <= b: how far a row of coins of chances a / (b k) gets."""
    k = _1
    while _below(stream, b) < a and _below(stream, k) == _0:
        k += _1
    return k % np.uint64(2) == _1


@njit(cache=True)
def _heads_exp(stream: Any, a: Any, b: Any) -> bool:
    """True with chance exp(-a / b)."""
    while a > b:
        if not _heads_exp_small(stream, _1, _1):
            return False
        a -= b
    return _heads_exp_small(stream, a, b)


@njit(cache=True)
def _draws(keys: Any, top: Any, bottom: Any, scale: Any, out: Any) -> None:
    """The discrete Gaussian of variance top / bottom, from a discrete Laplace law of that scale."""
    stream = np.zeros(2, np.uint64)
    step = bottom * scale
    below = np.uint64(2) * top * step * scale
    for i in range(keys.size):
        stream[0], stream[1] = keys[i], _0
        while True:
            near = _below(stream, scale)
            if not _heads_exp_small(stream, near, scale):
                continue
            rounds = _0
            while _heads_exp_small(stream, _1, _1):
                rounds += _1
            minus = _below(stream, np.uint64(2)) == _0
            # That far out it would be kept with a chance below exp(-700).
            if rounds >= _FAR or (minus and near == _0 and rounds == _0):
                continue
            size = near + scale * rounds
            away = size * step
            apart = away - top if away > top else top - away
            if _heads_exp(stream, apart * apart, below):
                out[i] = -np.int64(size) if minus else np.int64(size)
                break


def variance_of(deviation: float) -> tuple[int, int]:
    """The variance of draws as a fraction: that of `deviation`, rounded up.

    >>> variance_of(1.5), variance_of(0.3)
    ((4718592, 2097152), (377488, 4194304))
    """
    if not 0 < deviation <= math.sqrt(FINEST):
        raise UsageError(
            f"discrete Gaussian: deviation={deviation}; need a number above 0, at most "
            f"{math.isqrt(FINEST)} (take a coarser unit)"
        )
    square = deviation * deviation
    bottom = 1
    while bottom < 1 << 22 and math.ceil(square * bottom * 2) <= FINEST:
        bottom *= 2
    return math.ceil(square * bottom), bottom


def discrete_gaussian(key: Key, deviation: float) -> Tensor:
    """Whole numbers, int64 of the keys' shape, from the discrete Gaussian of that deviation.

    The variance is rounded up to a fraction, by less than a millionth from 0.5 on
    (`variance_of`). Drawn on the processor, wherever the keys lie. Secret as long as keys are.

    >>> from shoal.tensor.keyed import grid, key_of
    >>> discrete_gaussian(grid(key_of(1), 8), 3.0)
    tensor([-3,  0, -2, -4,  2, -3,  1, -1])
    """
    top, bottom = variance_of(deviation)
    keys = key.detach().cpu().contiguous().numpy().view(np.uint64).reshape(-1)
    out = np.empty(keys.shape, np.int64)
    scale = math.isqrt(top // bottom) + 1
    _draws(keys, np.uint64(top), np.uint64(bottom), np.uint64(scale), out)
    return torch.from_numpy(out).view(key.shape).to(key.device, non_blocking=True)


@dataclass(frozen=True)
class DiscreteGaussianRelease:
    """A sum over `clients` of vectors of whole numbers, each with noise, as the ledger counts it.

    deviation: of each client's noise, in units. sensitivity: what one client (or record) that is
    there or not moves the sum by at most, Euclidean, in units. dim: entries of the vector. Only the
    sum is seen; of one client's message take clients = 1. Clients that drop out take their noise
    with them: count those that are sure to be there.

    >>> DiscreteGaussianRelease(10.0, sensitivity=5.0).renyi(2.0)
    0.25
    >>> round(DiscreteGaussianRelease(1.0, 5.0, clients=100, dim=650).renyi(2.0), 3)
    0.264
    """

    deviation: float
    sensitivity: float
    clients: int = 1
    dim: int = 1

    neighbours: ClassVar[Neighbours] = "removed"

    def __post_init__(self) -> None:
        if self.clients < 1 or self.dim < 1 or not 0 <= self.sensitivity < math.inf:
            raise UsageError(
                f"DiscreteGaussianRelease: sensitivity={self.sensitivity}, clients={self.clients}, "
                f"dim={self.dim}; need a finite sensitivity of 0 or more, and at least 1 of each"
            )
        if self.deviation != 0:
            variance_of(self.deviation)
        if self.clients > 1 and 0 < self.deviation < 0.5:
            raise UsageError(
                f"DiscreteGaussianRelease: deviation={self.deviation}; sums are bounded from 0.5 "
                "on (take a finer unit)"
            )

    @property
    def excess(self) -> float:
        """tau: how far a sum is from a discrete Gaussian, in each entry; 0 for one client."""
        square = 2 * math.pi**2 * self.deviation**2
        return 10 * math.fsum(math.exp(-square * k / (k + 1)) for k in range(1, self.clients))

    def renyi(self, alpha: float) -> float:
        """alpha (sensitivity / (sqrt(clients) deviation) + tau sqrt(dim))^2 / 2."""
        if self.deviation == 0:
            return math.inf if self.sensitivity else 0.0
        shift = self.sensitivity / (math.sqrt(self.clients) * self.deviation)
        return alpha * (shift + self.excess * math.sqrt(self.dim)) ** 2 / 2
