"""Recovery without checkpoints: a lost stage is made of its neighbours."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.pipeline.base import StageState, Unrecoverable
from shoal.tensor.types import Vector

RULES = ("weighted", "uniform", "copy", "random", "zero")
FALL_BACK = "fall back to a checkpoint: keep_every=50"


@dataclass(frozen=True)
class CheckFree:
    """How a stage is rebuilt that has lost its parameters and its optimiser's state.

    rule: "weighted" averages both neighbours by the `power`-th power of the norm of their last
    gradients: the stage that still moves most needs its function carried over most. "uniform"
    averages them equally, "copy" takes the one before (of stage 1: the one behind), "random" begins
    anew, "zero" passes its input through. plus: CheckFree+, for a pipeline with swaps: the first
    two stages and the last two are copied from their swap partners, and stage 0 (embedding and
    output layer) from the copies that stages 1 and L hold of it. pairs: without it only the first
    and the last stage are copied. lr_boost: the factor on a rebuilt stage's learning rate.

    Assumes that no two consecutive stages are lost at once: the one is made of the other.

    Source: Blagoev et al. 2025 (arXiv 2506.15461).

    >>> CheckFree().sources(3, stages=6), CheckFree(plus=True).sources(6, stages=6)
    ((2, 4), (5,))
    """

    plus: bool = False
    rule: str = "weighted"
    power: float = 2.0
    lr_boost: float = 1.1
    pairs: bool = True

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"plus": True}, {"rule": "uniform"})

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"check_free: rule={self.rule!r}; need one of {', '.join(RULES)}")
        if not (math.isfinite(self.power) and self.power >= 0 and 0 < self.lr_boost < math.inf):
            raise UsageError(
                f"check_free: power={self.power}, lr_boost={self.lr_boost}; need a power of 0 or "
                "more and a positive factor"
            )

    def holders(self, stages: int) -> tuple[int, ...]:
        """Which stages hold a copy of stage 0."""
        return (1, stages) if self.plus else ()

    def sources(self, stage: int, stages: int) -> tuple[int, ...]:
        """Whose states rebuild a stage; of stage 0 either one will do."""
        if stage == 0:
            if not self.plus:
                raise Unrecoverable(
                    f"stage 0 is lost, and without plus nobody holds a copy of it ({FALL_BACK}, or "
                    "plus=True)"
                )
            return self.holders(stages)
        if self.plus and stage in self._copied(stages):
            return (stage - 1,) if stage in (2, stages) else (stage + 1,)
        if self.rule in ("random", "zero"):
            return ()
        if self.rule == "copy":
            return (stage - 1,) if stage > 1 else (2,)
        if stage in (1, stages):
            raise Unrecoverable(
                f"stage {stage} of {stages} is lost and has one neighbour only ({FALL_BACK}, or "
                "plus=True)"
            )
        return (stage - 1, stage + 1)

    def _copied(self, stages: int) -> tuple[int, ...]:
        return (1, 2, stages - 1, stages) if self.pairs else (1, stages)

    def check(self, lost: Collection[int], stages: int) -> None:
        """Unrecoverable when one of these stages, lost together, needs another of them."""
        for stage in sorted(lost):
            needed = self.sources(stage, stages)
            gone = [each for each in needed if each in lost]
            if gone and (stage > 0 or len(gone) == len(needed)):
                raise Unrecoverable(
                    f"stage {stage} is lost together with stage {gone[0]}, from which it would be "
                    f"rebuilt ({FALL_BACK})"
                )

    def rebuilt(
        self, stage: int, stages: int, given: Mapping[int, StageState], fresh: Vector
    ) -> Vector:
        """The parameters [dim] of a lost stage 1 to L from the states of its `sources`.

        fresh: newly initialised parameters, which the rule "random" takes.
        """
        sources = self.sources(stage, stages)
        if len(sources) == 2:
            before, behind = (given[source] for source in sources)
            weights = self.weights(before.square, behind.square)
            mixed = recover_stage({"": before.params}, {"": behind.params}, weights)
            return mixed[""]
        if sources:
            return given[sources[0]].params.clone()
        return torch.zeros_like(fresh) if self.rule == "zero" else fresh

    def weights(self, before: float, behind: float) -> tuple[float, float]:
        """Both neighbours' weights from the squared norms of their last gradients; they sum to 1.

        Without any gradient so far both count the same.
        """
        if self.rule != "weighted":
            return 0.5, 0.5
        top = max(before, behind)
        if not 0 < top < math.inf:
            return 0.5, 0.5
        first, second = ((x / top) ** (self.power / 2) for x in (before, behind))
        return first / (first + second), second / (first + second)


def recover_stage(
    before: Mapping[str, Tensor], behind: Mapping[str, Tensor], weights: tuple[float, float]
) -> dict[str, Tensor]:
    """A stage's tensors as the weighted average of those of its neighbours, name by name.

    weights: of both, in any unit; they are divided by their sum. UsageError when the neighbours'
    shapes differ. Equal neighbours give the same bits, equal weights the exact midpoint.

    >>> recover_stage({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, (3.0, 1.0))
    {'w': tensor([1.])}
    """
    first, second = weights
    if not (first >= 0 and second >= 0 and 0 < first + second < math.inf):
        raise UsageError(
            f"recover_stage: weights={weights}; need two numbers from 0 with a positive sum"
        )
    if before.keys() != behind.keys():
        odd = sorted(before.keys() ^ behind.keys())[0]
        raise UsageError(
            f"recover_stage: only one neighbour has {odd!r}; need stages of one shape ({FALL_BACK})"
        )
    share = first / (first + second)
    out = {}
    for name, one in before.items():
        other = behind[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            raise UsageError(
                f"recover_stage: {name!r} is {tuple(one.shape)} {one.dtype} before the lost stage "
                f"and {tuple(other.shape)} {other.dtype} behind it; need stages of one shape "
                f"({FALL_BACK})"
            )
        # In double precision, so that rounding back leaves equal neighbours as they are.
        mixed = share * one.double() + (1.0 - share) * other.double()
        out[name] = mixed.to(one.dtype)
    return out
