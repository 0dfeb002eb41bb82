"""Quadratic functions, one per peer, whose common minimum is known in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.rounds.task import Batch, Shard, Task
from shoal.tensor import keyed
from shoal.tensor.flat import FlatSpec
from shoal.tensor.types import Index, Key, Scalar, Vector


@dataclass(frozen=True, eq=False, kw_only=True)
class Quadratics:
    """Peer i has f_i(x) = (x - c_i)' H_i (x - c_i) / 2; all together minimise the mean.

    The eigenvalues of each H_i are `dim` numbers from 1 / condition to 1, evenly on a logarithmic
    scale: f_i is 1-smooth and 1/condition strongly convex. axes: whether all H_i are one matrix
    ("shared", so that only the centres differ) or each has axes of its own ("own"). Centres and
    initial parameters are standard normal, drawn by seed and key. noise: standard deviation of
    each number of a centre as `batch` draws it; `epoch` has no noise. All in float64.
    Metrics: `loss` above its least, and `distance`, the squared distance to the minimum.

    >>> task = Quadratics(peers=4, condition=10.0)
    >>> {name: round(float(v), 9) for name, v in task.evaluate(task.minimum).items()}
    {'loss': 0.0, 'distance': 0.0}
    """

    peers: int
    seed: int = 0
    dim: int = 6
    condition: float = 30.0
    axes: Literal["shared", "own"] = "shared"
    noise: float = 0.0
    device: str = "cpu"
    spec: FlatSpec = field(init=False, repr=False)
    matrices: Tensor = field(init=False, repr=False)
    """H_i, float64 [peers, dim, dim]"""
    centres: Tensor = field(init=False, repr=False)
    """c_i, float64 [peers, dim]"""
    minimum: Tensor = field(init=False, repr=False)
    """of the mean of all functions, float64 [dim]"""
    least: float | None = field(init=False, repr=False)
    """the mean of all functions there; None of joined tasks"""

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"peers": 6}, {"peers": 3, "axes": "own", "noise": 0.1, "dim": 3},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.peers < 1 or self.dim < 1:
            raise UsageError(f"Quadratics: peers={self.peers}, dim={self.dim}; need at least 1")
        if not 1.0 <= self.condition < np.inf or (self.dim == 1 and self.condition != 1.0):
            raise UsageError(
                f"Quadratics: condition={self.condition} in {self.dim} dimensions; need a finite "
                "number >= 1, and 1 in one dimension"
            )
        if self.axes not in ("shared", "own"):
            raise UsageError(f"Quadratics: axes={self.axes!r}; need 'shared' or 'own'")
        if not 0.0 <= self.noise < np.inf:
            raise UsageError(f"Quadratics: noise={self.noise}; need a finite number >= 0")
        matrices, centres = self._drawn()
        whole = matrices.mean(0)
        minimum = np.linalg.solve(whole, np.einsum("pij,pj->i", matrices, centres) / self.peers)
        least = _values(minimum, matrices, centres).mean()
        values = {
            "spec": FlatSpec(("x",), ((self.dim,),)), "matrices": self._there(matrices),
            "centres": self._there(centres), "minimum": self._there(minimum), "least": float(least),
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def curvature(self) -> tuple[float, float]:
        """(mu, L): how strongly convex and how smooth every peer's function is."""
        return 1.0 / self.condition, 1.0

    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Matrices [peers, dim, dim] and centres [peers, dim]."""
        key = keyed.key_of(self.seed, "quadratics")
        place = torch.arange(self.peers * self.dim, device=key.device).view(self.peers, self.dim)
        centres = keyed.normal(keyed.fold(key, "centre"), place, dtype=torch.float64).numpy()
        count = 1 if self.axes == "shared" else self.peers
        shape = (count, self.dim, self.dim)
        place = torch.arange(count * self.dim**2, device=key.device).view(shape)
        random = keyed.normal(keyed.fold(key, "axes"), place, dtype=torch.float64).numpy()
        axes = np.linalg.qr(random)[0]
        spectrum = np.logspace(-np.log10(self.condition), 0.0, self.dim)
        matrices = (axes * spectrum) @ axes.swapaxes(-1, -2)
        return np.broadcast_to(matrices, (self.peers, self.dim, self.dim)), centres

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array, order="C")).to(self.device)

    def init(self, key: Key) -> Vector:
        """Standard normal [..., dim], one row per key."""
        place = torch.arange(self.dim, device=key.device)
        drawn = keyed.normal(keyed.fold(key, "x").unsqueeze(-1), place, dtype=torch.float64)
        return drawn.to(self.device)

    def shard(self, peer: int | Index) -> Shard:
        """A peer's one sample is its function."""
        index = torch.arange(self.peers, device=self.device).unsqueeze(-1)
        return Shard(
            index[peer], torch.ones(self.peers, dtype=torch.int64, device=self.device)[peer]
        )

    def joined(self, tasks: Sequence[Task]) -> Task:
        """Functions of all tasks; the result has no common minimum, so it cannot evaluate."""
        found = [task for task in tasks if isinstance(task, Quadratics) and task.dim == self.dim]
        if len(found) != len(tasks):
            raise UsageError("task: only quadratics of equal `dim` run together (one by one)")
        out = replace(self, peers=1)
        values = {
            "peers": sum(task.peers for task in found),
            "matrices": torch.cat([task.matrices for task in found]),
            "centres": torch.cat([task.centres for task in found]), "least": None,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(out, name, value)
        return out

    def batch(self, shard: Shard, key: Key, size: int) -> Batch:
        """`size` draws of the centre: x [..., size, dim]; y: whose function, [..., size]."""
        y = shard.index[..., :1].expand(*shard.index.shape[:-1], size)
        x = self.centres[y]
        if self.noise:
            place = torch.arange(size * self.dim, device=key.device).view(size, self.dim)
            drawn = keyed.fold(key, "noise").unsqueeze(-1).unsqueeze(-1)
            x = x + self.noise * keyed.normal(drawn, place, dtype=x.dtype)
        return Batch(x, y, torch.ones_like(y, dtype=torch.bool))

    def epoch(self, shard: Shard, key: Key, size: int) -> Iterator[Batch]:
        """One batch: the function itself."""
        y = shard.index[..., :1]
        yield Batch(self.centres[y], y, torch.ones_like(y, dtype=torch.bool))

    def loss(self, params: Vector, batch: Batch) -> Scalar:
        away = params.unsqueeze(-2) - batch.x
        each = 0.5 * (away * self._times(batch, away)).sum(-1)
        count = batch.mask.sum(-1).clamp_min(1)
        return torch.where(batch.mask, each, 0.0).sum(-1) / count

    def grad(self, params: Vector, batch: Batch) -> Vector:
        each = self._times(batch, params.unsqueeze(-2) - batch.x)
        count = batch.mask.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(batch.mask.unsqueeze(-1), each, 0.0).sum(-2) / count

    def descended(
        self, params: Vector, batch: Batch, rate: float, *, donate: bool = False
    ) -> Vector:
        return params - rate * self.grad(params, batch)

    def walked(
        self, params: Vector, batches: Batch, rate: float, drift: Vector | None = None
    ) -> Vector:
        for batch in map(Batch, batches.x, batches.y, batches.mask):
            grad = self.grad(params, batch)
            params = params - rate * (grad if drift is None else grad + drift)
        return params

    def clipped_grad_sum(self, params: Vector, batch: Batch, clip: float) -> Vector:
        if not clip > 0:
            raise UsageError(f"clipped_grad_sum: clip={clip}; need a norm above 0")
        each = self._times(batch, params.unsqueeze(-2) - batch.x)
        norm = each.norm(dim=-1, keepdim=True)
        each = each * (clip / norm.clamp_min(clip))
        return torch.where(batch.mask.unsqueeze(-1) & norm.isfinite(), each, 0.0).sum(-2)

    def _times(self, batch: Batch, away: Tensor) -> Tensor:
        """H of each sample times a vector [..., batch, dim]."""
        return (self.matrices[batch.y] @ away.unsqueeze(-1)).squeeze(-1)

    def evaluate(self, params: Vector) -> dict[str, Scalar]:
        if self.least is None:
            raise UsageError("task: joined quadratics have no common minimum (evaluate each alone)")
        away = params.unsqueeze(-2) - self.centres
        each = 0.5 * ((self.matrices @ away.unsqueeze(-1)).squeeze(-1) * away).sum(-1)
        distance = (params - self.minimum).square().sum(-1)
        return {"loss": each.mean(-1) - self.least, "distance": distance}


def _values(x: np.ndarray, matrices: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """f_i(x) of every peer, [peers]."""
    away = x - centres
    return 0.5 * np.einsum("pi,pij,pj->p", away, matrices, away)
