"""What the parts of a pipeline share: a stage's state, and the error when none can be rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.base.errors import PeerError
from shoal.tensor.types import Vector

__all__ = ["StageState", "Unrecoverable"]


class Unrecoverable(PeerError):
    """A stage is lost, and nothing that is left can rebuild it."""


@dataclass(frozen=True)
class StageState:
    """What a stage holds between two iterations, and loses when its peer fails.

    params: [dim]; optimizer: the state of its optimiser; scale: the factor on its learning rate;
    square: the squared L2 norm of its last gradient, before clipping (0 = there was none).
    """

    params: Vector
    optimizer: Any
    scale: float = 1.0
    square: float = 0.0
