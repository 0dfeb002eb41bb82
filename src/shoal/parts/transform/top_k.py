"""Send the largest entries only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.parts.transform._select import kept_count, largest
from shoal.parts.transform._sparse import Sparse, unpack_sparse
from shoal.parts.transform.base import Buffer, Codec, check_number
from shoal.tensor.types import Key, Vector


@dataclass(frozen=True)
class TopK(Codec):
    """The `fraction` of entries with the largest magnitude; all others become 0.

    Exactly max(1, round(fraction * dim)) entries over the whole vector, ties to the lower
    position. Wire: k numbers of the vector's dtype (32 bits for float32) + k positions of
    ceil(log2 dim) bits, no header. Biased: without error feedback, small entries never arrive.
    Source: Aji and Heafield 2017, section 3 (arXiv 1704.05021); contraction 1 - k/dim: Stich et
    al. 2018, definition 2.1 (arXiv 1809.07599).

    >>> import torch
    >>> codec = TopK(fraction=0.5)
    >>> payload, _ = codec.encode(torch.tensor([1., -4., 3., 0.]), None, torch.tensor(0))
    >>> codec.decode(payload), payload.byte_count()
    (tensor([ 0., -4.,  3.,  0.]), 9)
    """

    fraction: float = 0.01

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"fraction": 0.3},
        {"fraction": 1.0},
        {"fraction": 1e-9},
    )

    def __post_init__(self) -> None:
        check_number(
            "top_k", "fraction", self.fraction, "0 < fraction <= 1", 0 < self.fraction <= 1
        )

    def contraction(self, dim: int) -> float:
        return 1.0 - kept_count(self.fraction, dim) / dim

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Sparse, Any]:
        self._accept(x)
        dim = x.shape[-1]
        index = largest(x, kept_count(self.fraction, dim))
        return Sparse(values=x.gather(-1, index), index=index, dim=dim), state

    def decode(self, payload: Sparse) -> Vector:
        return payload.dense()

    def unpack(self, data: Buffer) -> Sparse:
        dim = self._bound().dim
        return unpack_sparse(data, kept_count(self.fraction, dim), dim, self._name)
