"""A link that loses part of each message, and a receiver that takes zero for what is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoal.parts.transform.base import Buffer, Codec, Dense, check_number
from shoal.parts.transform.identity import unpack_dense
from shoal.tensor.keyed import fold, grid, uniform
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class Lossy(Codec):
    """Each coordinate is lost with probability `share` and arrives as zero.

    What a training loop over datagrams without retransmission sees. The sender pays for the whole
    vector, dim * itemsize bytes. A vector that is not finite stays so, whatever is lost of it.
    Source: Almasi et al. 2024, section 3 (10% loss at the parameter server; arXiv 2302.05865).

    >>> codec = Lossy(share=0.25)
    >>> sent, _ = codec.encode(torch.ones(1000), None, torch.tensor(0))
    >>> 0.2 < float((codec.decode(sent) == 0).float().mean()) < 0.3
    True
    """

    share: float = 0.1

    dense: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"share": 0.4})

    def __post_init__(self) -> None:
        check_number("lossy", "share", self.share, "a share from 0 to 1", 0 <= self.share <= 1)

    def contraction(self, dim: int) -> float:
        """In expectation exactly this part of the squared norm is lost."""
        return self.share

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Dense, Any]:
        self._accept(x)
        lost = uniform(grid(fold(key, "lossy"), x.shape[-1])) < self.share
        values = torch.where(lost, torch.zeros_like(x), x)
        # A lost infinity must not make an ordinary vector of one that is none.
        whole = x.isfinite().all(-1, keepdim=True)
        return Dense(torch.where(whole, values, math.nan)), state

    def decode(self, payload: Dense) -> Vector:
        return payload.values

    def unpack(self, data: Buffer) -> Dense:
        return unpack_dense(data, None if self.spec is None else self.spec.dim, self._name)
