"""What clients compute between pull and push, each with a number of local steps of its own.

Clients that work at the same time are rows of one call on the event engine. Rows with more steps
come first, so that those that are done are left out of the later steps without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.rounds.local import BATCH_BYTES, Optimizer
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor import keyed, tree
from shoal.tensor.types import Key, Scalar, Vector

DRAWN_BYTES = 16 << 20
"""What the samples of later steps may take; a constant, whatever memory is free."""


class Work(Protocol):
    """Frozen, hashable settings of what a client hands in."""

    def __call__(self, task: Task, params: Vector, shard: Shard, key: Key, steps: Scalar) -> Vector:
        """The work [..., dim] of `steps` (int64 [...]) local steps from params [..., dim]; pure."""
        ...


def perform(
    params: Vector, shard: Shard, key: Key, steps: Scalar, task: Task, work: Work
) -> Vector:
    """A client's computation: `work` with what is the same for all as constants."""
    return work(task, params, shard, key, steps)


class Uneven:
    """Rows of one call, those with more steps first.

    params [rows, dim], shard, key and steps are in that order, and copies; `back` undoes it.

    >>> shard = Shard(torch.zeros(2, 1).long(), torch.ones(2).long())
    >>> params, key = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0])
    >>> rows = Uneven(params, shard, key, torch.tensor([1, 3]))
    >>> rows.params.tolist(), rows.active, rows.back(rows.params).tolist()
    ([[2.0], [1.0]], [2, 1, 1], [[1.0], [2.0]])
    """

    def __init__(self, params: Vector, shard: Shard, key: Key, steps: Scalar) -> None:
        self.lead = params.shape[:-1]
        flat = tree.map_tree(self._join, (params, shard, key, steps))
        self.order = flat[3].argsort(descending=True, stable=True)
        self.params, self.shard, self.key, self.steps = tree.select(flat, self.order)
        counts = self.steps.tolist()
        most = counts[0] if counts else 0
        self.active = [sum(count > step for count in counts) for step in range(most)]
        """how many rows, the first ones, still make each step"""

    def _join(self, leaf: Tensor) -> Tensor:
        return leaf.reshape(math.prod(self.lead), *leaf.shape[len(self.lead) :])

    def batches(self, task: Task, size: int) -> Iterator[tuple[slice, Batch]]:
        """(rows, their batch) of each step; a step of many rows comes in pieces."""
        for rows, block in self.blocks(task, size):
            for batch in map(Batch, block.x, block.y, block.mask):
                yield rows, batch

    def blocks(self, task: Task, size: int) -> Iterator[tuple[slice, Batch]]:
        """(rows, their batches [steps, rows, size]) of steps in a row that the same rows make."""
        per_row = max(1, getattr(task, "sample_bytes", 0) * size)
        rows_at_once = max(1, BATCH_BYTES // per_row)
        step = 0
        while step < len(self.active):
            active = self.active[step]
            # Samples of several steps are drawn in one call: a draw costs as much as a small step.
            ahead = max(1, DRAWN_BYTES // (per_row * active))
            for start in range(0, active, rows_at_once):
                rows = slice(start, min(active, start + rows_at_once))
                yield from self._drawn(task, size, rows, range(step, step + ahead))
            step += ahead

    def _drawn(
        self, task: Task, size: int, rows: slice, steps: range
    ) -> Iterator[tuple[slice, Batch]]:
        """Blocks of these steps of some rows; what a row would draw alone."""
        active = [
            min(rows.stop, count) - rows.start for count in self.active[steps.start : steps.stop]
        ]
        active = [count for count in active if count > 0]
        shard, key = tree.select((self.shard, self.key), rows)
        keys = keyed.fold(
            key,
            torch.arange(steps.start, steps.start + len(active), device=key.device).unsqueeze(-1),
        )
        shard = tree.map_tree(lambda leaf: leaf.expand(len(active), *leaf.shape), shard)
        drawn = task.batch(shard, keys, size)
        first = 0
        for count, same in groupby(active):
            last = first + sum(1 for _ in same)
            yield (
                slice(rows.start, rows.start + count),
                Batch(*(leaf[first:last, :count] for leaf in (drawn.x, drawn.y, drawn.mask))),
            )
            first = last

    def back(self, rows: Tensor) -> Tensor:
        """Rows [rows, *] as the call had them, [..., *]."""
        out = torch.empty_like(rows)
        out[self.order] = rows
        return out.view(*self.lead, *rows.shape[1:])


@dataclass(frozen=True)
class Displacement:
    """Local model minus the one pulled, after steps of `optimizer`, which starts afresh each time.

    per_step: divided by the number of steps, so that a client that does more does not count for
    more (FedNova's normalised update).
    """

    optimizer: Optimizer
    batch_size: int = 32
    per_step: bool = False

    def __call__(self, task: Task, params: Vector, shard: Shard, key: Key, steps: Scalar) -> Vector:
        rows = Uneven(params, shard, key, steps)
        moved, rate = rows.params.clone(), self.optimizer.plain_lr
        if rate is not None:
            for part, block in rows.blocks(task, self.batch_size):
                moved[part] = task.walked(moved[part], block, rate)
        else:
            state = self.optimizer.init(moved)
            for part, batch in rows.batches(task, self.batch_size):
                state = self._step(task, moved, state, part, batch)
        work = moved - rows.params
        if self.per_step:
            work = work / rows.steps.clamp(min=1).to(work.dtype).unsqueeze(-1)
        return rows.back(work)

    def _step(self, task: Task, params: Vector, state: Any, part: slice, batch: Batch) -> Any:
        """One step of some rows of params, in place."""
        own = params[part]
        before = (own, tree.select(state, part))
        moved = self.optimizer.step(own, task.grad(own, batch), before[1])
        # A row without samples takes no step.
        moved = tree.where(batch.mask.any(-1), moved, before)
        leaves, structure = tree.flatten(state)
        for leaf, new in zip(leaves, tree.flatten(moved[1])[0], strict=True):
            leaf[part] = new
        own.copy_(moved[0])
        return tree.unflatten(structure, leaves)
