"""Digits for a network that has learned letters: frozen features, and a new head on top of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from shoal.base import keyed as plain_keyed
from shoal.base.digest import bytes_digest
from shoal.base.errors import UsageError
from shoal.parts.models.mlp import MLP
from shoal.parts.tasks import digits
from shoal.parts.tasks._letters import LETTERS, letters
from shoal.parts.tasks._splits import shards_of
from shoal.parts.tasks.base import ModuleTask, task_of
from shoal.rounds.task import Shard
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread

CLASSES = 10
WIDTHS = (128, 64)
"""Hidden layers of the network; the last ones are the features."""
PRETRAINING_RATE, PRETRAINING_BATCH = 0.5, 128
POOL, SCORED = 300, 297
"""Digits that own tests are drawn from, and those that everybody's accuracy is measured on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TransferDigits(ModuleTask):
    """8x8 digits through layers that were learned on letters and then frozen.

    A network 64-128-64-26 learns A to Z (see `letters`; `pretraining` steps of 128 images, the same
    for every seed). Its first two layers turn all 1,797 digits into 64 features each, once; what
    peers learn is a head 64-10 of 650 numbers. frozen=False: the whole network 64-128-64-10 on the
    images instead, from random parameters, 17,226 numbers, on the very same samples.
    standardise: each feature has mean 0 and deviation 1 over all training images (unlabelled, and
    known to everybody, as the layers are). `fingerprint` names layers and standardisation: heads
    on other features mean nothing. The layers are made by arithmetic, not read from a file, so a
    machine that rounds otherwise has another fingerprint.

    samples_per_peer: training images of each peer, of `classes_per_peer` classes (None = all) in
    equal numbers; own_tests: images to test on (`Shard.held`), of the same classes, from 300 that
    nobody trains on. Peers share images where there are not enough. Accuracy is measured on 297
    others, of all classes.

    >>> task = TransferDigits(peers=4, classes_per_peer=2, pretraining=5)
    >>> task.spec.dim, tuple(task.shard(torch.arange(4)).held.shape)
    (650, (4, 40))
    """

    peers: int
    seed: int = 0
    samples_per_peer: int = 60
    own_tests: int = 40
    classes_per_peer: int | None = None
    frozen: bool = True
    standardise: bool = True
    pretraining: int = 1500
    batching: str = "auto"
    device: str = "cpu"

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 4, "pretraining": 5},
        {"peers": 4, "frozen": False, "classes_per_peer": 3},
    )

    def __post_init__(self) -> None:
        kinds = CLASSES if self.classes_per_peer is None else self.classes_per_peer
        if not 1 <= kinds <= CLASSES or self.pretraining < 0 or self.peers < 1:
            raise UsageError(
                f"task: peers={self.peers}, classes_per_peer={self.classes_per_peer}, "
                f"pretraining={self.pretraining}; need at least one peer, 1 to {CLASSES} classes "
                "(or None for all) and 0 or more steps"
            )
        for name, most in (("samples_per_peer", 100), ("own_tests", POOL // CLASSES)):
            value = getattr(self, name)
            if not (0 if name == "own_tests" else 1) <= value <= most * kinds:
                raise UsageError(
                    f"task: {name}={value} of {kinds} classes; need up to {most} of each class"
                )
        train, pool, scored = _cut(self.device)
        rng = np.random.default_rng(plain_keyed.fold(0, self.seed, "transfer"))
        has = _owners(self.peers, kinds, rng)
        parts = _dealt(train[1].cpu().numpy(), has, self.samples_per_peer, rng)
        held = _dealt(pool[1].cpu().numpy(), has, self.own_tests, rng)
        shard = shards_of(parts, self.device)
        if self.own_tests:
            # The pool lies behind the training images.
            aside = torch.as_tensor(np.stack(held) + len(train[1]), device=self.device)
            shard = replace(shard, held=aside)
        fingerprint = 0
        module: nn.Module
        if self.frozen:
            x, test_x, fingerprint = _features(self.pretraining, self.standardise, self.device)
            module = nn.Sequential(nn.Linear(WIDTHS[-1], CLASSES))
        else:
            x, test_x = _images(self.device)
            module = MLP(hidden=WIDTHS).build((1, 8, 8), CLASSES)
        object.__setattr__(self, "fingerprint", fingerprint)
        self.setup(
            module, "cross_entropy", (x, _labels(self.device)), (test_x, scored[1]), shard,
            classes=CLASSES, batching=self.batching,
        )  # fmt: skip


Part = tuple[Tensor, Tensor]
"""Images [n, 1, 8, 8] and labels [n]."""


@lru_cache(maxsize=4)
def _cut(device: str) -> tuple[Part, Part, Part]:
    """All digits: to learn from, to test on by peers, to score on; the same for every seed."""
    x, y, test_x, test_y = digits._table(False, device)
    x, y = torch.cat((x, test_x)), torch.cat((y, test_y))
    labels = y.cpu().numpy()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    # Class by class in turn, so that every part has all of them alike.
    rank = np.zeros(len(labels), np.int64)
    for c in range(CLASSES):
        own = order[labels[order] == c]
        rank[own] = np.arange(len(own))
    order = order[np.argsort(rank[order], kind="stable")]
    parts = np.split(order, [POOL, POOL + SCORED])
    pool, scored, train = (torch.from_numpy(np.sort(part)).to(device) for part in parts)
    return (x[train], y[train]), (x[pool], y[pool]), (x[scored], y[scored])


@lru_cache(maxsize=4)
def _images(device: str) -> tuple[Tensor, Tensor]:
    """Images to learn from, own tests behind them, and images to score on."""
    train, pool, scored = _cut(device)
    return torch.cat((train[0], pool[0])), scored[0]


@lru_cache(maxsize=4)
def _labels(device: str) -> Tensor:
    train, pool, _ = _cut(device)
    return torch.cat((train[1], pool[1]))


@lru_cache(maxsize=4)
def _features(pretraining: int, standardise: bool, device: str) -> tuple[Tensor, Tensor, int]:
    """The same through the frozen layers, and their fingerprint.

    Made on the processor whatever the device, so that all peers have the same bits.
    """
    x, test_x = _images("cpu")
    with one_thread(), torch.no_grad():
        layers = pretrained(pretraining)
        x, test_x = (through(layers, part.flatten(1)) for part in (x, test_x))
        mean, deviation = torch.zeros_like(x[0]), torch.ones_like(x[0])
        if standardise:
            train = x[:-POOL]
            mean, deviation = train.mean(0), train.std(0, correction=0)
            # A feature that never fires says nothing, and is left at 0.
            deviation = torch.where(deviation > 1e-6, deviation, 1.0)
        x, test_x = ((part - mean) / deviation for part in (x, test_x))
    parts = [tensor.numpy().tobytes() for tensor in (*layers, mean, deviation)]
    fingerprint = int(bytes_digest(*parts)[:12], 16)
    return x.to(device), test_x.to(device), fingerprint


def through(layers: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Features [n, 64] of images [n, 64]."""
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = (x @ weight.mT + bias).relu()
    return x


@lru_cache(maxsize=2)
def _letters_task() -> ModuleTask:
    x, y = letters()
    everything = Shard(
        torch.arange(len(y), device="cpu").unsqueeze(0), torch.tensor([len(y)], device="cpu")
    )
    module = MLP(hidden=WIDTHS).build((1, 8, 8), len(LETTERS))
    return task_of(module, "cross_entropy", (x, y), (x, y), everything)


def pretrained(steps: int) -> tuple[Tensor, ...]:
    """Weight and bias of the first two layers after so many steps on letters."""
    task = _letters_task()
    params, shard = task.init(keyed.key_of(0, "letters")), task.shard(0)
    for step in range(steps):
        batch = task.batch(shard, keyed.key_of(0, "letters", step), PRETRAINING_BATCH)
        params = task.descended(params, batch, PRETRAINING_RATE, donate=step > 0)
    views = list(task.spec.views(params).values())
    return tuple(view.clone() for view in views[: 2 * len(WIDTHS)])


def _owners(peers: int, kinds: int, rng: np.random.Generator) -> np.ndarray:
    """Which classes each peer has: bool [peers, classes], every class with about as many owners."""
    has = np.zeros((peers, CLASSES), bool)
    for own in has:
        order = np.lexsort((rng.permutation(CLASSES), has.sum(0)))
        own[order[:kinds]] = True
    return has


def _dealt(
    labels: np.ndarray, has: np.ndarray, count: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """`count` positions for each peer, as many of each of its classes; piles are used in turn."""
    piles = [rng.permutation(np.flatnonzero(labels == c)) for c in range(CLASSES)]
    used = np.zeros(CLASSES, np.int64)
    dealt = []
    for own in has:
        classes = rng.permutation(np.flatnonzero(own))
        each = count // len(classes) + (np.arange(len(classes)) < count % len(classes))
        taken = [
            piles[c][(used[c] + np.arange(n)) % len(piles[c])]
            for c, n in zip(classes, each, strict=True)
        ]
        used[classes] += each
        dealt.append(np.sort(np.concatenate(taken)))
    return dealt
