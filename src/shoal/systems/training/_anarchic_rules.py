"""Anarchic federated learning: what a worker returns, and the two servers.

Workers return G_i = (1 / K_i) * sum of the K_i gradients on their way, so the local rate is not in
it and both rates multiply at the server: x <- x - server_lr * local_lr * (mean of G).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.asynchronous.buffered import BufferedCourse, weighted_sum
from shoal.parts.asynchronous.local import Uneven
from shoal.parts.asynchronous.rule import Action, Delta, Drop, Moment
from shoal.parts.asynchronous.staleness import Staleness
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor.types import Index, Key, Mask, Scalar, Vector, Weight

STARTS = ("pass", "filled")
PATIENCE = 20


@dataclass(frozen=True)
class MeanGradient:
    """The mean of the gradients of a worker's local SGD steps of rate `lr`.

    With one step it is the gradient at the model that was pulled, bit for bit. per_step False: the
    sum, so that who does more counts for more.
    """

    lr: float
    batch_size: int = 32
    per_step: bool = True

    def __call__(self, task: Task, params: Vector, shard: Shard, key: Key, steps: Scalar) -> Vector:
        rows = Uneven(params, shard, key, steps)
        place, total = rows.params.clone(), torch.zeros_like(rows.params)
        for part, block in rows.blocks(task, self.batch_size):
            own, gone = place[part], total[part]
            for batch in map(Batch, block.x, block.y, block.mask):
                gradient = task.grad(own, batch)
                gone.add_(gradient)
                own.sub_(gradient, alpha=self.lr)
        if self.per_step:
            total = total / rows.steps.clamp(min=1).to(total.dtype).unsqueeze(-1)
        return rows.back(total)


@dataclass(frozen=True)
class _Anarchic:
    """buffer: returns per version (m); server_lr, local_lr: both rates; hold: see `Buffered`."""

    buffer: int = 5
    server_lr: float = 1.0
    local_lr: float = 0.05
    staleness: Staleness = field(default_factory=Staleness)
    hold: bool = False

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise UsageError(f"anarchic: buffer={self.buffer}; need at least 1 (raise it)")
        for name in ("server_lr", "local_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(
                    f"anarchic: {name}={getattr(self, name)}; need a finite rate above 0"
                )

    @property
    def rate(self) -> float:
        """What the mean return is multiplied by."""
        return self.server_lr * self.local_lr

    def course(self, clients: Sequence[int]) -> BufferedCourse:
        return BufferedCourse(self.buffer, self.staleness, self.hold)


@dataclass(frozen=True)
class AFA_CD(_Anarchic):
    """Cross-device: a step along the mean of the first `buffer` returns, whoever they are of.

    Where some workers return more often, their data count for more: the gradient of the true mean
    does not vanish at the point that this settles at.
    Source: Yang et al. 2022, algorithm 1 (arXiv 2108.09875).

    >>> rule = AFA_CD(buffer=1, server_lr=2.0, local_lr=0.5)
    >>> rule.step(torch.ones(1), None, torch.tensor([[0.25]]), torch.ones(1), torch.tensor([1]))[0]
    tensor([0.7500])
    """

    def init(self, params: Vector, clients: Sequence[int]) -> None:
        return None

    def step(
        self, params: Vector, state: Any, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Any]:
        return params - self.rate * weighted_sum(vectors, weights), state


@dataclass(frozen=True)
class Memory:
    """The last return of every worker: rows, one [dim] each; clients int64 [workers], ascending.

    total [dim] is the sum of the rows, kept up to date by differences; filled bool [workers].
    Takes workers times dim numbers.
    """

    clients: Index
    rows: tuple[Vector, ...]
    total: Vector
    filled: Mask


@dataclass(frozen=True)
class AFA_CS(_Anarchic):
    """Cross-silo: new returns replace the workers' old ones, and the step is along the mean of all.

    start: "pass" waits until every worker has returned once (the paper's first pass), or one of
    them 20 times; "filled" begins at once. Either averages over those who have returned, never over
    zeros. A return that the staleness
    counts less moves its row by that part only.

    Keeps one vector for each worker at the server. Breaks with workers who never come back: their
    last return is used for ever.
    Source: Yang et al. 2022, algorithm 2 (arXiv 2108.09875).
    """

    start: str = "pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise UsageError(f"anarchic: start={self.start!r}; need one of {', '.join(STARTS)}")

    def init(self, params: Vector, clients: Sequence[int]) -> Memory:
        device = params.device
        return Memory(
            torch.tensor(list(clients), dtype=torch.int64, device=device),
            tuple(torch.zeros_like(params) for _ in clients), torch.zeros_like(params),
            torch.zeros(len(clients), dtype=torch.bool, device=device),
        )  # fmt: skip

    def step(
        self, params: Vector, state: Memory, vectors: Tensor, weights: Weight, clients: Index
    ) -> tuple[Vector, Memory]:
        rows, total, filled = list(state.rows), state.total, state.filled.clone()
        parts = (weights * len(vectors)).to(params.dtype)
        known = {client: row for row, client in enumerate(state.clients.tolist())}
        for place, client in enumerate(clients.tolist()):
            row = known[client]
            # The first return of a worker is all that is known of it, however late.
            part = torch.where(filled[row], parts[place], torch.ones_like(parts[place]))
            change = part * (vectors[place] - rows[row])
            rows[row] = rows[row] + change
            total = total + change
            filled[row] = True
        mean = total / filled.sum().clamp(min=1)
        return params - self.rate * mean, Memory(state.clients, tuple(rows), total, filled)

    def course(self, clients: Sequence[int]) -> BufferedCourse:
        if self.start == "filled":
            return super().course(clients)
        return FirstPass(self.buffer, self.staleness, self.hold, clients)


class FirstPass(BufferedCourse):
    """No version before every client has returned once; it is made from the last return of each.

    Who has not returned when another one has done so `PATIENCE` times is not waited for.
    """

    def __init__(self, size: int, staleness: Staleness, hold: bool, clients: Sequence[int]) -> None:
        super().__init__(size, staleness, hold)
        self.clients = frozenset(clients)

    def arrived(self, delta: Delta, at: Moment) -> list[Action]:
        if at.version > 0:
            return super().arrived(delta, at)
        old = [each for each in self.buffer if each.client == delta.client]
        self.buffer = [each for each in self.buffer if each.client != delta.client]
        actions: list[Action] = [Drop(each, "superseded") for each in old]
        self.buffer.append(delta)
        everybody = self.clients <= {each.client for each in self.buffer}
        if everybody or delta.number >= PATIENCE:
            actions += self.advance(at)
        return actions
