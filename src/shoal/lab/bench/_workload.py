"""The two workloads of federated averaging that rounds are timed on, and their worlds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoal.engine.lockstep import round_seconds
from shoal.parts import find
from shoal.rounds.method import Method
from shoal.rounds.task import Shard
from shoal.tensor import keyed
from shoal.world.network import Network

if TYPE_CHECKING:
    from shoal.parts.tasks.base import ModuleTask

LR = 0.1
BATCH = 32


@dataclass(frozen=True)
class Workload:
    """A star whose peers each train for one local epoch in batches of 32, and are averaged.

    image: height and width of the samples: real 8x8 digits, enlarged where it is more.
    """

    peers: int
    samples: int
    image: int
    model: Any

    def module(self) -> nn.Module:
        """A fresh module, the same for everybody who times it."""
        return self.model.build((1, self.image, self.image), 10)

    def task(self) -> ModuleTask:
        """The data: `samples` positions for each peer, drawn by key from 1,437 digits."""
        from shoal.parts.tasks import task_of

        digits = find("tasks", "digits")(peers=1)
        size = (self.image, self.image)

        def enlarged(x: Tensor) -> Tensor:
            return x if x.shape[-2:] == size else nn.functional.interpolate(x, size, mode="area")

        key = keyed.key_of(0, "bench")
        draws = keyed.uniform(keyed.grid(key, self.peers).unsqueeze(-1), torch.arange(self.samples))
        index = (draws * digits.x.shape[0]).long()
        shard = Shard(index, torch.full((self.peers,), self.samples))
        train, test = (enlarged(digits.x), digits.y), (enlarged(digits.test_x), digits.test_y)
        return task_of(self.module(), "cross_entropy", train, test, shard, classes=10)

    def star(self, task: ModuleTask, rounds: int) -> tuple[Method, Network]:
        """Federated averaging, reported after the last round only."""
        return self._method(find("exchange", "star")(self.peers), task, rounds, True)

    def gossip(self, task: ModuleTask, rounds: int, degree: int) -> tuple[Method, Network]:
        """The same work, averaged with the neighbours on a random regular graph."""
        graph = find("topology", "random_regular")(self.peers, degree=degree)
        return self._method(find("exchange", "gossip")(graph), task, rounds, False)

    def _method(
        self, exchange: Any, task: ModuleTask, rounds: int, by_samples: bool
    ) -> tuple[Method, Network]:
        strategy = find("strategy", "local_steps")(
            lr=LR, epochs=1, batch_size=BATCH, by_samples=by_samples
        )
        transform = find("transform", "identity")().bind(task.spec)
        method = Method(
            strategy, task, exchange, find("aggregate", "mean")(), transform, rounds, 1.0,
            report_every=rounds,
        )  # fmt: skip
        network = Network(self.peers, getattr(exchange, "topology", None))
        return replace(method, round_s=round_seconds(method, network)), network

    @property
    def steps(self) -> int:
        """Batches of a local epoch."""
        return -(-self.samples // BATCH)


def small_mlp(tiny: bool) -> Workload:
    """W1: 100 peers with 15 samples of 8x8 and a 64-128-10 MLP of 9,610 parameters."""
    hidden = 8 if tiny else 128
    return Workload(4 if tiny else 100, 15, 8, find("models", "mlp")(hidden=(hidden,)))


def small_cnn(tiny: bool) -> Workload:
    """W2: 16 peers with 600 samples of 28x28 and a CNN of 27,562 parameters.

    Two 3x3 convolutions of 8 and 16 channels with pooling, then 400-64-10.
    """
    return Workload(2 if tiny else 16, 40 if tiny else 600, 28, find("models", "cnn")())
