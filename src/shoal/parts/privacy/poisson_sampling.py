"""Records drawn independently of each other, as accountants of sampling assume; or dealt out.

Both give a part of a shard, whose clipped gradients are summed with no sample twice.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from shoal.parts.privacy.secret_keys import Secrets, draw_keys
from shoal.rounds.task import Shard, Task
from shoal.tensor.keyed import fold, uniform
from shoal.tensor.types import Key, Mask, Vector


def drawn(shard: Shard, key: Key, p: float, secrets: Secrets = "run") -> Shard:
    """The part of a shard that a round uses: each sample with probability p, by itself.

    shard, key: leading axes [...]. Sizes differ from draw to draw; samples keep their order.
    Amplification by sampling holds against those who do not know the key, and with secrets =
    "system" against everybody (see `parts.privacy.secret_keys`).

    >>> shard = Shard(torch.arange(1000), torch.tensor(1000))
    >>> drawn(shard, torch.tensor(1), 0.5).size
    tensor(499)
    """
    places = torch.arange(shard.index.shape[-1], device=key.device)
    coins = uniform(draw_keys(fold(key, "records"), len(places), secrets))
    return _kept(shard, coins < p, places)


def dealt(shard: Shard, part: Tensor, parts: int) -> Shard:
    """The samples whose place in the shard is `part` modulo `parts`: each is in one part.

    part: int64 [...]. Nobody draws anything. A sample stays in its part whether others are there or
    not as long as the place of one that is missing stays empty, which is what neighbours are here.

    >>> shard = Shard(torch.arange(10), torch.tensor(8))
    >>> some = dealt(shard, torch.tensor(1), 3)
    >>> some.index[: some.size]
    tensor([1, 4, 7])
    """
    places = torch.arange(shard.index.shape[-1], device=part.device)
    return _kept(shard, places % parts == part.unsqueeze(-1), places)


def _kept(shard: Shard, chosen: Mask, places: Tensor) -> Shard:
    """A shard's samples at the chosen places [..., most], in their order."""
    chosen = chosen & (places < shard.size.unsqueeze(-1))
    order = torch.where(chosen, 0, 1).argsort(dim=-1, stable=True)
    index = shard.index.expand(order.shape).gather(-1, order)
    labels = shard.labels
    if labels is not None:
        tail = labels.shape[shard.index.dim() :]
        wide = order.view(*order.shape, *(1 for _ in tail)).expand(*order.shape, *tail)
        labels = labels.expand(*order.shape, *tail).gather(order.dim() - 1, wide)
    return replace(shard, index=index, size=chosen.sum(-1), labels=labels)


def clipped_sum(
    task: Task, params: Vector, sample: Shard, key: Key, expected: float, clip: float
) -> Vector:
    """The sum of the clipped gradients of every record of a sample, [..., dim].

    expected: about how many records that are; more take more memory or more passes, and are not
    left out.
    """
    total = torch.zeros_like(params)
    # Nearly every sample fits into one batch; those that do not take another.
    width = min(sample.index.shape[-1], 1 + math.ceil(expected + 3 * math.sqrt(expected)))
    for batch in task.epoch(sample, key, width):
        total = total + task.clipped_grad_sum(params, batch, clip)
    return total


def sampled_gradient(
    task: Task, params: Vector, shard: Shard, key: Key, p: float, clip: float,
    secrets: Secrets = "run", records: int | None = None,
) -> Vector:  # fmt: skip
    """1 / (p |D|) times the sum of the clipped gradients of records drawn with probability p.

    params [..., dim]; |D| is public: `records`, or the shard's size if that is. Divided by the
    expected size of the sample, not by the realised one, so that a record moves the result by
    clip / (p |D|) at most.
    """
    sample = drawn(shard, key, p, secrets)
    total = clipped_sum(task, params, sample, key, p * shard.index.shape[-1], clip)
    size = shard.size if records is None else torch.full_like(shard.size, records)
    return total / (p * size.clamp_min(1).to(params.dtype).unsqueeze(-1))
