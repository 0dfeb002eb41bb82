"""Very sparse updates with local momentum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.transform._select import kept_count, largest
from shoal.parts.transform._sparse import Sparse, unpack_sparse
from shoal.parts.transform.base import Buffer, Codec, check_number, vector_norm
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class Memory:
    """velocity: the local momentum; unsent: what has piled up. Both [..., dim]."""

    velocity: Tensor
    unsent: Tensor


@dataclass(frozen=True)
class DeepGradient(Codec):
    """DGC: momentum before accumulation, the largest entries sent, both memories cleared there.

    u <- momentum * u + x; v <- v + u; send the `fraction` of largest |v|; u = v = 0 where sent
    (momentum factor masking). x is a gradient or displacement. clip: bound |x| first; 0 = off.
    The receiver must not add momentum of its own, or it counts twice. The paper's warm-up of the
    fraction is left to the scenario, because payload sizes are fixed per transform here.
    Wire: as `top_k`. Source: Lin et al. 2018, sections 3.2 and 3.3 (arXiv 1712.01887).

    >>> codec = DeepGradient(fraction=0.5, momentum=0.0)
    >>> x = torch.tensor([3., 2.])
    >>> first, state = codec.encode(x, codec.init(x), torch.tensor(0))
    >>> second, state = codec.encode(x, state, torch.tensor(0))
    >>> codec.decode(first), codec.decode(second)
    (tensor([3., 0.]), tensor([0., 4.]))
    """

    fraction: float = 0.001
    momentum: float = 0.9
    clip: float = 0.0

    stateful: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"fraction": 0.2, "clip": 1.0})

    def __post_init__(self) -> None:
        check_number(
            "deep_gradient", "fraction", self.fraction, "0 < fraction <= 1", 0 < self.fraction <= 1
        )
        check_number(
            "deep_gradient", "momentum", self.momentum, "0 <= momentum < 1", 0 <= self.momentum < 1
        )
        check_number(
            "deep_gradient",
            "clip",
            self.clip,
            "a finite number >= 0 (0 = off)",
            0 <= self.clip < math.inf,
        )

    def init(self, like: Vector) -> Memory:
        return Memory(torch.zeros_like(like), torch.zeros_like(like))

    def encode(self, x: Vector, state: Memory, key: Key) -> tuple[Sparse, Memory]:
        self._accept(x)
        if self.clip:
            factor = self.clip / vector_norm(x).clamp(min=self.clip)
            x = x * factor.unsqueeze(-1).to(x.dtype)
        velocity = self.momentum * state.velocity + x
        unsent = state.unsent + velocity
        dim = x.shape[-1]
        index = largest(unsent, kept_count(self.fraction, dim))
        payload = Sparse(values=unsent.gather(-1, index), index=index, dim=dim)
        # A broken entry must not poison the memory for all rounds to come, so it is cleared too.
        keep = (unsent.isfinite() & velocity.isfinite()).scatter(-1, index, False)
        zero = torch.zeros_like(x)
        return payload, Memory(torch.where(keep, velocity, zero), torch.where(keep, unsent, zero))

    def decode(self, payload: Sparse) -> Vector:
        return payload.dense()

    def unpack(self, data: Buffer) -> Sparse:
        dim = self._bound().dim
        return unpack_sparse(data, kept_count(self.fraction, dim), dim, self._name)
