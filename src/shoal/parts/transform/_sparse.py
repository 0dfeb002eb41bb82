"""A few entries of a long vector: values and bit-packed positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError
from shoal.parts.transform._bits import pack_integers, packed_bytes, unpack_integers, width_of
from shoal.parts.transform.base import (
    Buffer,
    TensorPayload,
    array,
    bytes_at,
    dtype_by_length,
    flat_view,
    raw,
    tensor_at,
)
from shoal.tensor.types import Index, Vector


@dataclass(frozen=True, eq=False)
class Sparse(TensorPayload):
    """values [..., k] at ascending positions index int64 [..., k] of a vector of `dim` entries.

    On the wire: k values in their own dtype, then k positions of ceil(log2 dim) bits.
    """

    ranks: ClassVar[dict[str, int]] = {"values": 1, "index": 1}

    values: Tensor
    index: Index
    dim: int

    def row_bytes(self) -> int:
        count = self.values.shape[-1]
        packed = packed_bytes(count, width_of(self.dim))
        return count * self.values.element_size() + packed

    def pack(self) -> bytes:
        self._need_row()
        positions = pack_integers(array(self.index), width_of(self.dim))
        return b"".join((raw(self.values), positions))

    def dense(self) -> Vector:
        """The vector [..., dim] with zeros elsewhere."""
        zeros = self.values.new_zeros(*self.lead, self.dim)
        return zeros.scatter_(-1, self.index, self.values)


def unpack_sparse(data: Buffer, keep: int, dim: int, who: str) -> Sparse:
    """A row of `keep` entries; DecodeError on other lengths and on positions out of order."""
    view = flat_view(data)
    width = width_of(dim)
    packed = packed_bytes(keep, width)
    dtype = dtype_by_length(view, packed, keep, who)
    start = keep * dtype.itemsize
    index = unpack_integers(bytes_at(view, start, packed), width, keep, who).astype(np.int64)
    if index[-1] >= dim or (index[1:] <= index[:-1]).any():
        raise DecodeError(f"{who}: positions must ascend and stay below {dim} (corrupted bytes)")
    return Sparse(values=tensor_at(view, 0, keep, dtype), index=torch.from_numpy(index), dim=dim)
