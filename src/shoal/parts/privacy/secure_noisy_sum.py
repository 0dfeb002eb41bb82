"""A noisy sum of bounded vectors without anybody who is trusted (the + of DP-BREM+).

Clients round their vectors to whole units and share them with a proof of their norm; shares of
jointly made noise are added to the shares of all accepted vectors, and only that sum is opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.parts.privacy.joint_noise import JointNoise
from shoal.parts.privacy.norm_proof import Dealing, NormProof
from shoal.parts.privacy.prime_field import PRIME, Elements, add, decode
from shoal.parts.privacy.secret_sharing import Shamir
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key

NOISE = JointNoise()
"""12 draws of 12 bits."""


@dataclass(frozen=True)
class Opened:
    """total float64 [dim]: accepted vectors and noise; accepted bool [clients]."""

    total: NDArray[np.float64]
    accepted: NDArray[np.bool_]

    @property
    def rejected(self) -> tuple[int, ...]:
        """Who dealt, and was found to lie or to exceed the norm."""
        return tuple(int(client) for client in np.flatnonzero(~self.accepted))


@dataclass(frozen=True)
class SecureNoisySum:
    """Clients are the holders of each other's shares; `threshold` of them may collude.

    field: bits and draws of the noise; the unit of all numbers is the noise's deviation over
    field.deviation, so that noise and data lie on one lattice.
    Needs 2 * threshold + 1 holders to the end: with n clients, n - 2 * threshold - 1 may drop out
    after dealing. What it does not do is to hide who was rejected.

    Rounding lets a vector exceed the norm by sqrt(dim) / 2 units and adds up to sqrt(dim) units to
    what one record moves. The noise is nearly Gaussian only (`JointNoise.distance`), which the
    accountant of Gaussian noise does not cover. All randomness is by key, so that a run can be
    repeated: peers who must not trust each other need keys of their own from a secret source, and
    channels that are private.

    >>> import torch
    >>> vectors = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, -0.5], [0.1, 0.1]])
    >>> opened = SecureNoisySum(threshold=1)(vectors, clip=1.0, deviation=1e-3, key=torch.tensor(5))
    >>> opened.rejected, bool(np.abs(opened.total - [0.4, 0.0]).max() < 0.01)
    ((0,), True)
    """

    threshold: int
    field: JointNoise = NOISE

    def __post_init__(self) -> None:
        if self.threshold < 1:
            raise UsageError(
                f"SecureNoisySum: threshold={self.threshold}; need at least 1 (0 shares nothing)"
            )

    def unit(self, deviation: float) -> float:
        """What one whole number stands for."""
        if not 0 < deviation < math.inf:
            raise UsageError(
                f"SecureNoisySum: deviation={deviation}; need noise above 0, whose size sets the "
                "unit (a sum without noise tells about single clients)"
            )
        return deviation / self.field.deviation

    def proof(self, clients: int, dim: int, clip: float, deviation: float) -> NormProof:
        """The proof that all clients give; UsageError where a sum would not fit into the field."""
        if not 0 < clip < math.inf:
            raise UsageError(f"SecureNoisySum: clip={clip}; need a finite norm above 0")
        bound = math.ceil(clip / self.unit(deviation) + math.sqrt(dim) / 2)
        most = clients * bound + self.field.draws * 2**self.field.bits
        if most >= PRIME // 2:
            raise UsageError(
                f"SecureNoisySum: {clients} clients of norm {clip} at a unit of "
                f"{self.unit(deviation):.3g} exceed the field (take fewer bits)"
            )
        return NormProof(Shamir(clients, self.threshold), dim, bound)

    def deal(
        self, vector: NDArray[np.float64], proof: NormProof, deviation: float, key: Key
    ) -> Dealing:
        """One client's part: its vector [dim] in units, shared with the proof."""
        numbers = np.rint(np.asarray(vector, np.float64) / self.unit(deviation))
        # What cannot be dealt at all is dealt as something that is refused.
        numbers = np.nan_to_num(numbers, nan=2.0**50, posinf=2.0**50, neginf=-(2.0**50))
        return proof.deal(np.clip(numbers, -(2.0**50), 2.0**50).astype(np.int64), key)

    def noise(self, clients: int, dim: int, key: Key) -> Elements:
        """Shares [clients, dim] of the noise, made by threshold + 1 of the clients."""
        scheme = Shamir(clients, self.threshold)
        return self.field.shares(scheme, dim, fold(key, "noise"), self.threshold + 1)

    def __call__(
        self, vectors: NDArray[np.float64], clip: float, deviation: float, key: Key,
        dropped: Sequence[int] = (),
    ) -> Opened:  # fmt: skip
        """Deal, check, add, open. vectors: [clients, dim] as clients chose them.

        dropped: holders who are gone once all has been dealt. Their vectors still count, as
        everybody has shares of them.
        """
        clients, dim = vectors.shape
        proof = self.proof(clients, dim, clip, deviation)
        dealings = [
            self.deal(vector, proof, deviation, fold(key, "client", place))
            for place, vector in enumerate(vectors)
        ]
        return self.collect(dealings, proof, deviation, key, dropped)

    def collect(
        self, dealings: Sequence[Dealing], proof: NormProof, deviation: float, key: Key,
        dropped: Sequence[int] = (),
    ) -> Opened:  # fmt: skip
        """The holders' part, from what each client dealt."""
        clients = proof.scheme.holders
        present = [holder for holder in range(clients) if holder not in set(dropped)]
        if len(present) <= 2 * self.threshold:
            raise UsageError(
                f"SecureNoisySum: {len(present)} of {clients} clients are left; need 2 * threshold "
                f"+ 1 = {2 * self.threshold + 1}"
            )
        total = self.noise(clients, proof.dim, key)[present]
        accepted = np.zeros(clients, dtype=bool)
        for place, dealing in enumerate(dealings):
            held = Dealing(dealing.bits[present], dealing.slack[present])
            accepted[place] = proof.check(held, present, fold(key, "check", place))
            if accepted[place]:
                total = add(total, proof.numbers(held))
        opened = decode(proof.scheme.reconstruct(total, present)).astype(np.float64)
        return Opened(opened * np.float64(self.unit(deviation)), accepted)
