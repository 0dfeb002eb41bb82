"""Shamir's secret sharing of arrays: any t + 1 holders know all of it, any t of them nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.privacy.prime_field import (
    PRIME,
    Elements,
    Operand,
    add,
    lagrange,
    matmul,
    negative,
    uniform,
    weighted_sum,
)
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key


@dataclass(frozen=True)
class Shamir:
    """Shares of elements modulo 2^61 - 1 for `holders` of whom `threshold` may collude.

    A secret is a polynomial's value at 0, a holder's share its value at the holder's point, 1 to
    holders; coefficients are random up to degree `threshold`. With `pack` > 1 a polynomial holds so
    many secrets (at 0, -1, ...), shares are as many times smaller and the degree is threshold +
    pack - 1 (Franklin and Yung 1992). Shares may be added, multiplied with constants, and
    multiplied with each other once, which doubles the degree.

    Source: Shamir 1979 (How to share a secret).

    >>> import torch
    >>> scheme = Shamir(holders=5, threshold=2)
    >>> shares = scheme.share(np.uint64([7, 11]), torch.tensor(3))
    >>> scheme.reconstruct(shares[[4, 0, 2]], [4, 0, 2])
    array([ 7, 11], dtype=uint64)
    """

    holders: int
    threshold: int
    pack: int = 1

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.pack < 1 or self.holders <= self.degree:
            raise UsageError(
                f"Shamir: holders={self.holders}, threshold={self.threshold}, pack={self.pack}; "
                f"need holders > threshold + pack - 1 = {self.degree}, or nobody can reconstruct"
            )

    @property
    def degree(self) -> int:
        """Of a fresh sharing; degree + 1 shares reconstruct."""
        return self.threshold + self.pack - 1

    def share(self, secrets: Elements, key: Key, *, degree: int | None = None) -> Elements:
        """[holders, *] from secrets [*]; with pack > 1 the last axis is packed: [holders, ...,
        last / pack], padded with zeros.

        degree: more than the scheme's own, for masks of products.
        """
        degree = self.degree if degree is None else degree
        packed = self._packed(secrets)
        drawn = uniform(fold(key, "share"), self._randoms(degree) * packed[0].size)
        return self.spread(secrets, drawn, degree=degree)

    def spread(self, secrets: Elements, drawn: Elements, *, degree: int | None = None) -> Elements:
        """As `share`, from random elements that the caller has drawn, for secrets that a key of
        64 bits must not give away: (degree + 1 - pack) for each place of the packed secrets."""
        degree = self.degree if degree is None else degree
        if not self.degree <= degree < self.holders:
            raise UsageError(
                f"share: degree={degree}; need {self.degree} to {self.holders - 1}, fewer than "
                "there are holders"
            )
        packed, randoms = self._packed(secrets), self._randoms(degree)
        if drawn.size != randoms * packed[0].size:
            raise UsageError(
                f"spread: {drawn.size} random elements; need {randoms} for each of "
                f"{packed[0].size} secrets"
            )
        known = np.concatenate((packed, drawn.reshape(randoms, *packed.shape[1:])))
        return matmul(_sharing(self, degree), known)

    def _randoms(self, degree: int) -> int:
        return max(degree + 1 - self.pack, 0)

    def reconstruct(
        self, shares: Elements, holders: Sequence[int], *, degree: int | None = None,
        length: int | None = None,
    ) -> Elements:  # fmt: skip
        """The secrets from shares [present, *] of the holders named; any degree + 1 of them do.

        length: of the last axis before packing, to drop the padding. UsageError when there are too
        few, and when more than are needed do not lie on one polynomial: a share is wrong.
        """
        degree = self.degree if degree is None else degree
        if len(holders) <= degree:
            raise UsageError(
                f"reconstruct: {len(holders)} shares of a sharing of degree {degree}; need "
                f"{degree + 1}"
            )
        if not self.consistent(shares, holders, degree=degree):
            raise UsageError(
                f"reconstruct: shares of holders {list(holders)} do not lie on a polynomial of "
                f"degree {degree} (a holder or the dealer lies)"
            )
        points = self._points(holders)[: degree + 1]
        found = matmul(_lagrange(points, self._secret_points), shares[: degree + 1])
        if self.pack == 1:
            return found[0]
        joined = np.moveaxis(found, 0, -1).reshape(*found.shape[1:-1], -1)
        return joined if length is None else joined[..., :length]

    def consistent(
        self, shares: Elements, holders: Sequence[int], *, degree: int | None = None
    ) -> bool:
        """Whether shares [present, *] lie on polynomials of the degree; true of degree + 1."""
        degree = self.degree if degree is None else degree
        points = self._points(holders)
        points = points[: degree + 1], points[degree + 1 :]
        if not points[1]:
            return True
        return bool(
            (matmul(_lagrange(*points), shares[: degree + 1]) == shares[degree + 1 :]).all()
        )

    def audit(self, shares: Elements, holders: Sequence[int], key: Key) -> bool:
        """Whether a dealer's shares [present, *] are a sharing at all, without opening them.

        Holders open one random combination of all that the dealer gave them, masked by a random
        sharing. A dealer who does not know the key when dealing passes with wrong shares with
        probability 1 / PRIME.
        """
        flat = shares.reshape(len(holders), -1)
        weights = uniform(fold(key, "challenge"), flat.shape[1])
        mask = self.share(uniform(fold(key, "mask"), self.pack), fold(key, "masking"))
        opened = add(weighted_sum(flat, weights), mask.reshape(self.holders)[list(holders)])
        return self.consistent(opened[:, None], holders)

    def _points(self, holders: Sequence[int]) -> tuple[int, ...]:
        """Where holders have their values. A holder that counted twice would make any secret of
        too few shares, one before the first would hold the secret itself."""
        if len(set(holders)) < len(holders) or not set(holders) <= set(range(self.holders)):
            raise UsageError(
                f"Shamir: shares of holders {list(holders)}; need each once, 0 to "
                f"{self.holders - 1}"
            )
        return tuple(holder + 1 for holder in holders)

    @property
    def _secret_points(self) -> tuple[int, ...]:
        return tuple(range(0, -self.pack, -1))

    def _packed(self, secrets: Elements) -> Elements:
        """[pack, *]."""
        secrets = np.asarray(secrets, np.uint64)
        if secrets.size and int(secrets.max()) >= PRIME:
            raise UsageError(f"share: {int(secrets.max())} is no element (need less than {PRIME})")
        if self.pack == 1:
            return secrets[None]
        short = -secrets.shape[-1] % self.pack
        padded = np.pad(secrets, [(0, 0)] * (secrets.ndim - 1) + [(0, short)])
        return np.moveaxis(padded.reshape(*padded.shape[:-1], -1, self.pack), -1, 0)


@lru_cache(maxsize=64)
def _lagrange(known: tuple[int, ...], wanted: tuple[int, ...]) -> Elements:
    return lagrange(list(known), list(wanted))


@lru_cache(maxsize=64)
def _sharing(scheme: Shamir, degree: int) -> Elements:
    """[holders, degree + 1]: shares from the secrets and the first holders' random shares."""
    free = degree + 1 - scheme.pack
    known = (*range(0, -scheme.pack, -1), *range(1, free + 1))
    return _lagrange(known, tuple(range(1, scheme.holders + 1)))


def subtract(a: Operand, b: Operand) -> Elements:
    """a - b, entry by entry."""
    return add(a, negative(b))
