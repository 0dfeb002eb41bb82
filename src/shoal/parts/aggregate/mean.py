"""The mean: no defence at all, and the one rule that is linear."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.parts.aggregate.base import same_for_all
from shoal.tensor.stack import certain, combine, or_center, shares, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight

COLUMN_BYTES = 2 << 20
"""What senders' columns may take to be mixed together; a constant."""

LEAST_COLUMNS = 256


@dataclass(frozen=True)
class Mean:
    """Mean of the rows received, weighted by what each sender counts.

    x: [..., k, dim]. Without weights, or with `weighted=False`, every row counts the same. Rows
    that weigh nothing are absent; one arbitrary row moves the result anywhere.
    Source: McMahan et al. 2017, algorithm 1 (FedAvg).

    >>> x = torch.tensor([[1.0], [2.0], [6.0]])
    >>> Mean()(x, mask=torch.ones(3, dtype=torch.bool), weight=torch.tensor([1.0, 1.0, 2.0]))
    tensor([3.7500])
    """

    weighted: bool = True

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"weighted": False})
    centered: ClassVar[bool] = False

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        weight = weight if self.weighted else None
        if x.is_cpu:
            share = shares(mask, weight)
            value = combine(share, x)
            if certain(torch.isfinite(value.sum(-1))):
                return or_center(value, share.sum(-1) > 0, center)
        # Some row may not be finite: it would spoil the result whether it weighs anything or not.
        x, rows = usable(x, mask)
        share = shares(rows, weight)
        return or_center(combine(share, x), share.sum(-1) > 0, center)

    def mix(self, weight: Weight, x: Stack, center: Stack | None = None) -> Stack:
        """All receivers at once: weight [receivers, senders] (dense or CSR) times x.

        x: [..., senders, dim] -> [..., receivers, dim]. Rows of the weights need not sum to 1. A
        row of x that is not finite is absent for everybody; a receiver that is left without any
        sender gets its center [..., receivers, dim], or zeros. Equals gathering and calling the
        rule, without [receivers, k, dim].
        """
        if not self.weighted:
            weight = _ones_like(weight)
        # A row that is not finite spoils every number it enters, whatever it weighs. So one look at
        # the sums of the result tells that none did, and spares a copy of everything. On a device
        # the copy costs less than the wait for that look.
        total = _product(weight, weight.new_ones((x.shape[-2], 1), layout=torch.strided))
        if x.is_cpu and certain(total > 0):
            mixed = _product(weight.to(x.dtype), x)
            if certain(torch.isfinite(mixed.sum(-1))):
                return mixed.div_(total.to(x.dtype))
        x, rows = usable(x)
        # Totals in the weights' own precision: rounded first, they would bend every coordinate.
        total = _product(weight, rows.to(weight.dtype).unsqueeze(-1))
        some = total > 0
        scale = torch.where(some, total, torch.ones_like(total)).to(x.dtype)
        return or_center(_product(weight.to(x.dtype), x) / scale, some.squeeze(-1), center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)

    def tolerates(self, rows: int) -> int:
        return 0

    def kappa(self, rows: int) -> float:
        return 0.0

    def breaks_at(self, rows: int) -> int:
        return 1


def _product(weight: Tensor, x: Tensor) -> Tensor:
    if weight.layout == torch.strided:
        return weight @ x
    if x.dim() == 2:
        return _in_columns(weight, x)
    # A sparse matrix multiplies two axes only: leading axes of x go beside its last one.
    lead = x.shape[:-2]
    wide = x.movedim(-2, 0).reshape(x.shape[-2], -1)
    return (weight @ wide).reshape(weight.shape[0], *lead, x.shape[-1]).movedim(0, -2)


def _in_columns(weight: Tensor, x: Tensor) -> Tensor:
    """A sparse matrix times x [senders, dim], some columns at a time.

    Receivers read senders in any order, so what they read should be in the processor's cache.
    """
    width = COLUMN_BYTES // (x.shape[0] * x.element_size())
    if not LEAST_COLUMNS <= width < x.shape[1]:
        # Of too many senders only strips would fit, which cost more to cut out than they save.
        return weight @ x
    mixed = x.new_empty((weight.shape[0], x.shape[1]))
    for start in range(0, x.shape[1], width):
        part = slice(start, start + width)
        torch.mm(weight, x[:, part], out=mixed[:, part])
    return mixed


def _ones_like(weight: Tensor) -> Tensor:
    if weight.layout == torch.strided:
        return (weight > 0).to(weight.dtype)
    with warnings.catch_warnings():
        # torch announces once per process that CSR is in beta.
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            weight.crow_indices(),
            weight.col_indices(),
            (weight.values() > 0).to(weight.dtype),
            weight.shape,
            device=weight.device,
        )
