"""Flatness of the training loss around a model, and the gap to the test loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.parts.measure._pool import Pool
from shoal.rounds.task import Task
from shoal.tensor import keyed
from shoal.tensor.types import Vector

TINY = 1e-12


@dataclass(frozen=True)
class Flatness:
    """How steep the loss on all peers' data is around parameters [dim].

    `sharpness`: the increase of the loss after one step of length `radius` (default 0.05) along the
    normalised gradient, a lower bound of the maximum within the radius. `hessian_top`: the
    eigenvalue of largest modulus of the Hessian by `iterations` power steps, Hessian products being
    central differences of gradients; a lower bound of the modulus, too, when the steps do not
    suffice. `generalisation_gap`: test loss minus training loss (label noise counts as training
    data). Every sample counts once, whoever has it; data that were lost (`Shard.until`) count too.
    Source: Foret et al. 2021, section 2 (arXiv 2010.01412), equation 2 for the step.

    >>> Flatness(radius=0.1).iterations
    20
    """

    radius: float = 0.05
    iterations: int = 20

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"radius": 0.1, "iterations": 5})

    def __post_init__(self) -> None:
        if not 0 < self.radius < float("inf") or self.iterations < 1:
            raise UsageError(
                f"Flatness: radius={self.radius}, iterations={self.iterations}; need a finite "
                "radius above 0 and at least 1 power step"
            )

    def __call__(self, task: Task, params: Vector) -> Mapping[str, float]:
        pool = Pool(task)
        gradient = pool.grad(params)
        loss = pool.loss(params)
        # A zero gradient: one step cannot tell anything, and must not give nan.
        step = self.radius * gradient / (gradient.norm() + TINY)
        test = float(task.evaluate(params)["loss"])
        return {
            "sharpness": pool.loss(params + step) - loss,
            "hessian_top": top_eigenvalue(pool.grad, params, self.iterations),
            "generalisation_gap": test - loss,
        }


def top_eigenvalue(gradient: Any, params: Vector, iterations: int) -> float:
    """The Hessian's eigenvalue of largest modulus at params [dim], by power iteration.

    gradient: params -> gradient. The start is drawn by a fixed key, so the answer is a function of
    its arguments. Products H v = (g(x + h v) - g(x - h v)) / 2h with a unit v; h follows from the
    precision of the parameters. Breaks where the loss has kinks within h.

    >>> curve = torch.tensor([1.0, 3.0, 2.0])
    >>> round(top_eigenvalue(lambda x: curve * x, torch.ones(3), 40), 3)
    3.0
    """
    key = keyed.key_of(0, "power", device=str(params.device))
    direction = keyed.normal(keyed.grid(key, params.shape[-1]), dtype=params.dtype)
    width = torch.finfo(params.dtype).eps ** (1 / 3) * max(1.0, float(params.norm()))
    value = 0.0
    for _ in range(iterations):
        direction = direction / (direction.norm() + TINY)
        forward, backward = params + width * direction, params - width * direction
        product = (gradient(forward) - gradient(backward)) / (2 * width)
        value = float(direction @ product)
        direction = product
    return value
