"""A Poisson clock: it rings at random moments, none of which depends on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.base.errors import UsageError
from shoal.base.keyed import Word
from shoal.tensor import keyed

_BLOCK = 256


@dataclass(frozen=True)
class Poisson:
    """Dates with exponential gaps of mean 1 / rate, drawn by seed and key.

    Whoever knows seed, key and rate knows all dates: two peers whose clock it is need not tell
    each other when it rings. Rate 0 never rings. A longer horizon adds dates and changes none.

    >>> clock = Poisson(7, ("edge", 1, 2), rate=0.5)
    >>> early, all_dates = clock.dates(10.0), clock.dates(100.0)
    >>> (all_dates[: len(early)] == early).all(), bool((early < 10.0).all())
    (np.True_, True)
    """

    seed: int
    key: tuple[Word, ...]
    rate: float = 1.0

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"seed": 0, "key": ("gradient", 3)}, {"seed": 0, "key": ("edge", 1, 2), "rate": 0.0},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < np.inf:
            raise UsageError(f"Poisson: rate={self.rate}; need a finite number >= 0")

    def dates(self, until: float) -> NDArray[np.float64]:
        """All dates before `until`, ascending, float64 [events]."""
        if not until < np.inf:
            raise UsageError(f"Poisson: until={until}; need a finite time (there are always more)")
        if not self.rate:
            return np.empty(0)
        key = keyed.key_of(self.seed, *self.key)
        found: list[NDArray[np.float64]] = []
        drawn, last = 0, 0.0
        while last < until:
            places = torch.arange(drawn, drawn + _BLOCK, device=key.device)
            gaps = -np.log1p(-keyed.uniform(key, places).numpy()) / self.rate
            # Added up one by one, so that blocks do not show.
            dates = np.cumsum(np.concatenate(([last], gaps)))[1:]
            found.append(dates)
            drawn, last = drawn + _BLOCK, float(dates[-1])
        whole = np.concatenate(found) if found else np.empty(0)
        return whole[whole < until]
