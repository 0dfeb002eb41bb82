"""What is measured about the peers' models: the same numbers from every engine.

Per peer: the task's own metrics (`accuracy`, `loss`). Over all honest peers that reported for a
round, with peer -1: `consensus` (mean squared distance to the mean model, [dim] not averaged),
`drift` (distance of the farthest peer to the mean model) and the metrics of the mean model as
`mean_model_accuracy`, `mean_model_loss`. Costly measures that a scenario names (`measures`, the
role `measure`) are taken once, of the mean model of the last round, unless they say `each`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.base import keyed
from shoal.rounds.task import Task
from shoal.tensor.types import Vector
from shoal.world.record import Row


class ModelMeasure(Protocol):
    """What is worth knowing about one model, such as its flatness.

    With `each = True` on the class it is taken whenever models are evaluated, not at the end alone.
    With `of_peers = True` it is taken then of each evaluated peer's own model in place of the mean
    one: parameters [..., dim] give tensors [...]. Optional: bind(attack) -> the measure for the
    scenario's attack.
    """

    def __call__(self, task: Task, params: Vector) -> Mapping[str, Any]:
        """Numbers by name for parameters [dim]."""
        ...


class Measure:
    """Collects models by round and evaluates them in batches; an `Observer` of the event engine.

    evaluated: how many honest peers are evaluated one by one (drawn by key; None = all); of_mean:
    what is taken of mean models, see `ModelMeasure`.
    """

    def __init__(
        self, task: Task, *, seed: int = 0, byzantine: tuple[int, ...] = (),
        evaluated: int | None = None, of_mean: Sequence[ModelMeasure] = (),
    ) -> None:  # fmt: skip
        self.task = task
        self._of_peers = tuple(m for m in of_mean if getattr(m, "of_peers", False))
        self._each = tuple(m for m in of_mean if getattr(m, "each", False))
        self._final = tuple(m for m in of_mean if m not in (*self._each, *self._of_peers))
        self.last: tuple[int, float, Tensor] | None = None
        """round, time and mean model of the round that was closed last"""
        honest = [p for p in range(task.peers) if p not in set(byzantine)]
        if evaluated is not None and evaluated < len(honest):
            honest_first = sorted(honest, key=lambda p: keyed.uniform(seed, "evaluated", p))
            self._chosen = frozenset(honest_first[:evaluated])
        else:
            self._chosen = frozenset(honest)
        self._honest = frozenset(honest)
        self._open: dict[int, dict[int, tuple[float, Tensor]]] = {}
        self.taken: list[Row] = []
        """measured in the rounds that are closed"""

    def params(self, peer: int, round: int, time_s: float, params: Tensor) -> None:
        """One peer's model after a round; a later one for the same round replaces it."""
        if peer not in self._honest:
            return
        self._open.setdefault(round, {})[peer] = (time_s, params)
        # Stragglers may be some rounds behind; older rounds than that are complete.
        if len(self._open) > 8:
            self._close(min(self._open))

    def stacked(self, round: int, times_s: Tensor, present: Tensor, params: Tensor) -> None:
        """All peers' models after a round: times [peers], present [peers], params [peers, dim]."""
        times = times_s.tolist()
        group = {
            p: (times[p], params[p]) for p, here in enumerate(present.tolist())
            if here and p in self._honest
        }  # fmt: skip
        if group:
            self._open[round] = group
            self._close(round)

    def rows(self) -> list[Row]:
        """Everything measured; closes what is still open."""
        for round in sorted(self._open):
            self._close(round)
        if self.last is not None:
            round, time_s, mean = self.last
            self._take(self._final, round, time_s, mean)
            self.last = None
        rows, self.taken = self.taken, []
        return sorted(rows, key=lambda row: row.round)

    def _take(
        self, measures: Sequence[ModelMeasure], round: int, time_s: float, mean: Tensor
    ) -> None:
        for measure in measures:
            found = measure(self.task, mean).items()
            self.taken.extend(Row(name, float(value), time_s, round) for name, value in found)

    def _close(self, round: int) -> None:
        group = self._open.pop(round)
        peers = sorted(group)
        # Peers of a hub share one tensor: evaluate each model once.
        distinct: dict[int, int] = {}
        models: list[Tensor] = []
        place = {}
        for peer in peers:
            params = group[peer][1]
            index = distinct.setdefault(params.data_ptr(), len(models))
            if index == len(models):
                models.append(params)
            place[peer] = index
        stack = torch.stack(models)
        counts = torch.bincount(
            torch.tensor([place[p] for p in peers], device="cpu"), minlength=len(models)
        )
        counts = counts.to(stack.device, stack.dtype, non_blocking=True)
        mean = (counts.unsqueeze(-1) * stack).sum(0) / len(peers)
        last = max(time_s for time_s, _ in group.values())
        self.last = (round, last, mean)
        apart = ((stack - mean) ** 2).sum(-1)
        whole = {"consensus": (apart * counts).sum() / len(peers), "drift": apart.max().sqrt()}
        whole |= {f"mean_model_{k}": v for k, v in self.task.evaluate(mean).items()}
        # One look at a device for all numbers: each look waits until it has finished.
        numbers = torch.stack([value.double() for value in whole.values()]).tolist()
        self.taken.extend(
            Row(name, number, last, round) for name, number in zip(whole, numbers, strict=True)
        )
        self._take(self._each, round, last, mean)
        chosen = [p for p in peers if p in self._chosen]
        if not chosen:
            return
        needed = sorted({place[p] for p in chosen})
        row_of = {index: i for i, index in enumerate(needed)}
        index = torch.tensor(needed, device="cpu").to(stack.device, non_blocking=True)
        values = dict(self.task.evaluate(stack[index]))
        for measure in self._of_peers:
            values |= measure(self.task, stack[index])
        columns = torch.stack([column.double() for column in values.values()]).tolist()
        for name, column in zip(values, columns, strict=True):
            self.taken.extend(
                Row(name, column[row_of[place[p]]], group[p][0], round, p) for p in chosen
            )
