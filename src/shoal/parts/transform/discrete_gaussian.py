"""Bound a vector's norm, round it to whole units and add discrete Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.privacy.discrete_gaussian import (
    FINEST,
    DiscreteGaussianRelease,
    discrete_gaussian,
)
from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.parts.transform._codes import Codes, codes_of, unpacked_codes
from shoal.parts.transform.base import Buffer, Codec, check_number, vector_norm
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key, Vector

TAILS = 12.0
"""Noise beyond so many deviations is cut off, once in 10^32 entries."""


@dataclass(frozen=True)
class DiscreteGaussian(Codec):
    """Scale to norm at most `clip`, round each entry to a multiple of `unit`, add whole noise.

    The noise of an entry has standard deviation noise_multiplier * clip, as that of
    `clip_and_noise`, but is a whole number of units, drawn exactly. So the sum over clients can be
    taken modulo a power of two under masks, and no bits of floating point betray anything. Rounding
    may lengthen a vector by sqrt(dim) / 2 units, which `release` counts. clients: of how many the
    numbers are to be added up; each takes as many bits as the sum (masks are made elsewhere,
    see `shoal.parts.privacy.modular_sum`). secrets: with "run" the noise follows from the run's
    seed and hides nothing from those who know it; with "system" nobody can work it out. A vector
    that is not finite arrives as such, which tells everybody so and is not counted.
    Source: Kairouz, Liu and Steinke 2021 (arXiv 2102.06387), without the random rotation, and
    rounded to the nearest unit, which is off by half a unit at most.

    >>> codec = DiscreteGaussian(clip=1.0, noise_multiplier=0.01, unit=0.125)
    >>> payload, _ = codec.encode(torch.tensor([3., 4.]), None, torch.tensor(0))
    >>> codec.decode(payload)
    tensor([0.6250, 0.7500])
    >>> round(codec.release(2).renyi(2.0) / DiscreteGaussian().release(2).renyi(2.0))
    11829
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0
    unit: float = 0.001
    clients: int = 1
    secrets: Secrets = "run"

    adds_noise: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"clip": 0.5, "noise_multiplier": 0.0},
        {"clip": 10.0, "noise_multiplier": 0.01, "unit": 0.05, "clients": 40},
    )

    def __post_init__(self) -> None:
        who = "discrete_gaussian"
        for name, low in (("clip", False), ("noise_multiplier", True), ("unit", False)):
            value = getattr(self, name)
            rule = "a finite number >= 0" if low else "a finite number > 0"
            check_number(who, name, value, rule, 0 <= value < math.inf and (low or value > 0))
        check_secrets(who, self.secrets)
        check_number(
            who, "clients", self.clients, "1 to 1000000", self.clients in range(1, 1_000_001)
        )
        if self.deviation > math.isqrt(FINEST):
            raise UsageError(
                f"{who}: noise of {self.deviation:.4g} units; need at most {math.isqrt(FINEST)} "
                f"(raise unit to {self.unit * self.deviation / math.isqrt(FINEST):.3g})"
            )
        if self.width > 52:
            raise UsageError(
                f"{who}: {self.width} bits for an entry; need at most 52 (raise unit, or lower "
                "clip)"
            )

    @property
    def deviation(self) -> float:
        """Of the noise, in units."""
        return self.noise_multiplier * self.clip / self.unit

    @property
    def most(self) -> int:
        """The largest number that is sent."""
        return math.ceil(self.clip / self.unit + TAILS * self.deviation) + 1

    @property
    def width(self) -> int:
        """Bits for a number: enough for the sum of all clients' numbers, shifted to 0."""
        return (2 * self.most * self.clients).bit_length()

    def release(self, dim: int, clients: int = 1) -> DiscreteGaussianRelease:
        """What the ledger counts for one message, or for a sum of which nothing else is seen.

        Neighbours: a client's message is there or not (zero in its place). One that is replaced
        moves the sum by twice as much.
        """
        sensitivity = self.clip / self.unit + math.sqrt(dim) / 2
        return DiscreteGaussianRelease(self.deviation, sensitivity, clients, dim)

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Codes, Any]:
        self._accept(x)
        broken = ~x.isfinite().all(-1)
        entries = x.to(torch.float64).masked_fill(broken.unsqueeze(-1), 0.0)
        factor = self.clip / vector_norm(entries).clamp(min=self.clip)
        numbers = (entries * (factor / self.unit).unsqueeze(-1)).round().to(torch.int64)
        if self.deviation:
            keys = draw_keys(fold(key, "discrete_gaussian"), x.shape[-1], self.secrets)
            numbers = numbers + discrete_gaussian(keys, self.deviation)
        numbers = numbers.clamp(-self.most, self.most).masked_fill(broken.unsqueeze(-1), 0)
        # Codes are shifted, so that none is below 0.
        return Codes(numbers + self.most, broken, self.width, x.dtype == torch.float64), state

    def decode(self, payload: Codes) -> Vector:
        values = (payload.codes - self.most).to(torch.float64) * self.unit
        values = values.masked_fill(payload.broken.unsqueeze(-1), math.nan)
        return values if payload.double else values.to(torch.float32)

    def decode_sum(self, codes: Tensor, clients: int) -> Vector:
        """The mean of `clients` decoded vectors from the sum of their codes [..., dim]."""
        if clients < 1:
            raise UsageError(f"discrete_gaussian: clients={clients}; need at least 1 summand")
        return (codes - clients * self.most).to(torch.float64) * (self.unit / clients)

    def unpack(self, data: Buffer) -> Codes:
        dim, levels = self._bound().dim, 2 * self.most + 1
        codes, flags = unpacked_codes(data, dim, self.width, levels, self.most, self._name)
        return codes_of(codes, flags, self.width, torch.int64)
