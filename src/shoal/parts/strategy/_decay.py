"""The hyperbolic decay of a learning rate over rounds, in steps."""

from __future__ import annotations

import math

from shoal.base.errors import UsageError


def half_decay(lr: float, step: int, half_life: int, every: int) -> float:
    """lr / (1 + t / half_life), t the last multiple of `every` steps.

    >>> [round(half_decay(0.6, step, half_life=50, every=50), 3) for step in (0, 49, 50, 100)]
    [0.6, 0.6, 0.3, 0.2]
    """
    return lr / (1 + step // every * every / half_life)


def check_decay(part: str, lr: float, half_life: int, decay_every: int) -> None:
    """Refuse a learning rate or a decay that means nothing."""
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"{part}: lr={lr}; need a finite learning rate above 0")
    if half_life < 1 or decay_every < 1:
        raise UsageError(
            f"{part}: half_life={half_life}, decay_every={decay_every}; need at least 1 step "
            "(a huge half_life keeps the rate)"
        )


def check_weight_decay(part: str, weight_decay: float) -> None:
    """Refuse a pull towards zero that is negative or not finite."""
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise UsageError(f"{part}: weight_decay={weight_decay}; need a finite number >= 0")
