"""Local training: the loop over a peer's own data that every strategy shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.strategy import Step
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor import keyed, tree
from shoal.tensor.types import Key, Scalar, Vector

BATCH_BYTES = 256 << 20
"""Rows train in groups whose batches stay below this; a constant, whatever memory is free."""

DRAWN_BYTES = 16 << 20
"""What the samples of later steps may take."""

Correction = Callable[[Vector, Vector, Any], Vector]
"""(params [..., dim], grad [..., dim], context) -> the gradient to follow."""

Gradient = Callable[[Task, Vector, Batch], Vector]
"""(task, params [..., dim], batch) -> [..., dim]: what stands in for `task.grad`."""


class Optimizer(Protocol):
    """A rule from gradients to parameters. Frozen settings; the state is a tree, given back.

    Leading axes `[...]` are independent. With `donate` the caller gives up `params`, `grad` and
    `state`, which may then be overwritten and returned. `plain_lr` is the learning rate of a step
    that is `params - plain_lr * scale * grad` and nothing else, and None for all others.
    """

    @property
    def plain_lr(self) -> float | None: ...

    def init(self, params: Vector) -> Any:
        """State for parameters [..., dim]."""
        ...

    def step(
        self,
        params: Vector,
        grad: Vector,
        state: Any,
        scale: Tensor | float = 1.0,
        *,
        donate: bool = False,
    ) -> tuple[Vector, Any]:
        """One step; `scale` ([...] or a number) multiplies the learning rate."""
        ...


def descend(
    task: Task,
    optimizer: Optimizer,
    params: Vector,
    state: Any,
    step: Step,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 32,
    scale: Tensor | float = 1.0,
    correct: Correction | None = None,
    context: Any = None,
    gradient: Gradient | None = None,
    drift: Vector | None = None,
) -> tuple[Vector, Any]:
    """Train on a peer's own shard: (params [..., dim], state) after local steps; pure.

    Either `steps` batches drawn with replacement, or `epochs` passes over every sample. Keys come
    from `step.key`, so give each round its own. A row without samples in a batch takes no step,
    so a peer with fewer samples ends exactly as it would alone. `correct` may change each
    gradient (proximal terms); it sees `context`, a tree with the same leading axes. `drift`
    [..., dim] is added to every gradient (control variates). `gradient` replaces `task.grad` for
    methods that look at a batch more than once (sharpness-aware steps). `scale` multiplies the
    learning rate.
    """
    _check(steps, epochs, batch_size)
    lead = params.shape[:-1]
    rows, limit = math.prod(lead), _rows_at_once(task, batch_size)
    plan = (task, optimizer, correct, gradient, steps, epochs, batch_size)
    if rows <= limit:
        return _descend(plan, params, state, step.shard, step.key, scale, context, drift)
    many = (state, step.shard, step.key.expand(lead), context, scale, drift)
    flat = tree.map_tree(lambda leaf: _join(leaf, lead), (params, *many))
    done = []
    for start in range(0, rows, limit):
        part, *rest = tree.select(flat, slice(start, start + limit))
        part_state, shard, key, part_context, part_scale, part_drift = rest
        made = _descend(plan, part, part_state, shard, key, part_scale, part_context, part_drift)
        done.append(made)
    leaves = [tree.flatten(pair) for pair in done]
    joined = [torch.cat(column) for column in zip(*(found for found, _ in leaves), strict=True)]
    shaped = [leaf.view(*lead, *leaf.shape[1:]) for leaf in joined]
    return tree.unflatten(leaves[0][1], shaped)


def gradients(
    shard: Shard, *, steps: int | None = None, epochs: int | None = None, batch_size: int = 32
) -> Scalar:
    """How many steps `descend` takes with these settings: int64 [...], one for each row.

    >>> gradients(Shard(torch.zeros(2, 40).long(), torch.tensor([40, 0])), epochs=3).tolist()
    [6, 0]
    """
    _check(steps, epochs, batch_size)
    if steps is not None:
        return torch.where(shard.size > 0, steps, 0)
    return (epochs or 0) * -(-shard.size // batch_size)


def draws(task: Task, shard: Shard, key: Key, steps: range, size: int) -> Iterator[Batch]:
    """`task.batch(shard, fold(key, i), size)` for each of some steps i.

    Samples of several steps are drawn in one call: a draw costs as much as a small step.
    """
    for drawn in _drawn(task, shard, key, steps, size):
        yield from map(Batch, drawn.x, drawn.y, drawn.mask)


def _drawn(task: Task, shard: Shard, key: Key, steps: range, size: int) -> Iterator[Batch]:
    """Batches [some steps, ..., batch] of all steps, in order."""
    step_bytes = key.numel() * size * getattr(task, "sample_bytes", DRAWN_BYTES)
    ahead = max(1, DRAWN_BYTES // max(1, step_bytes))
    for first in range(0, len(steps), ahead):
        some = steps[first : first + ahead]
        numbers = torch.arange(some.start, some.stop, some.step, device=key.device)
        keys = keyed.fold(key, numbers.view(-1, *(1,) * key.dim()))
        yield task.batch(_repeated(shard, len(some)), keys, size)


def _repeated(shard: Shard, times: int) -> Shard:
    return tree.map_tree(lambda leaf: leaf.expand(times, *leaf.shape), shard)


def _descend(
    plan: tuple[Task, Optimizer, Correction | None, Gradient | None, int | None, int | None, int],
    params: Vector,
    state: Any,
    shard: Shard,
    key: Key,
    scale: Tensor | float,
    context: Any,
    drift: Vector | None,
) -> tuple[Vector, Any]:
    task, optimizer, correct, gradient, steps, epochs, batch_size = plan
    plain = optimizer.plain_lr
    fused = gradient is None and correct is None and not isinstance(scale, Tensor)
    if gradient is None:
        gradient = _plain
    if fused and plain is not None and steps:
        for drawn in _drawn(task, shard, key, range(steps), batch_size):
            params = task.walked(params, drawn, plain * float(scale), drift)
        return params, state
    # The caller's tensors stay whole: the first step makes new ones, which later steps overwrite.
    own = False
    for batch in _batches(task, shard, key, steps, epochs, batch_size):
        if fused and plain is not None:
            params, own = task.descended(params, batch, plain * float(scale), donate=own), True
            if drift is not None:
                params.sub_(_where_data(drift, batch), alpha=plain * float(scale))
            continue
        grad = gradient(task, params, batch)
        if drift is not None:
            grad = grad + _where_data(drift, batch)
        if correct is not None:
            grad = correct(params, grad, context)
        here = batch.mask.any(-1)
        # A plain step along a gradient of zero stays where it is.
        if (plain is not None and correct is None) or (here.is_cpu and bool(here.all())):
            params, state = optimizer.step(params, grad, state, scale, donate=own)
            own = True
        else:
            moved = optimizer.step(params, grad, state, scale)
            here = here.expand(params.shape[:-1])
            params, state = tree.where(here, moved, (params, state))
            own = True
    return params, state


def _where_data(drift: Vector, batch: Batch) -> Vector:
    """A row without samples takes no step."""
    here = batch.mask.any(-1)
    whole = here.is_cpu and bool(here.all())
    return drift if whole else torch.where(here.unsqueeze(-1), drift, 0.0)


def _plain(task: Task, params: Vector, batch: Batch) -> Vector:
    return task.grad(params, batch)


def _batches(
    task: Task, shard: Shard, key: Key, steps: int | None, epochs: int | None, size: int
) -> Iterator[Batch]:
    yield from draws(task, shard, key, range(steps or 0), size)
    for i in range(epochs or 0):
        yield from task.epoch(shard, keyed.fold(key, i), size)


def _rows_at_once(task: Task, batch_size: int) -> int:
    per_sample = getattr(task, "sample_bytes", 0)
    return max(1, BATCH_BYTES // max(1, per_sample * batch_size))


def _join(leaf: Tensor, lead: torch.Size) -> Tensor:
    return leaf.reshape(math.prod(lead), *leaf.shape[len(lead) :])


def _check(steps: int | None, epochs: int | None, batch_size: int) -> None:
    if (steps is None) == (epochs is None):
        raise UsageError("descend: give either steps or epochs")
    count = steps if steps is not None else epochs
    if count is None or count < 0 or batch_size < 1:
        raise UsageError(
            f"descend: steps={steps}, epochs={epochs}, batch_size={batch_size}; counts must be "
            "at least 0 and a batch at least 1"
        )
