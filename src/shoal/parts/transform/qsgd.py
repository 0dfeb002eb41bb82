"""Signed levels relative to the Euclidean norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError
from shoal.parts.transform._bits import pack_integers, packed_bytes, unpack_integers, width_of
from shoal.parts.transform.base import (
    Buffer,
    Codec,
    TensorPayload,
    array,
    bytes_at,
    check_number,
    dtype_by_length,
    flat_view,
    raw,
    spread,
    tensor_at,
    vector_norm,
)
from shoal.tensor.keyed import fold, grid, uniform
from shoal.tensor.types import Key, Scalar, Vector


@dataclass(frozen=True, eq=False)
class Levels(TensorPayload):
    """Entry i is codes[i] * norm / levels of its group.

    norm: [..., groups]; codes: int8 [..., dim] in -levels..levels. On the wire: norms, then
    codes + levels in ceil(log2(2 * levels + 1)) bits.
    """

    ranks: ClassVar[dict[str, int]] = {"norm": 1, "codes": 1}

    norm: Scalar
    codes: Tensor
    levels: int
    groups: tuple[int, ...]

    def row_bytes(self) -> int:
        scales = self.norm.shape[-1] * self.norm.element_size()
        return scales + packed_bytes(self.codes.shape[-1], width_of(2 * self.levels + 1))

    def pack(self) -> bytes:
        self._need_row()
        codes = (array(self.codes).astype(np.int16) + self.levels).astype(np.uint8)
        return b"".join((raw(self.norm), pack_integers(codes, width_of(2 * self.levels + 1))))


@dataclass(frozen=True)
class Qsgd(Codec):
    """QSGD: each magnitude, as a share of the norm, rounded at random to one of `levels` levels.

    Unbiased, with variance at most min(dim / levels^2, sqrt(dim) / levels) |x|^2. Differs from
    `quantise` in its symmetric range: 0 stays exactly 0, and with few levels most entries become 0.
    per_layer: a norm for each layer of the bound layout. Wire: one number per norm + fixed-width
    codes (the paper's Elias code is shorter when levels < sqrt(dim); entropy coding is `fedzip`'s
    business).
    Source: Alistarh et al. 2017, section 3.1 and lemma 3.1 (arXiv 1610.02132).

    >>> codec = Qsgd(levels=1)
    >>> payload, _ = codec.encode(torch.tensor([0., -2., 0.]), None, torch.tensor(0))
    >>> codec.decode(payload), payload.byte_count()
    (tensor([ 0., -2.,  0.]), 5)
    """

    levels: int = 127
    per_layer: bool = False

    unbiased: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"levels": 1},
        {"levels": 4, "per_layer": True},
    )

    def __post_init__(self) -> None:
        check_number("qsgd", "levels", self.levels, "1 to 127", self.levels in range(1, 128))

    def contraction(self, dim: int) -> float:
        return min(dim / self.levels**2, math.sqrt(dim) / self.levels)

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Levels, Any]:
        self._accept(x)
        groups = self._groups(x.shape[-1], self.per_layer)
        exact = torch.stack([vector_norm(part) for part in x.split(groups, -1)], -1)
        norm = exact.to(x.dtype)
        divisor = torch.where(norm == 0, torch.ones_like(norm), norm)
        place = (x.abs() / spread(divisor, groups)).nan_to_num_(0.0) * self.levels
        codes = place.floor()
        codes += uniform(grid(fold(key, "qsgd"), x.shape[-1])) < (place - codes)
        codes = (codes.clamp_(max=self.levels) * x.sign().nan_to_num_(0.0)).to(torch.int8)
        return Levels(norm=norm, codes=codes, levels=self.levels, groups=groups), state

    def decode(self, payload: Levels) -> Vector:
        step = payload.norm / payload.levels
        return payload.codes.to(step.dtype) * spread(step, payload.groups)

    def unpack(self, data: Buffer) -> Levels:
        dim = self._bound().dim
        groups = self._groups(dim, self.per_layer)
        view = flat_view(data)
        width = width_of(2 * self.levels + 1)
        packed = packed_bytes(dim, width)
        dtype = dtype_by_length(view, packed, len(groups), self._name)
        start = len(groups) * dtype.itemsize
        codes = unpack_integers(bytes_at(view, start, packed), width, dim, self._name)
        if (codes > 2 * self.levels).any():
            raise DecodeError(f"{self._name}: a code above {2 * self.levels} (corrupted bytes)")
        signed = (codes.astype(np.int16) - self.levels).astype(np.int8)
        return Levels(
            norm=tensor_at(view, 0, len(groups), dtype),
            codes=torch.from_numpy(signed),
            levels=self.levels,
            groups=groups,
        )
