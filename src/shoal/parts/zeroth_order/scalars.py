"""Numbers as bytes: a projected gradient in one byte, and in four for comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from shoal.base.errors import DecodeError, UsageError

STEPS = 16
"""Codes per factor of e."""

LARGEST = 127
"""The largest code of a magnitude; 0 is an exact zero."""

GREATEST = float(np.finfo(np.float32).max)


class ScalarCodec(Protocol):
    """Numbers to bytes and back; every machine, the sender included, uses what comes back."""

    @property
    def width(self) -> int:
        """Bytes per number."""
        ...

    def encode(self, values: Sequence[float]) -> bytes:
        """`width` bytes for each. A number that is not finite becomes 0: it is dropped."""
        ...

    def decode(self, data: bytes) -> np.ndarray:
        """float64 [n]; DecodeError for bytes that are no numbers."""
        ...

    def saturated(self, values: Sequence[float]) -> int:
        """How many of the finite numbers are out of the code's range."""
        ...


@dataclass(frozen=True)
class OneByte:
    """A sign bit and seven bits of the logarithm of the magnitude, in steps of 1/16.

    Code 0 is an exact zero; codes m = 1 to 127 stand for exp((lowest + m - 1) / 16), so that what
    is in range comes back with a relative error of at most exp(1/32) - 1 = 3.2%. What is out of
    range saturates and never wraps. lowest = -74 covers 0.0098 to 25.8. Order is kept.

    >>> code = OneByte()
    >>> code.decode(code.encode([-1.0, 0.0, 1e9])).round(2).tolist()
    [-1.0, 0.0, 25.79]
    """

    lowest: int = -74

    def __post_init__(self) -> None:
        if not -4096 <= self.lowest <= 4096:
            raise UsageError(
                f"OneByte: lowest={self.lowest}; need -4096 to 4096 (16 ln of the least magnitude)"
            )

    @property
    def width(self) -> int:
        return 1

    def encode(self, values: Sequence[float]) -> bytes:
        return bytes([self._code(value) for value in values])

    def decode(self, data: bytes) -> np.ndarray:
        return _table(self.lowest)[np.frombuffer(data, np.uint8)]

    def saturated(self, values: Sequence[float]) -> int:
        steps = [_steps(value) for value in values if value and math.isfinite(value)]
        highest = self.lowest + LARGEST - 1
        return sum(not self.lowest <= step <= highest for step in steps)

    def _code(self, value: float) -> int:
        if not value or not math.isfinite(value):
            return 0
        place = min(max(_steps(value) - self.lowest + 1, 1), LARGEST)
        return place + 128 if value < 0 else place


def _steps(value: float) -> int:
    return round(STEPS * math.log(abs(value)))


@lru_cache(maxsize=8)
def _table(lowest: int) -> np.ndarray:
    """What each of the 256 codes stands for."""
    steps = np.arange(lowest, lowest + LARGEST)
    positive = np.concatenate(([0.0], np.exp(steps / STEPS)))
    return np.concatenate((positive, -positive))


@dataclass(frozen=True)
class FourBytes:
    """float32 as it is, and its largest number in place of larger ones.

    >>> FourBytes().decode(FourBytes().encode([0.5, float("nan")])).tolist()
    [0.5, 0.0]
    """

    @property
    def width(self) -> int:
        return 4

    def encode(self, values: Sequence[float]) -> bytes:
        sound = [value if math.isfinite(value) else 0.0 for value in values]
        return np.clip(sound, -GREATEST, GREATEST).astype("<f4").tobytes()

    def decode(self, data: bytes) -> np.ndarray:
        if len(data) % 4:
            raise DecodeError(f"FourBytes: {len(data)} bytes are no whole number of float32")
        return np.frombuffer(data, "<f4").astype(np.float64)

    def saturated(self, values: Sequence[float]) -> int:
        return sum(math.isfinite(value) and abs(value) > GREATEST for value in values)
