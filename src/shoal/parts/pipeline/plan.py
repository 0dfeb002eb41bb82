"""What is trained in a pipeline, and how: all that peers and the trainer in one process share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.pipeline.base import StageState
from shoal.parts.pipeline.check_free import CheckFree
from shoal.parts.pipeline.staged_model import StagedModel
from shoal.parts.pipeline.swap_schedule import SwapSchedule
from shoal.rounds.local import Optimizer
from shoal.tensor.types import Key


class Text(Protocol):
    """What is learned, such as `TopicText`."""

    @property
    def length(self) -> int:
        """Tokens in a window, without the one behind it."""
        ...

    @property
    def validation(self) -> Tensor:
        """Windows to validate on [held_out, length + 1]."""
        ...

    def batch(self, key: Key, size: int) -> Tensor:
        """Windows to learn from [size, length + 1], by key."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """Model, text, order of the stages, optimiser, and how lost stages are rebuilt.

    batch_size: windows in a microbatch; clip: the largest norm of a part's gradient. Keys follow
    from the run's seed and the peer that holds a part (`peer.key`, or `key_of(seed, "peer", part,
    ...)`), so that a pipeline of peers and a trainer in one process make the same numbers.
    """

    model: StagedModel
    text: Text
    schedule: SwapSchedule
    optimizer: Optimizer
    recovery: CheckFree = field(default_factory=CheckFree)
    batch_size: int = 12
    clip: float = math.inf

    def __post_init__(self) -> None:
        if self.model.stages != self.schedule.stages:
            raise UsageError(
                f"plan: a model of {self.model.stages} stages and a schedule for "
                f"{self.schedule.stages}; need one number"
            )
        if self.batch_size < 1 or not self.clip > 0:
            raise UsageError(
                f"plan: batch_size={self.batch_size}, clip={self.clip}; need at least 1 window and "
                "a norm above 0"
            )
        if self.recovery.plus and not self.schedule.swaps:
            raise UsageError(
                "plan: plus without swaps; a stage acts as another one only if it has learned to "
                "(set swaps in the schedule)"
            )

    @property
    def stages(self) -> int:
        """How many there are beside part 0."""
        return self.model.stages

    def begun(self, part: int, key: Key) -> StageState:
        """A part's state before the first iteration."""
        params = self.model.drawn(part, key)
        return StageState(params, self.optimizer.init(params))

    def rebuilt(self, part: int, given: dict[int, StageState], key: Key) -> StageState:
        """The state of a lost stage 1 to L: its neighbours' parameters, a fresh optimiser."""
        fresh = self.model.drawn(part, key)
        params = self.recovery.rebuilt(part, self.stages, given, fresh)
        return StageState(params, self.optimizer.init(params), self.recovery.lr_boost)

    def restored(self, copy: Tensor) -> StageState:
        """The state of part 0 from a copy of its parameters, exact but for the optimiser."""
        return StageState(copy, self.optimizer.init(copy))

    def batch(self, key: Key) -> tuple[Tensor, Tensor]:
        """Tokens and targets [batch, length] of a microbatch."""
        windows = self.text.batch(key, self.batch_size)
        return windows[:, :-1], windows[:, 1:]
