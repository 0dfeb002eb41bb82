"""How far from a stationary point a model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from shoal.parts.measure._pool import Pool
from shoal.rounds.task import Task
from shoal.tensor.types import Vector


@dataclass(frozen=True)
class Gradient:
    """The squared norm of the gradient of the loss on all peers' training data, `gradient_square`,
    and that loss, `training_loss`, after every evaluated round.

    What analyses of non-convex learning bound. Every sample counts once, whoever has it; data that
    were lost (`Shard.until`) count too.

    >>> Gradient().each
    True
    """

    each: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, task: Task, params: Vector) -> Mapping[str, float]:
        pool = _pool(task)
        square = pool.grad(params).double().square().sum()
        return {"gradient_square": float(square), "training_loss": pool.loss(params)}


@lru_cache(maxsize=1)
def _pool(task: Task) -> Pool:
    # One copy of all data, for the run that is measured at the moment.
    return Pool(task)
