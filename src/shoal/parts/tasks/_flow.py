"""What all flow-matching tasks share: noised batches, the split into clusters, the router's task.

A sample of a batch is x_t beside features of t, and its target the velocity e - x_0, both drawn
anew for each batch by its key. So any strategy can train a flow model as it would a classifier.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.flow.ensemble import Ensemble, Router
from shoal.parts.flow.partition import partition
from shoal.parts.flow.path import draws, on_path, time_features
from shoal.parts.models.mlp import MLP
from shoal.parts.tasks._splits import SPLITS, Split, shards_of, subset
from shoal.parts.tasks.base import ModuleTask
from shoal.rounds.task import Batch, Shard
from shoal.tensor import keyed
from shoal.tensor.types import Key, Mask, Vector

HELD_OUT = 2048
"""So many noised samples, at least, stand for all times and all noise when a model is tested."""


@dataclass(frozen=True, eq=False)
class FlowTable:
    """Samples of a flow task, once for all seeds: each at t = 0 beside the features of that time.

    x [n, width + features]; y [n, width]: the target without noise, -x_0; held_x, held_y: noised
    samples that are not among them; labels [n]: for splits by class; features [n, *]: for
    clusters; frequencies: of the time features.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    labels: np.ndarray
    features: np.ndarray
    frequencies: int

    @classmethod
    def of(
        cls, clean: Tensor, held: Tensor, labels: np.ndarray, features: np.ndarray,
        frequencies: int,
    ) -> FlowTable:  # fmt: skip
        """From samples [n, width] and held-out ones [m, width]."""
        if frequencies < 1:
            raise UsageError(f"task: frequencies={frequencies}; need at least 1 (raise it)")
        held_x, held_y = _held(held, frequencies)
        zero = torch.zeros_like(clean[:, 0])
        x = torch.cat((clean, time_features(zero, frequencies)), -1)
        return cls(x, -clean, held_x, held_y, labels, features, frequencies)


def _held(clean: Tensor, frequencies: int) -> tuple[Tensor, Tensor]:
    """Noised samples, times evenly spread, by a fixed key: every model is tested on the same."""
    count, width = clean.shape
    times = -(-HELD_OUT // count)
    clean = clean.repeat(times, 1)
    place = torch.arange(len(clean), device=clean.device)
    t = (place.to(clean.dtype) + 0.5) / len(clean)
    key = keyed.key_of(0, "held out", device=clean.device)
    noise = keyed.normal(keyed.grid(keyed.grid(key, len(clean)), width)).to(clean.dtype)
    x = torch.cat((on_path(clean, noise, t), time_features(t, frequencies)), -1)
    return x, noise - clean


class Noised(ModuleTask):
    """A task whose batches are noised; the table holds samples at t = 0."""

    width: int
    frequencies: int

    def batch(self, shard: Shard, key: Key, size: int) -> Batch:
        return self._noised(super().batch(shard, key, size), key)

    def epoch(self, shard: Shard, key: Key, size: int) -> Iterator[Batch]:
        for place, batch in enumerate(super().epoch(shard, key, size)):
            yield self._noised(batch, keyed.fold(key, place))

    def _noised(self, batch: Batch, key: Key) -> Batch:
        clean = batch.x[..., : self.width]
        t, noise = draws(keyed.fold(key, "noise"), clean.shape[-2], self.width, clean.dtype)
        x = self.seen(on_path(clean, noise, t), t)
        return Batch(x, self._target(noise - clean, batch.y), batch.mask)

    def _target(self, velocity: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def seen(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network gets: x_t [..., width] beside features of the times [...]."""
        return torch.cat((x, time_features(t, self.frequencies)), -1)

    def output(self, params: Vector, x: Tensor, t: Tensor) -> Tensor:
        """The network of parameters [dim] at x_t [n, width] and times [n]."""
        with torch.no_grad():
            found = self.work.forward(params.unsqueeze(0), self.seen(x, t).unsqueeze(0))
        return found.squeeze(0)


class Routing(Noised):
    """Which peer's cluster a noised sample comes from: a classifier for all t at once.

    One shard with everybody's samples in their natural mix, so that the router's prior is that of
    the data. Made by `Flow.routing`.
    """

    def _target(self, velocity: Tensor, y: Tensor) -> Tensor:
        return y

    def probabilities(self, params: Vector, x: Tensor, t: Tensor) -> Tensor:
        """p(k | x_t, t): [n, peers]."""
        return self.output(params, x, t).softmax(-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flow(Noised):
    """Rectified flow matching with an MLP (`hidden`, `activation`) on samples of a data set.

    split: `clusters` (balanced clusters of features, one per peer, see
    `shoal.parts.flow.partition`, with `fine` and `balance`), or a split of `Split` with `alpha` and
    `classes_per_peer`; train_samples: learn from so many only, classes balanced; frequencies: of
    the features of the time. The loss is the mean squared error of the velocity.
    """

    peers: int
    seed: int = 0
    split: str = "clusters"
    fine: int = 1024
    balance: float = 1.25
    alpha: float = 0.5
    classes_per_peer: int = 2
    train_samples: int | None = None
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "silu"
    frequencies: int = 6
    batching: str = "auto"
    device: str = "cpu"

    def prepare(self, table: FlowTable) -> None:
        """Share the table out and set the task up."""
        if self.split != "clusters" and self.split not in SPLITS:
            known = ", ".join(("clusters", *SPLITS))
            raise UsageError(f"task: split={self.split!r}; need one of {known}")
        count, width = table.y.shape
        kept = np.arange(count)
        if self.train_samples is not None:
            kept = subset(table.labels, self.train_samples, self.seed)
        if self.split == "clusters":
            found = partition(table.features[kept], self.peers, self.fine, self.balance, self.seed)
            parts = [kept[found == peer] for peer in range(self.peers)]
        else:
            rule = Split(self.split, self.alpha, self.classes_per_peer)
            parts = [kept[part] for part in rule.parts(table.labels[kept], self.peers, self.seed)]
        owner = torch.full((count,), -1, dtype=torch.int64, device="cpu")
        for peer, part in enumerate(parts):
            owner[part] = peer
        object.__setattr__(self, "width", width)
        object.__setattr__(self, "owner", owner.to(table.x.device))
        self.setup(
            self._model(self.hidden, width), "mse", (table.x, table.y),
            (table.held_x, table.held_y), shards_of(parts, self.device), batching=self.batching,
        )  # fmt: skip

    def _model(self, hidden: tuple[int, ...], outputs: int) -> torch.nn.Module:
        features = (self.width + 2 * self.frequencies,)
        return MLP(hidden=hidden, activation=self.activation).build(features, outputs)

    def _target(self, velocity: Tensor, y: Tensor) -> Tensor:
        return velocity

    def velocity(self, params: Vector, x: Tensor, t: Tensor) -> Tensor:
        """An expert's velocity [n, width]: parameters [dim] at x_t [n, width], times [n]."""
        return self.output(params, x, t)

    def clean(self, present: Mask | None = None) -> Tensor:
        """The training samples [n, width] of all peers, or of those that are present [peers]."""
        owned = self.owner >= 0
        if present is not None:
            owned &= present[self.owner.clamp_min(0)]
        return self.x[owned, : self.width]

    def routing(self, hidden: tuple[int, ...] = (32,)) -> Routing:
        """The router's task: one shard of all samples, labelled with who has them."""
        owned = (self.owner >= 0).nonzero().squeeze(-1)
        task = Routing()
        task.width, task.frequencies = self.width, self.frequencies
        samples = self.x[owned, : self.width]
        tested, _ = _held(samples, self.frequencies)
        place = torch.arange(len(tested), device=owned.device) % len(owned)
        y = self.owner.clamp_min(0)
        size = torch.tensor([len(owned)], dtype=torch.int64, device=owned.device)
        task.setup(
            self._model(hidden, self.peers), "cross_entropy", (self.x, y),
            (tested, self.owner[owned][place]), Shard(owned.unsqueeze(0), size),
            classes=self.peers, batching=self.batching,
        )  # fmt: skip
        return task

    def ensemble(
        self, experts: Sequence[Vector | None] | Tensor, router: Router | None = None
    ) -> Ensemble:
        """Experts by their parameters [dim], None for one that is missing, and their router.

        router: (x_t, t) -> probabilities, such as `partial(routing.probabilities, params)`
        or `posterior`. Missing experts are warned of; their share goes to the others.
        """
        missing = [k for k, params in enumerate(experts) if params is None]
        if missing:
            warnings.warn(
                f"experts {missing} are missing; the others are scaled to sum to 1", stacklevel=2
            )
        for k, params in enumerate(experts):
            if params is not None and params.shape != (self.spec.dim,):
                raise UsageError(
                    f"task: expert {k} has parameters {tuple(params.shape)}; need "
                    f"({self.spec.dim},), as the task's model has"
                )
        return Ensemble(
            tuple(None if p is None else partial(self.velocity, p) for p in experts), router
        )

    def held_out(self, velocity: Callable[[Tensor, Tensor], Tensor]) -> Mapping[str, float]:
        """How well a velocity fits: `flow_loss`, the loss on the held-out samples."""
        x, t = self.test_points()
        found = velocity(x, t)
        return {"flow_loss": float((found - self.test_y).double().square().mean())}

    def test_points(self) -> tuple[Tensor, Tensor]:
        """Held-out x_t [n, width] and their times [n]."""
        count = len(self.test_x)
        t = (torch.arange(count, device=self.test_x.device).to(self.test_x.dtype) + 0.5) / count
        return self.test_x[:, : self.width], t

    def quality(self, samples: Tensor, present: Mask) -> Mapping[str, float]:
        """How far generated samples [n, width] are from the data of the present peers."""
        raise NotImplementedError

    def posterior(self, x: Tensor, t: Tensor) -> Tensor | None:
        """The exact p_t(k | x_t) [n, peers] where it is known, else None."""
        return None
