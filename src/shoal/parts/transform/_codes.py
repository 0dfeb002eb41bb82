"""What mechanisms that send an integer for each entry share: codes on evenly spaced levels.

A mechanism says how an entry becomes an integer at random and with which probabilities; the rest,
from clipping to bytes, is here. Decoding is linear, so the mean of decoded vectors is what the sum
of their codes decodes to (`decode_sum`), and a hub needs no more than that sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shoal.base.errors import DecodeError, UsageError
from shoal.parts.privacy.secret_keys import Secrets, check_secrets, draw_keys
from shoal.parts.transform._bits import pack_integers, packed_bytes, unpack_integers
from shoal.parts.transform.base import (
    Buffer,
    Codec,
    TensorPayload,
    array,
    bytes_at,
    check_number,
    flat_view,
)
from shoal.tensor.keyed import fold
from shoal.tensor.types import Key, Mask, Vector

DOUBLE, BROKEN = 1, 2
"""Bits of the first byte: the vector was float64; it was not finite."""


@dataclass(frozen=True, eq=False)
class Codes(TensorPayload):
    """codes: whole numbers [..., dim], 0 or more; broken: bool [...], the vector was not finite.

    On the wire: a byte of flags, then `width` bits for each code.
    """

    ranks: ClassVar[dict[str, int]] = {"codes": 1, "broken": 0}

    codes: Tensor
    broken: Mask
    width: int
    double: bool

    def row_bytes(self) -> int:
        return 1 + packed_bytes(self.codes.shape[-1], self.width)

    def pack(self) -> bytes:
        self._need_row()
        flags = DOUBLE * self.double + BROKEN * bool(self.broken)
        return bytes([flags]) + pack_integers(array(self.codes), self.width)


def unpacked_codes(
    data: Buffer, dim: int, width: int, levels: int, blank: int, who: str
) -> tuple[np.ndarray, int]:
    """Codes [dim] below `levels` and the byte of flags of a packed row, from anybody.

    blank: the code of all entries of a vector that was not finite.
    """
    view = flat_view(data)
    packed = packed_bytes(dim, width)
    if len(view) != 1 + packed:
        raise DecodeError(
            f"{who}: {len(view)} bytes; need {1 + packed} for this layout (truncated, or bound to "
            "another)"
        )
    flags = view[0]
    codes = unpack_integers(bytes_at(view, 1, packed), width, dim, who)
    if flags > DOUBLE + BROKEN or (codes >= levels).any():
        raise DecodeError(
            f"{who}: flags {flags}, largest code {codes.max()} of {levels} (corrupted bytes)"
        )
    if flags & BROKEN and (codes != blank).any():
        raise DecodeError(f"{who}: codes in a vector without numbers (corrupted bytes)")
    return codes, flags


def codes_of(codes: np.ndarray, flags: int, width: int, dtype: torch.dtype) -> Codes:
    """The payload that was unpacked, with codes of that dtype."""
    broken = torch.tensor(bool(flags & BROKEN), device="cpu")
    return Codes(torch.from_numpy(codes).to(dtype), broken, width, bool(flags & DOUBLE))


@dataclass(frozen=True)
class IntegerCodec(Codec):
    """Base of mechanisms whose entry z stands for `low + step * z`, z = 0 .. levels - 1.

    clip: entries are limited to [-clip, clip] first. clients: of how many clients the codes are to
    be added up modulo a power of two under masks (secure aggregation); an entry then takes
    ceil(log2(clients * (levels - 1) + 1)) bits rather than ceil(log2(levels)). The masks are not
    made here (see `shoal.parts.privacy.modular_sum`), only paid for. secrets: of the draws, see
    `shoal.parts.privacy.secret_keys`.
    """

    clip: float = 1.5
    levels: int = 16
    clients: int = 1
    secrets: Secrets = field(default="run", kw_only=True)

    def __post_init__(self) -> None:
        who = self._name
        check_secrets(who, self.secrets)
        self._number("clip", self.clip, 0 < self.clip < math.inf, "a finite number > 0")
        check_number(
            who, "levels", self.levels, f"{self.fewest} to {self.most}",
            self.levels in range(self.fewest, self.most + 1),
        )  # fmt: skip
        check_number(
            who, "clients", self.clients, "1 to 1000000", self.clients in range(1, 1_000_001)
        )

    fewest: ClassVar[int] = 2
    most: ClassVar[int] = 256

    @property
    def dtype(self) -> torch.dtype:
        """Of codes: the smallest that holds them."""
        return torch.uint8 if self.levels <= 256 else torch.int32

    def _number(self, name: str, value: float, fine: bool, rule: str) -> None:
        check_number(self._name, name, value, rule, fine)

    @property
    def low(self) -> float:
        """What code 0 stands for."""
        raise NotImplementedError

    @property
    def step(self) -> float:
        """What one more code is worth."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Bits for a code: enough for the sum of all clients' codes."""
        return (self.clients * (self.levels - 1)).bit_length()

    def draw(self, x: Vector, key: Key) -> Tensor:
        """Codes [..., dim] in `dtype` of float64 entries in [-clip, clip]; key [..., dim]."""
        raise NotImplementedError

    def log_pmf(self, x: Tensor) -> Tensor:
        """Logarithms of the probabilities of all codes: float64 [..., levels] for entries [...]."""
        raise NotImplementedError

    def pmf(self, x: Tensor) -> Tensor:
        """The probabilities of all codes: float64 [..., levels]; entries [...] need no clipping."""
        return self.log_pmf(x).exp()

    def values(self) -> Tensor:
        """What each code stands for: float64 [levels]."""
        return self.low + self.step * torch.arange(self.levels, dtype=torch.float64, device="cpu")

    def inputs(self, x: Tensor) -> Tensor:
        """Entries as float64; UsageError unless all are finite and within [-clip, clip]."""
        x = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        wrong = ~(x.abs() <= self.clip)
        if wrong.any():
            raise UsageError(
                f"{self._name}: x={float(x[wrong].reshape(-1)[0])}; need finite entries from "
                f"{-self.clip} to {self.clip} (clip them, or raise clip)"
            )
        return x

    def encode(self, x: Vector, state: Any, key: Key) -> tuple[Codes, Any]:
        self._accept(x)
        # The levels are exact in float64 only, and so is which of them an entry lies on.
        entries = x.to(torch.float64).nan_to_num(0.0).clamp(-self.clip, self.clip)
        codes = self.draw(entries, draw_keys(fold(key, self._name), x.shape[-1], self.secrets))
        broken = ~x.isfinite().all(-1)
        codes = codes.masked_fill(broken.unsqueeze(-1), 0)
        return Codes(codes, broken, self.width, x.dtype == torch.float64), state

    def decode(self, payload: Codes) -> Vector:
        values = self.low + self.step * payload.codes.to(torch.float64)
        values = values.masked_fill(payload.broken.unsqueeze(-1), math.nan)
        return values if payload.double else values.to(torch.float32)

    def decode_sum(self, codes: Tensor, clients: int) -> Vector:
        """The mean of `clients` decoded vectors from the sum of their codes [..., dim]."""
        if clients < 1:
            raise UsageError(f"{self._name}: clients={clients}; need at least 1 summand")
        return self.low + self.step / clients * codes.to(torch.float64)

    def unpack(self, data: Buffer) -> Codes:
        dim = self._bound().dim
        codes, flags = unpacked_codes(data, dim, self.width, self.levels, 0, self._name)
        return codes_of(codes, flags, self.width, self.dtype)
