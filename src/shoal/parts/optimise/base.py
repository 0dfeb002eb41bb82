"""What optimisers share: learning rates over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.local import Optimizer

__all__ = ["Decay", "Optimizer", "check_rate", "per_row", "start_count"]

_KINDS = ("constant", "inverse", "inverse_sqrt", "exponential", "linear", "cosine")


@dataclass(frozen=True)
class Decay:
    """The factor on the learning rate after t steps; the count of steps is part of the state.

    constant 1; inverse 1/(1 + t/steps); inverse_sqrt 1/sqrt(1 + t/steps); exponential
    rate^(t/steps); linear and cosine fall to `rate` at t = steps and stay there. Each rises
    linearly over the first `warmup` steps, which count extra.

    >>> Decay("inverse", steps=10).factor(torch.tensor([0.0, 10.0]))
    tensor([1.0000, 0.5000])
    """

    kind: str = "constant"
    steps: int = 1
    rate: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UsageError(f"decay: kind={self.kind!r}; use one of {', '.join(_KINDS)}")
        if self.steps < 1 or self.warmup < 0 or not 0.0 <= self.rate <= 1.0:
            raise UsageError(
                f"decay: steps={self.steps}, warmup={self.warmup}, rate={self.rate}; need "
                "steps >= 1, warmup >= 0 and a rate from 0 to 1"
            )

    @classmethod
    def of(cls, settings: tuple[str | float, ...]) -> Decay:
        """From a part's plain setting, such as `("cosine", 1000, 0.1)`."""
        if not settings or len(settings) > 4 or not isinstance(settings[0], str):
            raise UsageError(
                f"decay={settings!r}; need (kind, steps, rate, warmup), of which kind comes first"
            )
        return cls(*settings)

    @property
    def constant(self) -> bool:
        return self.kind == "constant" and self.warmup == 0

    def factor(self, count: Tensor) -> Tensor:
        """count: steps done so far, `[...]`."""
        late = (count - self.warmup).clamp_min(0) / self.steps
        match self.kind:
            case "constant":
                factor = torch.ones_like(count)
            case "inverse":
                factor = 1 / (1 + late)
            case "inverse_sqrt":
                factor = (1 + late).rsqrt()
            case "exponential":
                factor = torch.full_like(count, self.rate) ** late
            case "linear":
                factor = 1 - (1 - self.rate) * late.clamp_max(1)
            case _:
                wave = 0.5 + 0.5 * torch.cos(math.pi * late.clamp_max(1))
                factor = self.rate + (1 - self.rate) * wave
        if self.warmup:
            factor = factor * ((count + 1) / self.warmup).clamp_max(1)
        return factor


def start_count(params: Tensor) -> Tensor:
    """No steps so far, `[...]`; exact up to 2^53 steps."""
    return torch.zeros(params.shape[:-1], dtype=torch.float64, device=params.device)


def per_row(value: Tensor | float, like: Tensor) -> Tensor | float:
    """A factor `[...]` that multiplies vectors `[..., dim]`."""
    return value.to(like.dtype).unsqueeze(-1) if isinstance(value, Tensor) else value


def check_rate(part: str, **settings: float) -> None:
    """Refuse settings that are negative or not finite."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{part}: {name}={value}; need a finite number of at least 0")
