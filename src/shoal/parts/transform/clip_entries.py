"""Bound each entry and add Gaussian noise, in full precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.parts.transform.base import Buffer, Codec, Dense, check_number
from shoal.parts.transform.identity import unpack_dense
from shoal.tensor.keyed import fold, normal
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class ClipEntries(Codec):
    """Limit each entry to [-clip, clip], then add N(0, noise^2) to it.

    What integer mechanisms (`rqm`, `pbm`) are compared with: noise = 0 shows what clipping alone
    costs, other noise is the Gaussian mechanism of single entries (its guarantee:
    `shoal.parts.privacy.accountant.gaussian_renyi`). `clip_and_noise` bounds the norm instead.
    secrets: as there. The message stays dense: dim * itemsize bytes.

    >>> codec = ClipEntries(clip=1.0)
    >>> codec.decode(codec.encode(torch.tensor([3., -0.5]), None, torch.tensor(0))[0])
    tensor([ 1.0000, -0.5000])
    """

    clip: float = 1.5
    noise: float = 0.0
    secrets: Secrets = "run"

    dense: ClassVar[bool] = True
    adds_noise: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"clip": 0.5, "noise": 0.7})

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("clip", 0 < self.clip < math.inf, "a finite number > 0"),
            ("noise", 0 <= self.noise < math.inf, "a finite number >= 0"),
        ):
            check_number("clip_entries", name, getattr(self, name), rule, fine)
        check_secrets("clip_entries", self.secrets)

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Dense, Any]:
        self._accept(x)
        # Clipping must not turn infinity into an ordinary number.
        values = torch.where(x.isfinite(), x.clamp(-self.clip, self.clip), math.nan)
        if self.noise:
            keys = draw_keys(fold(key, "clip_entries"), x.shape[-1], self.secrets)
            draws = normal(keys, dtype=x.dtype)
            values = values + draws * self.noise
        return Dense(values), state

    def decode(self, payload: Dense) -> Vector:
        return payload.values

    def unpack(self, data: Buffer) -> Dense:
        return unpack_dense(data, None if self.spec is None else self.spec.dim, self._name)
