"""What all image tasks share: settings, model and split; a data set adds its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.parts.models.cnn import CNN
from shoal.parts.models.mlp import MLP
from shoal.parts.tasks._splits import Split, set_aside, shards_of, subset
from shoal.parts.tasks.base import ModuleTask
from shoal.rounds.task import Shard
from shoal.tensor.keyed import grid, key_of, normal

COPIES = 8
"""Noisy images of each sample: enough that a peer does not learn their noise by heart."""

Table = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images [n, 1, height, width] in [0, 1], labels [n], test images, test labels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(ModuleTask):
    """Classification of images with an MLP (`hidden`) or a CNN (`channels`, then `hidden[0]`).

    split and what follows: see `Split`; losers: peers whose samples are lost before round `lost_at`
    (the peers stay); train_samples: learn from so many only, drawn by seed,
    classes balanced; own_tests: how many of its samples each peer keeps for testing (`Shard.held`),
    the same share of each class; label_noise: share of training labels that are replaced by a wrong
    one;
    noisy: peers that learn from images with Gaussian noise of deviation `pixel_noise` on each
    pixel, eight noisy copies of each of their samples in place of the sample;
    standardise: zero mean and unit variance per pixel over the training set; initialise: how an
    MLP's weights begin, see `MLP`. The test set is the same for every seed.
    """

    peers: int
    seed: int = 0
    split: str = "iid"
    alpha: float = 0.5
    classes_per_peer: int = 2
    spread: float = 1.0
    samples_per_peer: int | None = None
    with_replacement: bool = False
    holders: tuple[int, ...] | None = None
    losers: tuple[int, ...] = ()
    lost_at: int = 0
    train_samples: int | None = None
    own_tests: int = 0
    label_noise: float = 0.0
    noisy: tuple[int, ...] = ()
    pixel_noise: float = 1.0
    standardise: bool = False
    model: str = "mlp"
    hidden: tuple[int, ...] = (64,)
    channels: tuple[int, ...] = (8, 16)
    initialise: str = "layer"
    batching: str = "auto"
    device: str = "cpu"

    def prepare(self, load: Callable[[bool, str], Table]) -> None:
        """Load the table, share it out and set the task up."""
        if self.model not in ("mlp", "cnn"):
            raise UsageError(f"task: model={self.model!r}; need mlp or cnn")
        if not 0 <= self.label_noise <= 1:
            raise UsageError(f"task: label_noise={self.label_noise}; need 0 to 1")
        if self.own_tests < 0:
            raise UsageError(f"task: own_tests={self.own_tests}; need 0 (none) or more")
        if self.model == "cnn" and self.initialise != "layer":
            raise UsageError(
                f"task: initialise={self.initialise!r}; a cnn has its layers' own rule"
            )
        if self.model == "cnn" and len(self.hidden) != 1:
            raise UsageError(
                f"task: hidden={self.hidden}; a cnn has one hidden layer (give one width)"
            )
        rule = Split(
            self.split, self.alpha, self.classes_per_peer, self.spread, self.samples_per_peer,
            self.with_replacement, self.holders,
        )  # fmt: skip
        x, y, test_x, test_y = load(self.standardise, self.device)
        labels = y.cpu().numpy()
        kept = np.arange(len(labels))
        if self.train_samples is not None:
            kept = subset(labels, self.train_samples, self.seed)
        parts = [kept[part] for part in rule.parts(labels[kept], self.peers, self.seed)]
        held = None
        if self.own_tests:
            parts, held = set_aside(parts, labels, self.own_tests)
        if self.noisy:
            self._check_noise()
            count = len(y)
            x, y = _with_copies(load, self.standardise, self.device, self.pixel_noise)
            for peer in self.noisy:
                places = [parts[peer] + n * count for n in range(1, 1 + COPIES)]
                parts[peer] = np.concatenate(places)
        shard = shards_of(parts, self.device)
        if held is not None:
            shard = replace(shard, held=torch.as_tensor(held, device=self.device))
        if self.label_noise:
            shard = replace(shard, labels=self._noisy(shard, y))
        if self.losers:
            shard = replace(shard, until=self._until(shard))
        module = self._model().build(tuple(x.shape[1:]), 10)
        self.setup(
            module, "cross_entropy", (x, y), (test_x, test_y), shard, classes=10,
            batching=self.batching,
        )  # fmt: skip

    def _check_noise(self) -> None:
        if self.pixel_noise < 0 or any(not 0 <= peer < self.peers for peer in self.noisy):
            raise UsageError(
                f"task: noisy={self.noisy}, pixel_noise={self.pixel_noise}; need peers from 0 to "
                f"{self.peers - 1} and a deviation of 0 or more"
            )

    def _until(self, shard: Shard) -> Tensor:
        """The round before which each peer's samples are lost, int64 [peers]."""
        if self.lost_at < 0 or any(not 0 <= peer < self.peers for peer in self.losers):
            raise UsageError(
                f"task: losers={self.losers}, lost_at={self.lost_at}; need peers from 0 to "
                f"{self.peers - 1} and a round from 0 on"
            )
        until = torch.full_like(shard.size, torch.iinfo(torch.int64).max)
        until[list(self.losers)] = self.lost_at
        return until

    def _model(self) -> Any:
        if self.model == "mlp":
            return MLP(hidden=self.hidden, initialise=self.initialise)
        return CNN(channels=self.channels, hidden=self.hidden[0])

    def _noisy(self, shard: Shard, y: Tensor) -> Tensor:
        """Labels [peers, most]: the sample decides, so two owners of one see the same label."""
        key = keyed_of(self.seed, y)
        wrong = torch_uniform(key, y) < self.label_noise
        shift = 1 + (torch_uniform(key + 1, y) * 9).long()
        return torch.where(wrong, (y + shift) % 10, y)[shard.index]


@lru_cache(maxsize=2)
def _with_copies(
    load: Callable[[bool, str], Table], standardise: bool, device: str, noise: float
) -> tuple[Tensor, Tensor]:
    """Training images with noisy copies behind them: the same for every seed, who share them."""
    x, y, _, _ = load(standardise, device)
    key = key_of(0, "pixel noise", device=x.device)
    draws = normal(grid(grid(key, COPIES * len(x)), x[0].numel()), dtype=x.dtype)
    copies = x.repeat(COPIES, *(1,) * (x.dim() - 1)) + noise * draws.view(-1, *x.shape[1:])
    return torch.cat((x, copies)), y.repeat(1 + COPIES)


def keyed_of(seed: int, like: Tensor) -> Tensor:
    """The key of a seed's label noise, on the table's device."""
    word = keyed.signed(keyed.fold(0, seed, "label noise"))
    return torch.tensor(word, dtype=torch.int64, device=like.device)


def torch_uniform(key: Tensor, y: Tensor) -> Tensor:
    """One draw per sample."""
    from shoal.tensor.keyed import uniform

    return uniform(key, torch.arange(len(y), device=y.device))


def table_of(
    x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, standardise: bool,
    device: str,
) -> Table:  # fmt: skip
    """Tensors of images [n, height, width] with values in [0, 1]."""
    x, test_x = x.astype(np.float32), test_x.astype(np.float32)
    if standardise:
        mean, deviation = x.mean(0), x.std(0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    return (
        torch.as_tensor(x[:, None], device=device),
        torch.as_tensor(y.astype(np.int64), device=device),
        torch.as_tensor(test_x[:, None], device=device),
        torch.as_tensor(test_y.astype(np.int64), device=device),
    )


def held_out(y: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions for training and for testing, the same in every run, classes balanced."""
    rng = np.random.default_rng(0)
    test = []
    for c in np.unique(y):
        own = rng.permutation(np.flatnonzero(y == c))
        test.append(own[: round(share * len(own))])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(y)), chosen), chosen
