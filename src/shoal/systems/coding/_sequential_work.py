"""The arithmetic of sequential gradient coding: samples in chunks, mini-tasks, full gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from shoal.parts.coding.sequential_scheme import MiniTask
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Mask, Vector

DATA = 0
"""The peer whose shard is the data set that all gradients are taken over."""


@dataclass(frozen=True, eq=False)
class Chunked:
    """A data set in chunks that are as near to fractions of it as samples can be divided.

    Every sample is in one chunk, and a chunk counts by its samples, so that the sum over all chunks
    is the full gradient exactly, whatever the fractions are.
    """

    task: Task
    edges: tuple[int, ...]
    widest: tuple[int, ...]
    """Of each chunk, how many samples the largest chunk of its fraction has."""

    @classmethod
    def of(cls, task: Task, sizes: Sequence[float]) -> Chunked:
        samples = int(task.shard(DATA).size)
        marks = np.cumsum(np.array([0.0, *sizes])) * samples
        edges = tuple(int(mark) for mark in np.round(marks))
        counts = [stop - start for start, stop in pairwise(edges)]
        most: dict[float, int] = {}
        for size, count in zip(sizes, counts, strict=True):
            most[size] = max(1, count, most.get(size, 0))
        return cls(task, edges, tuple(most[size] for size in sizes))

    @property
    def samples(self) -> int:
        return self.edges[-1]

    def count(self, chunk: int) -> int:
        return self.edges[chunk + 1] - self.edges[chunk]

    def batch(self, mini: MiniTask) -> tuple[Batch, Tensor]:
        """What a mini-task goes over: a batch [chunks, most], and what the mean gradient of each
        chunk is multiplied with, float64 [chunks]."""
        # One size for all workers' tasks of a kind, so that they can be computed as one.
        most = max(self.widest[chunk] for chunk in mini.chunks)
        batches = [self._samples(chunk, most) for chunk in mini.chunks]
        share = [
            weight * self.count(chunk) / self.samples
            for chunk, weight in zip(mini.chunks, mini.weights, strict=True)
        ]
        x = torch.stack([batch.x for batch in batches])
        y = torch.stack([batch.y for batch in batches])
        mask = torch.stack([batch.mask for batch in batches])
        return Batch(x, y, mask), torch.tensor(share, dtype=torch.float64, device=x.device)

    def _samples(self, chunk: int, most: int) -> Batch:
        start, stop = self.edges[chunk], self.edges[chunk + 1]
        whole = everything(self.task)
        pad = most - (stop - start)
        x, y, mask = (leaf[start:stop] for leaf in (whole.x, whole.y, whole.mask))
        return Batch(_padded(x, pad), _padded(y, pad), _padded(mask, pad))


def _padded(leaf: Tensor, pad: int) -> Tensor:
    return torch.cat([leaf, leaf.new_zeros((pad, *leaf.shape[1:]))])


@lru_cache(maxsize=4)
def everything(task: Task) -> Batch:
    """All samples in one batch, in an order that is the same for everybody."""
    shard = task.shard(DATA)
    key = keyed.key_of(0, "whole data", device=shard.size.device)
    size = int(shard.size)
    own = Shard(shard.index[..., :size], shard.size, shard.labels, shard.until)
    return next(iter(task.epoch(own, key, size)))


def mini_gradient(
    params: Vector, x: Tensor, y: Tensor, mask: Mask, share: Tensor, task: Task
) -> Vector:
    """The combination [..., dim] of the chunks' gradients, for params [..., dim], x
    [..., chunks, most, *features] and share [..., chunks]."""
    chunks = share.shape[-1]
    rows = params.unsqueeze(-2).expand(*params.shape[:-1], chunks, params.shape[-1])
    gradients = task.grad(rows, Batch(x, y, mask))
    return (share.unsqueeze(-1) * gradients).sum(-2)


def full_gradient(params: Vector, task: Task) -> Vector:
    """The gradient over all samples, computed in one piece."""
    return task.grad(params, everything(task))


def full_loss(params: Vector, task: Task) -> float:
    return float(task.loss(params, everything(task)))
