"""Sequential gradient coding for one task: what the master and the workers have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from shoal.base.errors import Leaving
from shoal.kernel.peer import Peer
from shoal.parts.coding._rules import MiniTask, Rule
from shoal.rounds.workload import Workload
from shoal.systems.coding._sequential_master import Master
from shoal.systems.coding._sequential_work import Chunked
from shoal.systems.coding._sequential_worker import Worker
from shoal.tensor import keyed
from shoal.tensor.types import Stack

if TYPE_CHECKING:
    from shoal.systems.coding.sequential_gradient_coding import Sequential


@dataclass(frozen=True, eq=False)
class Bound:
    """The program for a task."""

    settings: Sequential
    workload: Workload
    rule: Rule
    chunked: Chunked

    @property
    def jobs(self) -> int:
        assert self.workload.rounds is not None
        return self.workload.rounds

    @cached_property
    def initial(self) -> Stack:
        """The models before the first job, float64 [models, dim]."""
        task, seed = self.workload.task, self.workload.seed
        rows = [task.init(keyed.key_of(seed, "init", m)) for m in range(self.settings.models)]
        return torch.stack(rows).double()

    @cached_property
    def _fractions(self) -> tuple[float, ...]:
        return self.rule.sizes

    def load_of(self, mini: MiniTask) -> float:
        """The fraction of the data that a mini-task goes over."""
        return sum(self._fractions[chunk] for chunk in mini.chunks)

    def delay_s(self, worker: int, round: int, load: float) -> float:
        """How long a worker takes in a round."""
        slowness, noise = self._delays
        place = (round - 1) % slowness.shape[1]
        settings = self.settings
        plain = settings.base_s + settings.slope_s * load + noise[worker, place]
        return float(plain * slowness[worker, place])

    @cached_property
    def _delays(self) -> tuple[np.ndarray, np.ndarray]:
        rounds = self.jobs + self.rule.delay
        trace, workers, seed = self.settings.trace, self.rule.workers, self.workload.seed
        return trace.slowness(workers, rounds, seed), trace.noise(workers, rounds, seed)

    async def run(self, peer: Peer) -> None:
        try:
            await (Worker(self, peer) if peer.id else Master(self, peer)).live()
        except Leaving:
            return
