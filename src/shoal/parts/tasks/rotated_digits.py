"""Digits that are turned by an angle, for a model that has learned upright ones: fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from shoal.base.errors import UsageError
from shoal.parts.tasks import digits
from shoal.parts.tasks._images import Images, Table, held_out
from shoal.rounds.task import Batch
from shoal.tensor import keyed
from shoal.tensor.threads import one_thread
from shoal.tensor.types import Key, Vector

PRETRAINING_RATE = 0.2
PRETRAINING_BATCH = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class RotatedDigits(Images):
    """Half of the digits, upright, to begin with; the other half, turned, to learn from.

    angle: degrees by which training and test images are turned; pretraining: SGD steps of 64
    upright images (at a learning rate of 0.2) that make the initial parameters from random ones.
    The halves share no image, classes balanced: 719 are left to learn from. Pixels are divided by
    the deviation of all of them together: by that of each pixel the borders, which are nearly
    constant upright, would explode when turned. Other settings: see `Images`.

    >>> task = RotatedDigits(peers=4, pretraining=10)
    >>> task.spec.dim, int(task.shard(torch.arange(4)).size.sum())
    (4810, 719)
    """

    angle: float = 25.0
    pretraining: int = 400

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"peers": 4, "pretraining": 10},)

    def __post_init__(self) -> None:
        if not -360.0 <= self.angle <= 360.0 or self.pretraining < 0:
            raise UsageError(
                f"task: angle={self.angle}, pretraining={self.pretraining}; need degrees from -360 "
                "to 360 and 0 or more steps"
            )
        if self.standardise:
            raise UsageError(
                "task: standardise=True; turned digits are divided by one deviation (leave it out)"
            )
        self.prepare(partial(_turned, self.angle))

    def init(self, key: Key) -> Vector:
        """Parameters [..., dim] after learning upright digits, one row per key."""
        params = super().init(key)
        x, y = _upright(self.device)
        with one_thread():
            for step in range(self.pretraining):
                own = keyed.fold(key, "upright", step).unsqueeze(-1)
                count = torch.arange(PRETRAINING_BATCH, device=own.device)
                place = (keyed.uniform(own, count) * len(y)).long().to(x.device)
                batch = Batch(x[place], y[place], torch.ones_like(place, dtype=torch.bool))
                params = self.descended(params, batch, PRETRAINING_RATE, donate=step > 0)
        return params


@lru_cache(maxsize=4)
def _upright(device: str) -> tuple[Tensor, Tensor]:
    """Images and labels to begin with."""
    x, y, _, _ = _scaled(device)
    first, _ = held_out(y.cpu().numpy(), 0.5)
    index = torch.from_numpy(first).to(device)
    return x[index], y[index]


@lru_cache(maxsize=8)
def _turned(angle: float, standardise: bool, device: str) -> Table:
    x, y, test_x, test_y = _scaled(device)
    _, second = held_out(y.cpu().numpy(), 0.5)
    index = torch.from_numpy(second).to(device)
    return turned(x[index], angle), y[index], turned(test_x, angle), test_y


def _scaled(device: str) -> Table:
    x, y, test_x, test_y = digits._table(False, device)
    deviation = x.std()
    return x / deviation, y, test_x / deviation, test_y


def turned(images: Tensor, angle: float) -> Tensor:
    """Images [n, 1, height, width] turned by degrees about their middle, bilinear, 0 outside.

    >>> corner = torch.zeros(1, 1, 8, 8)
    >>> corner[0, 0, 0, 0] = 1.0
    >>> turned(corner, 90.0)[0, 0].round().nonzero().tolist()
    [[7, 0]]
    """
    radians = math.radians(angle)
    rows = [
        [math.cos(radians), -math.sin(radians), 0.0],
        [math.sin(radians), math.cos(radians), 0.0],
    ]
    matrix = torch.tensor(rows, dtype=images.dtype, device=images.device)
    grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)
