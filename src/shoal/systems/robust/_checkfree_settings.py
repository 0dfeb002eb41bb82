"""The model, text and training that the pipeline of peers and the trainer in one process share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from shoal.parts.models.transformer import Transformer
from shoal.parts.optimise.adamw import AdamW
from shoal.parts.pipeline.check_free import CheckFree
from shoal.parts.pipeline.failure_trace import FailureTrace
from shoal.parts.pipeline.plan import Plan
from shoal.parts.pipeline.staged_model import StagedModel
from shoal.parts.pipeline.swap_schedule import SwapSchedule
from shoal.parts.pipeline.topic_text import TopicText


@dataclass(frozen=True)
class Training:
    """A transformer of one block per stage that learns the standard library's help topics.

    swaps: None = if the recovery needs them. pretrained: the first layers of SmolLM2-135M, one to a
    stage, on Shakespeare instead; width and heads are the model's own then.
    """

    stages: int
    recovery: CheckFree
    swaps: bool | None = None
    width: int = 32
    heads: int = 4
    length: int = 32
    batch_size: int = 12
    micro: int = 2
    lr: float = 2e-3
    clip: float = math.inf
    held_out: int = 64
    pretrained: bool = False

    @property
    def swapped(self) -> bool:
        """Whether half of the microbatches exchange the order of stages."""
        return self.recovery.plus if self.swaps is None else self.swaps


@lru_cache(maxsize=32)
def plan_of(training: Training) -> Plan:
    """The plan of a training; peers of one process share its model."""
    if training.pretrained:
        from shoal.systems.robust._checkfree_smollm2 import PlayText, Pretrained

        text = PlayText(training.length, training.held_out)
        module = Pretrained(training.stages, training.length)
    else:
        text = TopicText(training.length, training.held_out)
        module = Transformer(
            training.width, training.stages, training.heads, positions="learned", tied=True
        ).build((training.length,), text.vocabulary)
    return Plan(
        StagedModel(module, training.stages),
        text,
        SwapSchedule(training.stages, training.micro, training.swapped),
        AdamW(training.lr, weight_decay=0.0),
        training.recovery,
        training.batch_size,
        training.clip,
    )


Where = Literal["nowhere", "middle", "stages", "all"]
_EXECUTED = 8
"""A drawn trace reaches so many times as far as there are iterations to be applied."""


def parts_at(where: Where, stages: int) -> tuple[int, ...]:
    """Which parts may fail: none, all but the ends and part 0, all but part 0, or all."""
    first = {"nowhere": stages + 1, "middle": 2, "stages": 1, "all": 0}[where]
    return tuple(range(first, stages + (where != "middle")))


def drawn(where: Where, rate: float, stages: int, iterations: int, seed: int) -> FailureTrace:
    """The failures of a seed: the same for every method and every length of training."""
    return FailureTrace.bernoulli(
        rate, stages=stages, iterations=_EXECUTED * iterations, seed=seed,
        among=parts_at(where, stages),
    )  # fmt: skip
