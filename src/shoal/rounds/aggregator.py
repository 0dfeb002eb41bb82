"""How several vectors become one."""

from __future__ import annotations

from typing import Protocol

from shoal.tensor.types import Mask, Stack, Vector, Weight


class Aggregator(Protocol):
    """[..., k, dim] -> [..., dim]. Absent rows are masked, never zero-filled.

    mask: bool [..., k]; weight: [..., k] >= 0 or None (rules without weights ignore it);
    center: [..., dim], the receiver's own vector, for rules that start from it.
    Rows that are not finite count as absent or as worst, never as numbers. With no row present
    the result is `center`, or zeros when there is none.
    """

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector: ...

    # Optional: bind(spec) -> the rule for parameters of this layout (rules that look at layers).
    # Optional, for linear rules: mix(weight, x, center=None) with weight [receivers, senders]
    # (CSR or dense) and x [..., senders, dim] replaces the gather of [receivers, k, dim] by one
    # product; a receiver without a finite sender gets its center [..., receivers, dim], or zeros.
    # Optional: everyone(x [..., n, dim], mask [..., n]) -> [..., n, dim], all receivers of the
    # same rows at once: row i is self(x, mask=mask, center=x[..., i, :]) for each present i.
    # Optional: among(x [..., n, dim], heard [..., n, n]) -> [..., n, dim], all receivers of a dense
    # graph at once, each with the rows it has in hand: row i is self(x, mask=heard[..., i, :],
    # center=x[..., i, :]). Engines use it in place of gathering [n, n, dim].
