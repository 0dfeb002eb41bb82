"""The workers of anarchic federated learning: when they return, how much they do, and why.

They are the ones who decide, each by its own draws and its own data; nothing of this is known to
the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.learning import Pace
from shoal.parts.asynchronous.participation import (
    Battery,
    Diurnal,
    Exponential,
    Habits,
    Rest,
)
from shoal.rounds.task import Task
from shoal.tensor import keyed

HOURS = ("any", "diurnal", "battery")


@dataclass(frozen=True)
class Speeds:
    """What a local step takes at each client: (client, seconds) pairs, `step_s` for the others."""

    step_s: float
    slow: tuple[tuple[int, float], ...] = ()

    def seconds(self, client: int, number: int, steps: int) -> float:
        return steps * dict(self.slow).get(client, self.step_s)


@dataclass(frozen=True)
class Crowd:
    """Settings of all workers; see `AnarchicFL`.

    Everybody's time from one return to the next has the same mean: that of the longest work, and
    rest_s; who does less rests longer. With bias b by "rest" it is b times as long for those whose
    data are mostly of the second half of the classes; by "speed" their steps take b times as long,
    and nobody rests longer for that. hours "diurnal" and "battery" replace these rests by days that
    are shifted from worker to worker, and by batteries that charge unevenly fast.
    """

    steps: int
    most_steps: int
    rest_s: float
    step_s: float
    bias: float
    bias_by: str
    effort: str
    hours: str = "any"

    def __post_init__(self) -> None:
        if self.hours not in HOURS:
            raise UsageError(f"anarchic: hours={self.hours!r}; need one of {', '.join(HOURS)}")
        by_rest = self.bias > 1 and self.bias_by == "rest"
        if self.hours != "any" and (by_rest or not (self.rest_s > 0 and self.step_s > 0)):
            raise UsageError(
                f"anarchic: hours={self.hours!r} with bias={self.bias} by {self.bias_by}, "
                f"rest_s={self.rest_s}, step_s={self.step_s}; days and batteries are as long as "
                "these times say, and equal for all (set the times, and bias_by='speed')"
            )
        if self.bias_by not in ("rest", "speed") or self.effort not in ("any", "class"):
            raise UsageError(
                f"anarchic: bias_by={self.bias_by!r}, effort={self.effort!r}; need rest or speed, "
                "and any or class"
            )
        if not (0 <= self.rest_s < math.inf and 0 <= self.step_s < math.inf):
            raise UsageError(
                f"anarchic: rest_s={self.rest_s}, step_s={self.step_s}; need finite times >= 0"
            )
        if not 1 <= self.bias < math.inf:
            raise UsageError(f"anarchic: bias={self.bias}; need 1 (none) or more")
        if self.bias > 1 and not (self.step_s > 0 and (self.rest_s > 0 or self.bias_by == "speed")):
            raise UsageError(
                f"anarchic: bias={self.bias} with rest_s={self.rest_s}, step_s={self.step_s}; who "
                "returns how often follows from these times (set them)"
            )
        Habits(self.steps, self.most_steps)

    def of(self, task: Task, workers: Sequence[int]) -> tuple[Habits, Pace | None]:
        """Habits and speeds of these workers, who look at their own data if they are biased."""
        biased = self.bias > 1 or self.effort == "class"
        eager = [early_classes(task, worker) if biased else True for worker in workers]
        pace = None
        if self.step_s:
            slow = self.step_s * (self.bias if self.bias_by == "speed" else 1.0)
            pairs = zip(workers, eager, strict=True)
            pace = Speeds(self.step_s, tuple((w, slow) for w, first in pairs if not first))
        ranges = [(self.steps, self.most_steps)] * len(workers)
        if self.effort == "class":
            ranges = [(n, n) for n in (self.most_steps if e else self.steps for e in eager)]
        by_client = tuple((w, *span) for w, span in zip(workers, ranges, strict=True))
        if self.hours != "any":
            return Habits(self.steps, self.most_steps, self._hours(), by_client), pace
        works_s = [self.step_s * (low + high) / 2 for low, high in ranges]
        cycle_s = max(works_s) + self.rest_s
        longer = self.bias if self.bias_by == "rest" else 1.0
        rests = [
            cycle_s * (1.0 if first else longer) - work
            for first, work in zip(eager, works_s, strict=True)
        ]
        means = tuple(zip(workers, rests, strict=True))
        rest = Exponential(cycle_s, means) if max(rests) > 0 else None
        return Habits(self.steps, self.most_steps, rest, by_client), pace

    def _hours(self) -> Rest:
        """Days of ten works and rests of which a third is open, or batteries for three works."""
        mean = (self.steps + self.most_steps) / 2
        cycle_s = mean * self.step_s + self.rest_s
        if self.hours == "diurnal":
            return Diurnal(10.0 * cycle_s, 1 / 3)
        most = float(self.most_steps)
        return Battery(3.0 * most, mean / cycle_s, most, spread=1.0)


def early_classes(task: Task, worker: int) -> bool:
    """Whether the commonest class of a worker's data is in the first half of all classes."""
    shard = task.shard(worker)
    size = int(shard.size)
    if not size:
        return True
    key = keyed.key_of(0, "look", device=shard.size.device)
    batch = next(iter(task.epoch(shard, key, size)))
    classes = getattr(task, "classes", None)
    if classes is None or batch.y.is_floating_point():
        raise UsageError(
            "anarchic: bias and effort by class need a task with classes (set bias=1, effort='any')"
        )
    labels = batch.y[batch.mask].reshape(-1)
    return int(torch.bincount(labels, minlength=classes).argmax()) < classes // 2
