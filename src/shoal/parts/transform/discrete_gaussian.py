"""Bound a vector's norm, round it to whole units and add discrete Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.privacy.discrete_gaussian import (
    FINEST,
    DiscreteGaussianRelease,
    discrete_gaussian,
)
from shoal.parts.transform._bits import pack_integers, packed_bytes, unpack_integers
from shoal.parts.transform._codes import BROKEN, DOUBLE
from shoal.parts.transform.base import (
    Buffer,
    Codec,
    TensorPayload,
    array,
    bytes_at,
    check_number,
    flat_view,
    vector_norm,
)
from shoal.tensor.keyed import fold, grid
from shoal.tensor.types import Key, Mask, Vector

TAILS = 12.0
"""Noise beyond so many deviations is cut off, once in 10^32 entries."""


@dataclass(frozen=True, eq=False)
class Units(TensorPayload):
    """numbers: int64 [..., dim], from -most to most; broken: bool [...], the vector was not finite.

    On the wire: a byte of flags, then `width` bits for each number plus `most`.
    """

    ranks: ClassVar[dict[str, int]] = {"numbers": 1, "broken": 0}

    numbers: Tensor
    broken: Mask
    most: int
    width: int
    double: bool

    def row_bytes(self) -> int:
        return 1 + packed_bytes(self.numbers.shape[-1], self.width)

    def pack(self) -> bytes:
        self._need_row()
        flags = DOUBLE * self.double + BROKEN * bool(self.broken)
        return bytes([flags]) + pack_integers(array(self.numbers) + self.most, self.width)


@dataclass(frozen=True)
class DiscreteGaussian(Codec):
    """Scale to norm at most `clip`, round each entry to a multiple of `unit`, add whole noise.

    The noise of an entry has standard deviation noise_multiplier * clip, as that of
    `clip_and_noise`, but is a whole number of units, drawn exactly. So the sum over clients can be
    taken modulo a power of two under masks, and no bits of floating point betray anything. Rounding
    may lengthen a vector by sqrt(dim) / 2 units, which `release` counts. clients: of how many the
    numbers are to be added up; each takes as many bits as the sum (masks are made elsewhere,
    see `shoal.parts.privacy.modular_sum`).
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
        """What the ledger counts for one message, or for a sum of which nothing else is seen."""
        sensitivity = self.clip / self.unit + math.sqrt(dim) / 2
        return DiscreteGaussianRelease(self.deviation, sensitivity, clients, dim)

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Units, Any]:
        self._accept(x)
        broken = ~x.isfinite().all(-1)
        entries = x.to(torch.float64).masked_fill(broken.unsqueeze(-1), 0.0)
        factor = self.clip / vector_norm(entries).clamp(min=self.clip)
        numbers = (entries * (factor / self.unit).unsqueeze(-1)).round().to(torch.int64)
        if self.deviation:
            keys = grid(fold(key, "discrete_gaussian"), x.shape[-1])
            numbers = numbers + discrete_gaussian(keys, self.deviation)
        numbers = numbers.clamp(-self.most, self.most).masked_fill(broken.unsqueeze(-1), 0)
        double = x.dtype == torch.float64
        return Units(numbers, broken, self.most, self.width, double), state

    def decode(self, payload: Units) -> Vector:
        values = payload.numbers.to(torch.float64) * self.unit
        values = values.masked_fill(payload.broken.unsqueeze(-1), math.nan)
        return values if payload.double else values.to(torch.float32)

    def decode_sum(self, numbers: Tensor, clients: int) -> Vector:
        """The mean of `clients` decoded vectors from the sum of their numbers [..., dim]."""
        if clients < 1:
            raise UsageError(f"discrete_gaussian: clients={clients}; need at least 1 summand")
        return numbers.to(torch.float64) * (self.unit / clients)

    def unpack(self, data: Buffer) -> Units:
        dim = self._bound().dim
        view = flat_view(data)
        packed = packed_bytes(dim, self.width)
        if len(view) != 1 + packed:
            raise DecodeError(
                f"discrete_gaussian: {len(view)} bytes; need {1 + packed} for this layout "
                "(truncated, or bound to another)"
            )
        shifted = unpack_integers(bytes_at(view, 1, packed), self.width, dim, self._name)
        numbers, flags = shifted.astype("int64") - self.most, view[0]
        if flags > DOUBLE + BROKEN or (numbers > self.most).any():
            raise DecodeError(
                f"discrete_gaussian: flags {flags}, largest number {numbers.max()} of {self.most} "
                "(corrupted bytes)"
            )
        if flags & BROKEN and numbers.any():
            raise DecodeError(
                "discrete_gaussian: numbers in a vector without any (corrupted bytes)"
            )
        return Units(
            numbers=torch.from_numpy(numbers),
            broken=torch.tensor(bool(flags & BROKEN), device="cpu"),
            most=self.most,
            width=self.width,
            double=bool(flags & DOUBLE),
        )
