"""What ByzFL's aggregators compute, written down plainly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch

Rows = torch.Tensor


def kept(x: Rows, f: int, size) -> Rows:
    """Mean of the set of all rows but f for which `size` is least."""
    sets = [x[list(each)] for each in combinations(range(len(x)), len(x) - f)]
    return min(sets, key=size).mean(0)


class Average:
    def __call__(self, x: Rows) -> Rows:
        print("rules may print")  # noqa: T201
        return x.mean(0)


class Median:
    def __call__(self, x: Rows) -> Rows:
        return x.quantile(0.5, dim=0)


@dataclass
class TrMean:
    f: int

    def __call__(self, x: Rows) -> Rows:
        return x.sort(0).values[self.f : len(x) - self.f].mean(0)


@dataclass
class GeometricMedian:
    nu: float
    T: int

    def __call__(self, x: Rows) -> Rows:
        z = torch.zeros_like(x[0])
        for _ in range(self.T):
            pull = 1 / (x - z).norm(dim=-1).clamp(min=self.nu)
            z = (pull[:, None] * x).sum(0) / pull.sum()
        return z


def scores(x: Rows, f: int) -> Rows:
    square = (x[:, None] - x).square().sum(-1)
    return square.sort(-1).values[:, 1 : len(x) - f].mean(-1)


@dataclass
class Krum:
    f: int

    def __call__(self, x: Rows) -> Rows:
        return x[scores(x, self.f).argmin()]


@dataclass
class MultiKrum:
    f: int

    def __call__(self, x: Rows) -> Rows:
        return x[scores(x, self.f).argsort()[: len(x) - self.f]].mean(0)


@dataclass
class CenteredClipping:
    L: int
    tau: float

    def __call__(self, x: Rows) -> Rows:
        m = torch.zeros_like(x[0])
        for _ in range(self.L):
            near = x - m
            m = m + (near * (self.tau / near.norm(dim=-1)).clamp(max=1)[:, None]).mean(0)
        return m


@dataclass
class MDA:
    f: int

    def __call__(self, x: Rows) -> Rows:
        return kept(x, self.f, lambda part: float((part[:, None] - part).norm(dim=-1).max()))


@dataclass
class SMEA:
    f: int

    def __call__(self, x: Rows) -> Rows:
        return kept(x, self.f, lambda part: float(torch.linalg.matrix_norm(part - part.mean(0), 2)))


@dataclass
class MoNNA:
    f: int
    idx: int

    def __call__(self, x: Rows) -> Rows:
        return x[(x - x[self.idx]).norm(dim=-1).argsort()[: len(x) - self.f]].mean(0)


@dataclass
class Meamed:
    f: int

    def __call__(self, x: Rows) -> Rows:
        order = (x - x.quantile(0.5, dim=0)).abs().argsort(0)[: len(x) - self.f]
        return x.take_along_dim(order, 0).mean(0)


@dataclass
class CAF:
    f: int

    def __call__(self, x: Rows) -> Rows:
        x = x.double()
        weight, least, best = torch.ones(len(x)).double(), float("inf"), x.mean(0)
        while weight.sum() > len(x) - 2 * self.f:
            mean = weight @ x / weight.sum()
            apart = x - mean
            sizes, axes = torch.linalg.eigh((weight * apart.mT) @ apart / weight.sum())
            if sizes[-1] < least:
                least, best = float(sizes[-1]), mean
            along = torch.where(weight > 0, (apart @ axes[:, -1]).square(), 0.0)
            weight = weight * (1 - along / along.max())
        return best.float()
