"""The loss that federated learning minimises: the mean over peers of each one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from shoal.base.errors import UsageError
from shoal.rounds.task import Batch, Task
from shoal.tensor import keyed
from shoal.tensor.types import Index, Vector


@dataclass(frozen=True)
class FederatedLoss:
    """The loss of a model on each peer's own training data, and their mean, `federated_loss`,
    after every evaluated round.

    Every peer that has data counts the same, however many samples that are; data that were lost
    (`Shard.until`) count too.

    >>> FederatedLoss().each
    True
    """

    each: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __call__(self, task: Task, params: Vector) -> Mapping[str, float]:
        peers, batch = _data(task)
        losses = task.loss(params.expand(len(peers), -1), batch)
        return {"federated_loss": float(losses.double().mean())}


@lru_cache(maxsize=1)
def _data(task: Task) -> tuple[Index, Batch]:
    """Peers that have samples, and all samples of each: one copy, for the run that is measured."""
    size = task.shard(torch.arange(task.peers, device="cpu")).size
    if int(size.max()) == 0:
        raise UsageError("measure: no peer has data (give the task samples)")
    peers = size.cpu().nonzero().squeeze(-1)
    key = keyed.grid(keyed.key_of(0, "federated loss", device=size.device), len(peers))
    (batch,) = task.epoch(task.shard(peers), key, int(size.max()))
    return peers, batch
