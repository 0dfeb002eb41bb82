"""What decoding gives where results may be wrong and not only missing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecodeResult:
    """What was computed, and how far to believe it.

    Y: the results [..., K, dim]. errors: who was left out as wrong, bool [..., N]. residual: what
    does not fit the code, root mean square relative to the results, [...]; nan where nothing was
    checked. trusted: whether something was checked and that is as little as it should be, bool
    [...]. More wrong answers than a code corrects may, seldom, look like other right ones.
    """

    Y: Tensor
    errors: Tensor
    residual: Tensor
    trusted: Tensor
