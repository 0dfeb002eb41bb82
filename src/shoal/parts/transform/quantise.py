"""Few-bit numbers between the smallest and the largest entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.transform._bits import pack_integers, packed_bytes, unpack_integers
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


@dataclass(frozen=True, eq=False)
class Grid(TensorPayload):
    """Entry i is low + codes[i] * step of its group.

    low, step: [..., groups]; codes: uint8 [..., dim]. On the wire: low, step, codes of `bits` bits.
    """

    ranks: ClassVar[dict[str, int]] = {"low": 1, "step": 1, "codes": 1}

    low: Scalar
    step: Scalar
    codes: Tensor
    bits: int
    groups: tuple[int, ...]

    def row_bytes(self) -> int:
        scales = 2 * self.low.shape[-1] * self.low.element_size()
        return scales + packed_bytes(self.codes.shape[-1], self.bits)

    def pack(self) -> bytes:
        self._need_row()
        codes = pack_integers(array(self.codes), self.bits)
        return b"".join((raw(self.low), raw(self.step), codes))


@dataclass(frozen=True)
class Quantise(Codec):
    """Uniform levels of `bits` bits, 2**bits of them from the minimum to the maximum.

    rounding: "stochastic" (unbiased; error at most one step) or "nearest" (biased; half a step);
    per_layer: a range for each layer of the bound layout rather than one for the vector.
    Wire: two numbers per range + ceil(dim * bits / 8) bytes. One outlier widens the range and so
    coarsens all others. A vector that is not finite decodes to one that is not finite either.
    Source: Suresh et al. 2017, section 3 (arXiv 1611.00429).

    >>> codec = Quantise(bits=2, rounding="nearest")
    >>> payload, _ = codec.encode(torch.tensor([0., 1.2, 3.]), None, torch.tensor(0))
    >>> codec.decode(payload), payload.byte_count()
    (tensor([0., 1., 3.]), 9)
    """

    bits: int = 8
    rounding: str = "stochastic"
    per_layer: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        *({"bits": bits} for bits in (1, 2, 3, 5, 7, 8)),
        {"bits": 3, "per_layer": True},
        {"bits": 4, "rounding": "nearest"},
    )

    def __post_init__(self) -> None:
        check_number("quantise", "bits", self.bits, "1 to 8", self.bits in range(1, 9))
        check_number(
            "quantise",
            "rounding",
            self.rounding,
            "'stochastic' or 'nearest'",
            self.rounding in ("stochastic", "nearest"),
        )

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.rounding == "stochastic"

    def contraction(self, dim: int) -> float:
        # (max - min)^2 <= 2 |x|^2, and an entry's mean squared error is at most step^2 / 4.
        return dim / (2 * (2**self.bits - 1) ** 2)

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Grid, Any]:
        self._accept(x)
        groups = self._groups(x.shape[-1], self.per_layer)
        bounds = [torch.aminmax(part, dim=-1) for part in x.split(groups, -1)]
        low = torch.stack([bound.min for bound in bounds], -1)
        high = torch.stack([bound.max for bound in bounds], -1)
        levels = 2**self.bits - 1
        step = high / levels - low / levels
        # A range so small that its step is 0 has one level; dividing by 1 then gives codes of 0.
        divisor = torch.where(step == 0, torch.ones_like(step), step)
        place = ((x - spread(low, groups)) / spread(divisor, groups)).nan_to_num_(0.0)
        if self.rounding == "nearest":
            codes = place.round_()
        else:
            codes = place.floor()
            draws = uniform(grid(fold(key, "quantise"), x.shape[-1]))
            # Compared, not added: a draw rounded up to 1 would move entries that lie on a level.
            codes += draws < (place - codes)
        codes = codes.clamp_(0, levels).to(torch.uint8)
        return Grid(low=low, step=step, codes=codes, bits=self.bits, groups=groups), state

    def decode(self, payload: Grid) -> Vector:
        groups = payload.groups
        codes = payload.codes.to(payload.low.dtype)
        return spread(payload.low, groups) + codes * spread(payload.step, groups)

    def unpack(self, data: Buffer) -> Grid:
        dim = self._bound().dim
        groups = self._groups(dim, self.per_layer)
        view = flat_view(data)
        packed = packed_bytes(dim, self.bits)
        dtype = dtype_by_length(view, packed, 2 * len(groups), self._name)
        scales = len(groups) * dtype.itemsize
        codes = unpack_integers(bytes_at(view, 2 * scales, packed), self.bits, dim, self._name)
        return Grid(
            low=tensor_at(view, 0, len(groups), dtype),
            step=tensor_at(view, scales, len(groups), dtype),
            codes=torch.from_numpy(codes),
            bits=self.bits,
            groups=groups,
        )
