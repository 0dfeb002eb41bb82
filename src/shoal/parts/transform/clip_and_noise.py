"""Bound a vector's norm and add Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.privacy.sampled_gaussian import GaussianRelease
from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.parts.transform.base import Buffer, Codec, Dense, check_number, vector_norm
from shoal.parts.transform.identity import unpack_dense
from shoal.tensor.keyed import fold, normal
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class ClipAndNoise(Codec):
    """Scale to norm at most `clip`, then add N(0, (clip * noise_multiplier)^2) to each entry.

    This is the Gaussian mechanism of a peer's whole message: `release` is what the ledger counts,
    for a message that is there or not. secrets: with "run" the noise follows from the run's seed
    and hides nothing from those who know it; with "system" nobody can work it out. A vector that is
    not finite arrives as such, which tells everybody so and is not counted. The message stays
    dense: dim * itemsize bytes.
    Source: McMahan et al. 2018, algorithm 1 (arXiv 1710.06963), noise added at the sender.

    >>> import torch
    >>> codec = ClipAndNoise(clip=1.0, noise_multiplier=0.0)
    >>> payload, _ = codec.encode(torch.tensor([3., 4.]), None, torch.tensor(0))
    >>> codec.decode(payload)
    tensor([0.6000, 0.8000])
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    secrets: Secrets = "run"

    dense: ClassVar[bool] = True
    adds_noise: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"clip": 0.5, "noise_multiplier": 0.0},
        {"clip": 10.0, "noise_multiplier": 0.01},
    )

    def __post_init__(self) -> None:
        check_number(
            "clip_and_noise", "clip", self.clip, "a finite number > 0", 0 < self.clip < math.inf
        )
        check_number(
            "clip_and_noise",
            "noise_multiplier",
            self.noise_multiplier,
            "a finite number >= 0",
            0 <= self.noise_multiplier < math.inf,
        )
        check_secrets("clip_and_noise", self.secrets)

    @property
    def release(self) -> GaussianRelease:
        """What the ledger counts for one message."""
        return GaussianRelease(self.noise_multiplier)

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Dense, Any]:
        self._accept(x)
        factor = self.clip / vector_norm(x).clamp(min=self.clip)
        values = x * factor.unsqueeze(-1).to(x.dtype)
        if self.noise_multiplier:
            keys = draw_keys(fold(key, "clip_and_noise"), x.shape[-1], self.secrets)
            draws = normal(keys, dtype=x.dtype)
            values = values + draws * (self.clip * self.noise_multiplier)
        return Dense(values), state

    def decode(self, payload: Dense) -> Vector:
        return payload.values

    def unpack(self, data: Buffer) -> Dense:
        return unpack_dense(data, None if self.spec is None else self.spec.dim, self._name)
