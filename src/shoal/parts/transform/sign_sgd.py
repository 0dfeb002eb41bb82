"""One bit per entry."""

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
    dtype_by_length,
    flat_view,
    raw,
    spread,
    tensor_at,
)
from shoal.tensor.types import Key, Scalar, Vector


@dataclass(frozen=True, eq=False)
class Signs(TensorPayload):
    """Entry i is +scale or -scale of its group. scale: [..., groups]; positive: bool [..., dim]."""

    ranks: ClassVar[dict[str, int]] = {"scale": 1, "positive": 1}

    scale: Scalar
    positive: Tensor
    groups: tuple[int, ...]

    def row_bytes(self) -> int:
        scales = self.scale.shape[-1] * self.scale.element_size()
        return scales + packed_bytes(self.positive.shape[-1], 1)

    def pack(self) -> bytes:
        self._need_row()
        return b"".join((raw(self.scale), pack_integers(array(self.positive), 1)))


@dataclass(frozen=True)
class SignSGD(Codec):
    """The sign of each entry times the mean magnitude: one bit per entry and one number.

    The scale makes it a contraction, |C(x) - x|^2 <= (1 - |x|_1^2 / (dim |x|_2^2)) |x|^2, at worst
    1 - 1/dim; the sign of 0 is +. per_layer: a scale for each layer of the bound layout.
    Biased: without error feedback it need not converge.
    Source: Bernstein et al. 2018 (arXiv 1802.04434); scale and lemma 8: Karimireddy et al. 2019
    (arXiv 1901.09847).

    >>> codec = SignSGD()
    >>> payload, _ = codec.encode(torch.tensor([1., -3.]), None, torch.tensor(0))
    >>> codec.decode(payload), payload.byte_count()
    (tensor([ 2., -2.]), 5)
    """

    per_layer: bool = False

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"per_layer": True})

    def contraction(self, dim: int) -> float:
        return 1.0 - 1.0 / dim

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Signs, Any]:
        self._accept(x)
        groups = self._groups(x.shape[-1], self.per_layer)
        means = [part.abs().mean(-1, dtype=torch.float64) for part in x.split(groups, -1)]
        scale = torch.stack(means, -1).to(x.dtype)
        return Signs(scale=scale, positive=x >= 0, groups=groups), state

    def decode(self, payload: Signs) -> Vector:
        scale = spread(payload.scale, payload.groups)
        return torch.where(payload.positive, scale, -scale)

    def unpack(self, data: Buffer) -> Signs:
        dim = self._bound().dim
        groups = self._groups(dim, self.per_layer)
        view = flat_view(data)
        packed = packed_bytes(dim, 1)
        dtype = dtype_by_length(view, packed, len(groups), self._name)
        start = len(groups) * dtype.itemsize
        bits = unpack_integers(bytes_at(view, start, packed), 1, dim, self._name)
        return Signs(
            scale=tensor_at(view, 0, len(groups), dtype),
            positive=torch.from_numpy(bits).bool(),
            groups=groups,
        )
