"""The training data of all peers as one set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Vector


class Pool:
    """The data of all peers as one set, through nothing but the task's contract."""

    def __init__(self, task: Task) -> None:
        self._task = task
        shard: Shard = task.shard(torch.arange(task.peers, device="cpu"))
        self._size = max(1, int(shard.size.max()))
        self._batches = list(self._pass(shard))
        counts = [batch.mask.sum(-1) for batch in self._batches]
        self._total = sum(int(count.sum()) for count in counts)
        if self._total == 0:
            raise UsageError("measure: no peer has data (give the task samples)")
        self._shares: list[Tensor] = [count.double() / self._total for count in counts]

    def _pass(self, shard: Shard) -> Iterator[Batch]:
        key = keyed.grid(keyed.key_of(0, "pool", device=str(shard.size.device)), self._task.peers)
        return self._task.epoch(shard, key, self._size)

    def loss(self, params: Vector) -> float:
        rows = params.expand(self._task.peers, -1)
        pairs = zip(self._batches, self._shares, strict=True)
        return sum(float((self._task.loss(rows, b).double() * s).sum()) for b, s in pairs)

    def grad(self, params: Vector) -> Vector:
        rows = params.expand(self._task.peers, -1)
        total = torch.zeros_like(params)
        for batch, share in zip(self._batches, self._shares, strict=True):
            total += share.to(params.dtype) @ self._task.grad(rows, batch)
        return total
