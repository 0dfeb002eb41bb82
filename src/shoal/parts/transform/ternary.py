"""Three values per entry: minus, nothing, plus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError
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
)
from shoal.tensor.keyed import fold, grid, uniform
from shoal.tensor.types import Key, Scalar, Vector

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


@dataclass(frozen=True, eq=False)
class Trits(TensorPayload):
    """Entry i is codes[i] * scale of its group. scale: [..., groups]; codes: int8 [..., dim].

    On the wire: scales, then five codes a byte in base 3 (1.6 bits per entry; entropy 1.585).
    """

    ranks: ClassVar[dict[str, int]] = {"scale": 1, "codes": 1}

    scale: Scalar
    codes: Tensor
    groups: tuple[int, ...]

    def row_bytes(self) -> int:
        scales = self.scale.shape[-1] * self.scale.element_size()
        return scales + -(-self.codes.shape[-1] // 5)

    def pack(self) -> bytes:
        self._need_row()
        digits = (array(self.codes) + 1).astype(np.uint8)
        padded = np.zeros(-(-len(digits) // 5) * 5, np.uint8)
        padded[: len(digits)] = digits
        packed = (padded.reshape(-1, 5) * _POWERS).sum(1, dtype=np.uint8)
        return b"".join((raw(self.scale), packed.tobytes()))


@dataclass(frozen=True)
class Ternary(Codec):
    """TernGrad: s * sign(x_i) with probability |x_i| / s, else 0; s the largest magnitude.

    Unbiased, with E|C(x) - x|^2 = s |x|_1 - |x|_2^2 <= (sqrt(dim) - 1) |x|^2. per_layer: an s for
    each layer of the bound layout, as the paper does. clip_deviations: clip at that many standard
    deviations first (2.5 in the paper; lowers variance, costs unbiasedness); 0 = off.
    Source: Wen et al. 2017, equations 3 to 5 and section 3 (arXiv 1705.07878).

    >>> codec = Ternary()
    >>> payload, _ = codec.encode(torch.tensor([2., 0., -2.]), None, torch.tensor(0))
    >>> codec.decode(payload), payload.byte_count()
    (tensor([ 2.,  0., -2.]), 5)
    """

    per_layer: bool = False
    clip_deviations: float = 0.0

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"per_layer": True},
        {"per_layer": True, "clip_deviations": 2.5},
    )

    def __post_init__(self) -> None:
        check_number(
            "ternary",
            "clip_deviations",
            self.clip_deviations,
            "a number >= 0 (0 = no clipping)",
            0 <= self.clip_deviations < math.inf,
        )

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.clip_deviations == 0

    def contraction(self, dim: int) -> float | None:
        return math.sqrt(dim) - 1 if self.unbiased else None

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Trits, Any]:
        self._accept(x)
        groups = self._groups(x.shape[-1], self.per_layer)
        # The largest magnitude of NaN is NaN, so a broken layer stays visibly broken.
        scales = [self._scale(part) for part in x.split(groups, -1)]
        scale = torch.stack(scales, -1)
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        share = (x.abs() / spread(divisor, groups)).nan_to_num_(0.0)
        draws = uniform(grid(fold(key, "ternary"), x.shape[-1]))
        codes = (draws < share) * x.sign().nan_to_num_(0.0)
        return Trits(scale=scale, codes=codes.to(torch.int8), groups=groups), state

    def _scale(self, part: Vector) -> Scalar:
        largest = part.abs().amax(-1)
        if self.unbiased:
            return largest
        mean = part.mean(-1, keepdim=True, dtype=torch.float64)
        deviation = (part - mean).square().mean(-1).sqrt()
        # Shares above 1 then always give s: that is the clipping of the paper.
        return torch.minimum(largest, (self.clip_deviations * deviation).to(part.dtype))

    def decode(self, payload: Trits) -> Vector:
        return payload.codes.to(payload.scale.dtype) * spread(payload.scale, payload.groups)

    def unpack(self, data: Buffer) -> Trits:
        dim = self._bound().dim
        groups = self._groups(dim, self.per_layer)
        view = flat_view(data)
        packed = -(-dim // 5)
        dtype = dtype_by_length(view, packed, len(groups), self._name)
        octets = bytes_at(view, len(groups) * dtype.itemsize, packed)
        digits = (octets[:, None] // _POWERS % 3).reshape(-1)
        if (octets >= 243).any() or digits[dim:].any():
            raise DecodeError(f"{self._name}: bytes that no vector is packed to (corrupted bytes)")
        return Trits(
            scale=tensor_at(view, 0, len(groups), dtype),
            codes=torch.from_numpy(digits[:dim].astype(np.int8) - np.int8(1)),
            groups=groups,
        )
