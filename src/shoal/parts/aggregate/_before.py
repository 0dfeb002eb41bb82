"""What rules that change the rows before another rule share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate.base import Settings, rule_named
from shoal.tensor.types import Mask, Stack


def rule_after(part: str, then: str, settings: Settings, byzantine: int) -> Any:
    """The rule that follows `part`, which must not be `part` again."""
    if then == part:
        raise UsageError(f"{part}: then={then!r} comes twice; need another rule, such as median")
    return rule_named(then, settings, byzantine)


def lengths(x: Stack, rows: Mask) -> Tensor:
    """Euclidean length of each row, float64 [..., k], NaN for rows that do not count."""
    top = x.abs().amax(-1).to(torch.float64) if x.shape[-1] else x.sum(-1).to(torch.float64)
    scale = torch.where(top > 0, top, 1.0)
    # Divided by the largest entry first: no square overflows, whatever was sent.
    unit = x / scale.to(x.dtype).unsqueeze(-1)
    length = scale * torch.linalg.vector_norm(unit, dim=-1, dtype=torch.float64)
    return torch.where(rows, length, float("nan"))


def shortened(x: Stack, rows: Mask, length: Tensor, limit: Tensor) -> Stack:
    """Rows no longer than `limit` [...], NaN for those that do not count."""
    factor = (limit.unsqueeze(-1) / torch.where(length > 0, length, 1.0)).clamp(max=1)
    shorter = x * factor.to(x.dtype).unsqueeze(-1)
    return torch.where(rows.unsqueeze(-1), shorter, float("nan"))
