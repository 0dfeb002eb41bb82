"""One byte per number on every hop of a ring, such that all peers end with the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.base.errors import UsageError, WireError

LEVELS = 255
HEAD_BYTES = 8
"""Two float32 in front of the codes: the value of code 0 and the step, or zero point and scale."""


@dataclass(frozen=True)
class Quantised:
    """Float32 numbers `[size]` as uint8 `[8 + size]`, nearest of 256 levels.

    kind "min_max": levels from the smallest to the largest number; decoded = low + code * step.
    kind "zero_point": the range is widened to hold 0, which stays exactly 0; decoded =
    (code - zero_point) * scale. The error is at most half a step, (max - min) / 510 of the range
    used, and float32 rounding (a thousandth of that). Numbers that are not finite make the whole
    chunk not finite.

    In a ring every reducing hop decodes and encodes again; what is finished is encoded once, by its
    owner, who then takes the decoded bytes itself. Encoding again while gathering would give every
    peer numbers of its own.
    Source: PCCL (arXiv 2505.14065), section on quantised all-reduce.

    >>> codec = Quantised()
    >>> codec.decode(codec.encode(torch.tensor([0.0, 0.5, 255.0])))
    tensor([  0.,   0., 255.])
    """

    kind: str = "min_max"

    def __post_init__(self) -> None:
        if self.kind not in ("min_max", "zero_point"):
            raise UsageError(
                f"quantised: kind={self.kind!r}; need 'min_max' or 'zero_point' (or quantise=None)"
            )

    def encode(self, x: Tensor) -> Tensor:
        """x: float32 [size], size >= 1 -> uint8 [8 + size]."""
        low, high = torch.aminmax(x)
        if self.kind == "zero_point":
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        # Divided before subtracting, so that a range from -3e38 to 3e38 does not overflow.
        step = high / LEVELS - low / LEVELS
        # A range of nothing has one level; dividing by 1 then gives codes of 0.
        divisor = torch.where(step == 0, torch.ones_like(step), step)
        out = torch.empty(HEAD_BYTES + x.numel(), dtype=torch.uint8, device=x.device)
        if self.kind == "zero_point":
            first = (-low / divisor).round()
            place = (x / divisor).add_(first)
            second = step
        else:
            first, second = low, step
            place = (x - low).div_(divisor)
        out[:HEAD_BYTES].view(torch.float32).copy_(torch.stack((first, second)))
        out[HEAD_BYTES:].copy_(place.round_().nan_to_num_(0.0).clamp_(0, LEVELS))
        return out

    def decode(self, data: Tensor) -> Tensor:
        """Inverse of `encode` up to rounding: uint8 [8 + size] -> float32 [size]."""
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() < HEAD_BYTES:
            raise WireError(
                f"quantised: {data.dtype} {tuple(data.shape)}; need uint8 with {HEAD_BYTES} bytes "
                "of scale before the codes"
            )
        first, step = data[:HEAD_BYTES].view(torch.float32)
        codes = data[HEAD_BYTES:].to(torch.float32)
        if self.kind == "zero_point":
            return codes.sub_(first).mul_(step)
        return codes.mul_(step).add_(first)
