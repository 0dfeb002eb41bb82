"""What ByzFL's pre-aggregators compute, written down plainly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from byzfl.utils import torch_tools  # pyright: ignore[reportMissingImports]

Rows = torch.Tensor


@dataclass
class NNM:
    f: int

    def __call__(self, x: Rows) -> Rows:
        apart = (x[:, None] - x).norm(dim=-1)
        return x[apart.argsort(-1)[:, : len(x) - self.f]].mean(1)


@dataclass
class Bucketing:
    s: int

    def __call__(self, x: Rows) -> Rows:
        return torch.stack([part.mean(0) for part in torch_tools.permutation(x).split(self.s)])


@dataclass
class Clipping:
    c: Any

    def __call__(self, x: Rows) -> Rows:
        for row in x:
            row *= (self.c / row.norm()).clamp(max=1)
        return x


@dataclass
class ARC:
    f: int

    def __call__(self, x: Rows) -> Rows:
        cut = int(2 * self.f / len(x) * (len(x) - self.f))
        return Clipping(x.norm(dim=-1).sort(descending=True).values[cut])(x)
