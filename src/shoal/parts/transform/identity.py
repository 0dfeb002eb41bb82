"""No change: the raw vector, and the yardstick for all other transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shoal.base.errors import DecodeError
from shoal.parts.transform.base import (
    FLOATS,
    Buffer,
    Codec,
    Dense,
    dtype_by_length,
    flat_view,
    tensor_at,
)
from shoal.tensor.types import Key, Vector


def unpack_dense(data: Buffer, dim: int | None, who: str) -> Dense:
    """A row of raw numbers, a view where `tensor_at` allows; float32 if the length is not given."""
    view = flat_view(data)
    if dim is not None:
        dtype = dtype_by_length(view, 0, dim, who)
    elif len(view) % FLOATS[0].itemsize or not len(view):
        raise DecodeError(f"{who}: {len(view)} bytes are no whole number of float32")
    else:
        dtype = FLOATS[0]
    return Dense(tensor_at(view, 0, len(view) // dtype.itemsize, dtype))


@dataclass(frozen=True)
class Identity(Codec):
    """The vector as it is: dim * itemsize bytes, packed without a copy.

    The payload aliases the encoded vector, which must stay unchanged, as everything that is sent;
    an unpacked vector is a view of the buffer it came from if that is writable and aligned.

    >>> import torch
    >>> payload, _ = Identity().encode(torch.ones(3), None, torch.tensor(0))
    >>> payload.byte_count()
    12
    """

    unbiased: ClassVar[bool] = True
    dense: ClassVar[bool] = True

    def contraction(self, dim: int) -> float:
        return 0.0

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Dense, Any]:
        self._accept(x)
        return Dense(x), state

    def decode(self, payload: Dense) -> Vector:
        return payload.values

    def unpack(self, data: Buffer) -> Dense:
        return unpack_dense(data, None if self.spec is None else self.spec.dim, self._name)
