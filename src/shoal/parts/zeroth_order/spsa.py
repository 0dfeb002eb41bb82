"""Projected gradients from two losses (SPSA): how steep the loss is along a random direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.zeroth_order.noise import noise_rows, walk_in_place
from shoal.rounds.task import Shard, Task
from shoal.tensor import keyed
from shoal.tensor.types import Key, Vector


def check_eps(owner: str, eps: float) -> None:
    """UsageError unless the perturbation is positive and finite."""
    if not 0 < eps < float("inf"):
        raise UsageError(f"{owner}: eps={eps}; need a perturbation above 0 (1e-3 is usual)")


@dataclass(frozen=True)
class SPSA:
    """g = (L(x + eps z) - L(x - eps z)) / (2 eps) with z ~ N(0, I), `samples` times.

    Each sample has a batch of `batch_size` and a direction of its own; both losses see the same
    batch. E[g z] is the gradient (of a smoothed loss). Breaks where the loss draws random numbers
    of its own, such as dropout. In float32 the difference of two losses of about 1 is exact to
    1e-7, so g to 1e-7 / eps. Source: Spall 1992; Malladi et al. 2023, algorithm 1 (arXiv
    2305.17333).

    >>> SPSA(eps=1e-3, samples=2).batch_size
    32
    """

    eps: float = 1e-3
    samples: int = 1
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_eps("SPSA", self.eps)
        if self.samples < 1 or self.batch_size < 1:
            raise UsageError(
                f"SPSA: samples={self.samples}, batch_size={self.batch_size}; need at least 1"
            )

    def estimate(self, task: Task, params: Vector, shard: Shard, key: Key) -> Tensor:
        """Projected gradients [..., samples] of rows [..., dim] with their shards and keys [...].

        Sample a perturbs along the noise of `fold(key, a)`. float64; not finite where a loss was
        not, and 0 for rows without data.
        """
        lead, dim = params.shape[:-1], params.shape[-1]
        found = []
        for sample in range(self.samples):
            own = keyed.fold(key, sample)
            words = own.expand(lead).reshape(-1).tolist()
            shift = self.eps * noise_rows(words, dim, dtype=params.dtype, device=params.device)
            shift = shift.view(*lead, dim)
            batch = task.batch(shard, keyed.fold(own, "data"), self.batch_size)
            both = task.loss(torch.stack((params + shift, params - shift)), batch).double()
            found.append((both[0] - both[1]) / (2.0 * self.eps))
        return torch.stack(found, -1)


def slope_in_place(
    loss: Callable[[], Tensor], tensors: Sequence[Tensor], key: int, eps: float, *,
    backup: bool = False,
) -> float:  # fmt: skip
    """One projected gradient with the memory of inference: perturbs `tensors` where they lie.

    loss: of the tensors as they are, the same batch both times. The weights go to x + eps z, to
    x - eps z, and back. Coming back, each is within a rounding of |x| + eps |z| of where it was
    (over thousands of calls that drifts: replay the log now and then); `backup` holds a copy
    meanwhile and restores the very bits. Source: Malladi et al. 2023, algorithm 1.

    >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> g = slope_in_place(lambda: 3.0 * x.sum(), [x], key=5, eps=1e-3, backup=True)
    >>> z = noise_rows([5], 2, dtype=x.dtype)
    >>> abs(g - 3.0 * float(z.sum())) < 1e-9, x.tolist()
    (True, [1.0, 2.0])
    """
    check_eps("slope_in_place", eps)
    kept = [tensor.detach().clone() for tensor in tensors] if backup else None
    with torch.no_grad():
        walk_in_place(tensors, [key], [-eps])
        plus = float(loss())
        walk_in_place(tensors, [key], [2.0 * eps])
        minus = float(loss())
        if kept is None:
            walk_in_place(tensors, [key], [-eps])
        else:
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
    return (plus - minus) / (2.0 * eps)
