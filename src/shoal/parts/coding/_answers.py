"""What workers answered, as rows: one for each worker, and who has one that is a number."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.coding.base import Workers


def rows_of(code: str, ids: Workers, V: Tensor, workers: int) -> tuple[Tensor, Tensor]:
    """Answers [..., len(ids), dim] as rows [..., workers, dim], and who has one, bool [workers]."""
    who = torch.as_tensor(list(ids), dtype=torch.int64, device=V.device)
    if V.dim() < 2 or V.shape[-2] != len(who):
        raise UsageError(
            f"{code}: answers {tuple(V.shape)} of {len(who)} workers; need [..., {len(who)}, dim]"
        )
    if len(who) != len(who.unique()) or (len(who) and not 0 <= who.min() <= who.max() < workers):
        raise UsageError(f"{code}: ids {who.tolist()}; need different ones from 0 to {workers - 1}")
    present = torch.ones(workers, dtype=torch.bool, device=V.device)
    if torch.equal(who, torch.arange(workers, device=V.device)):
        return V, present
    values = V.new_zeros((*V.shape[:-2], workers, V.shape[-1])).index_copy(-2, who, V)
    return values, (~present).index_fill(0, who, True)


def prepared(values: Tensor, present: Tensor | None, workers: int) -> tuple[Tensor, Tensor]:
    """Answers as float64 with zeros where there are none, and who has one that is a number."""
    if values.dim() < 2 or values.shape[-2] != workers or not values.shape[-1]:
        raise UsageError(
            f"values {tuple(values.shape)}; need [..., {workers}, dim], one row for each worker"
        )
    real = values
    if values.is_complex():
        # Nobody who computes with real shares gets one.
        real = values.real.masked_fill((values.imag != 0).any(-1, keepdim=True), torch.nan)
    # The largest and the smallest of a row are no numbers if any of it is none.
    finite = real.amax(-1).isfinite() & real.amin(-1).isfinite()
    there = finite if present is None else finite & present
    if not bool(there.all()):
        real = torch.where(there.unsqueeze(-1), real, 0.0)
    return real.to(torch.float64), there


def sizes(values: Tensor) -> Tensor:
    """The root mean square of every row, [..., rows]; nothing is too large to be squared."""
    size = torch.linalg.vector_norm(values, dim=-1) / values.shape[-1] ** 0.5
    if bool(size.isinf().any()):
        peak = values.abs().amax(-1)
        part = values / torch.where(peak > 0, peak, 1.0).unsqueeze(-1)
        size = peak * part.square().mean(-1).sqrt()
    return size


def typical(values: Tensor, present: Tensor) -> Tensor:
    """The median size of an answer, [...]; of those that are not zero, where most are; else 0."""
    size = sizes(values)
    out = torch.where(present, size, torch.nan).nanmedian(-1).values
    some = torch.where(present & (size > 0), size, torch.nan).nanmedian(-1).values
    return torch.where(out > 0, out, some).nan_to_num(0.0)


def rounding(dtype: torch.dtype) -> float:
    """What answers of this type may be off by, relative to their size, by rounding alone."""
    kind = dtype.to_real() if dtype.is_complex else dtype
    return 0.1 * torch.finfo(kind if kind.is_floating_point else torch.float64).eps ** 0.5
