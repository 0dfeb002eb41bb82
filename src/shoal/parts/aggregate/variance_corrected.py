"""A mean whose tensors keep the variance of what they were made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate.mean import Mean
from shoal.tensor.flat import FlatSpec
from shoal.tensor.stack import certain, combine, finite_rows, or_center, shares, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight

Mix = Callable[[Weight, Stack, Stack | None], Stack]
Target = Literal["conservative", "self", "others"]

_LEAST = 1e-30
"""A variance below this is none: of zeros after averaging, or of a tensor with equal entries."""


@dataclass(frozen=True)
class VarianceCorrected:
    """The weighted mean, each named tensor of it rescaled around its own mean to a target variance.

    The mean of n models that know nothing of each other has an nth of their variance, which a
    network of L layers turns into a signal n^(-L/2) as large: it learns nothing. With models that
    agree the correction is the identity. The variance is over a tensor's entries (unbiased).
    target: "conservative" the weighted mean of the rows' variances, "self" the center's, "others"
    the weighted mean of those of all rows that are not the center. Tensors of one entry, and
    tensors without variance (biases at zero), are left as averaged. x: [..., k, dim], of the layout
    that `bind` was given.
    Breaks with tensors whose variance differs for good reason among peers: it is forced on them.
    Source: Vanishing Variance Problem in Fully Decentralized Neural-Network Systems 2024, section 4
    (arXiv 2404.04616).

    >>> rule = VarianceCorrected().bind(FlatSpec(("w",), ((4,),)))
    >>> x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    >>> rule(x, mask=torch.ones(2, dtype=torch.bool)).mul(1000).round().tolist()
    [1414.0, 0.0, 0.0, -1414.0]
    """

    target: Target = "conservative"
    layout: FlatSpec | None = field(default=None, repr=False)

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"target": "self"}, {"target": "others"})
    centered: ClassVar[bool] = False
    translation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.target not in ("conservative", "self", "others"):
            raise UsageError(
                f"VarianceCorrected: target={self.target!r}; need 'conservative', 'self' or "
                "'others'"
            )

    def bind(self, spec: FlatSpec) -> Self:
        """The rule for parameters of this layout."""
        return replace(self, layout=spec)

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        if self.layout is None:
            raise UsageError(
                "VarianceCorrected: where tensors begin and end is not known (bind it first)"
            )
        if x.shape[-1] != self.layout.dim:
            raise UsageError(
                f"VarianceCorrected: vectors of {x.shape[-1]} numbers for a layout of "
                f"{self.layout.dim}"
            )
        rows = finite_rows(x) & mask
        if not (x.is_cpu and certain(rows)):
            x, rows = usable(x, mask)
        if not x.shape[-2]:
            return or_center(x.sum(-2), rows.any(-1), center)
        share = shares(rows, weight)
        mean = combine(share, x)
        value = self._rescaled(mean, self._goal(x, share, center))
        return or_center(value, share.sum(-1) > 0, center)

    @property
    def mix(self) -> Mix | None:
        """All receivers at once, as of `Mean.mix`; None for "others", whose weights it cannot tell.

        Variances are taken once of every sender, and mixed like what they are of.
        """
        return None if self.target == "others" else self._mixed

    def _mixed(self, weight: Weight, x: Stack, center: Stack | None = None) -> Stack:
        mean = Mean().mix(weight, x, center)
        if self.target == "self" and center is not None:
            goal = self._variance(center)
        else:
            found = self._variance(x)
            own = found if center is x else None if center is None else self._variance(center)
            goal = Mean().mix(weight, found, own)
        return self._rescaled(mean, goal)

    def tolerates(self, rows: int) -> int:
        return 0

    def kappa(self, rows: int) -> float:
        """Infinite: a variance that is corrected is no mean even of rows that are all honest."""
        return float("inf")

    def breaks_at(self, rows: int) -> int:
        return 1

    def _variance(self, x: Tensor) -> Tensor:
        """Of each named tensor: [..., dim] -> float64 [..., tensors]."""
        assert self.layout is not None
        pieces = x.split(list(self.layout.sizes), -1)
        zero = x.new_zeros(x.shape[:-1])
        found = [variance(piece) if piece.shape[-1] > 1 else zero for piece in pieces]
        return torch.stack(found, -1).to(torch.float64)

    def _goal(self, x: Stack, share: Tensor, center: Vector | None) -> Tensor:
        """The variance that each tensor is to have: [..., tensors]."""
        if self.target == "self" and center is not None:
            return self._variance(center)
        if self.target == "others" and center is not None:
            other = (x != center.unsqueeze(-2)).any(-1)
            left = torch.where(other, share, 0.0)
            total = left.sum(-1, keepdim=True)
            share = torch.where(total > 0, left / torch.where(total > 0, total, 1.0), share)
        return (share.unsqueeze(-1) * self._variance(x)).sum(-2)

    def _rescaled(self, mean: Vector, goal: Tensor) -> Vector:
        """The mean, in its own memory, with these variances."""
        assert self.layout is not None
        sizes = self.layout.sizes
        pieces = mean.split(list(sizes), -1)
        # Tensors of one number have no variance and stay what they are.
        places = [place for place, size in enumerate(sizes) if size > 1]
        if not places:
            return mean
        found, middles, aparts = zip(*[_apart(pieces[place]) for place in places], strict=True)
        # All tensors at once: operations on a number for each row cost as much as those on rows.
        has = torch.stack(found, -1).to(torch.float64)
        # Not by a list of places, which a device would have to wait for.
        to = torch.stack([goal[..., place] for place in places], -1)
        fit = (has > _LEAST) & (to > _LEAST)
        scale = torch.where(fit, (to / torch.where(fit, has, 1.0)).sqrt(), 1.0).to(mean.dtype)
        every = mean.is_cpu and bool(fit.all())
        for at, (place, middle, apart) in enumerate(zip(places, middles, aparts, strict=True)):
            factor = scale[..., at, None]
            if every:
                torch.addcmul(middle, apart, factor, out=pieces[place])
            else:
                scaled = torch.addcmul(middle, apart, factor)
                pieces[place].copy_(torch.where(fit[..., at, None], scaled, pieces[place]))
        return mean


def _apart(piece: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(variance [...], mean [..., 1], what is left of the piece without it [..., n])."""
    middle = piece.mean(-1, keepdim=True)
    apart = piece - middle
    squares = torch.linalg.vector_norm(apart, dim=-1).square()
    return squares / (piece.shape[-1] - 1), middle, apart


def variance(piece: Tensor) -> Tensor:
    """Unbiased, of the last axis: [..., n] -> [...], n at least 2.

    `Tensor.var` takes several times as long on rows that lie apart.

    >>> round(variance(torch.tensor([1.0, 2.0, 3.0])).item(), 6)
    1.0
    """
    return _apart(piece)[0]


def variance_corrected_average(
    models: Sequence[Mapping[str, Tensor]], self_model: Mapping[str, Tensor] | None = None,
    self_weight: float = 0.5, target: Target = "conservative",
) -> dict[str, Tensor]:  # fmt: skip
    """`self_weight` of one's own model and the mean of others', with corrected variances.

    models: state dicts of floating-point tensors with equal names and shapes. Without `self_model`
    the models count the same. ValueError names the key that is missing, of another shape or not
    finite.

    >>> w = {"w": torch.tensor([1.0, -1.0])}
    >>> variance_corrected_average([w, w], w)["w"].tolist()
    [1.0, -1.0]
    """
    if not models:
        raise ValueError("variance_corrected_average: no models (give at least one)")
    if not 0.0 <= self_weight <= 1.0:
        raise ValueError(f"variance_corrected_average: self_weight={self_weight}; need 0 to 1")
    every = list(models) if self_model is None else [self_model, *models]
    first = every[0]
    for model in every:
        for name in {*first, *model}:
            if name not in model or name not in first:
                raise ValueError(f"variance_corrected_average: {name!r} is not in every model")
            if model[name].shape != first[name].shape:
                raise ValueError(
                    f"variance_corrected_average: {name!r} has shapes {tuple(first[name].shape)} "
                    f"and {tuple(model[name].shape)}"
                )
            if not bool(model[name].isfinite().all()):
                raise ValueError(f"variance_corrected_average: {name!r} is not finite")
    spec = FlatSpec(tuple(first), tuple(tuple(value.shape) for value in first.values()))
    x = torch.stack([spec.flatten(model) for model in every])
    weight = torch.ones(len(every), dtype=torch.float64, device=x.device)
    if self_model is not None:
        weight[1:] = (1.0 - self_weight) / len(models)
        weight[0] = self_weight
    rule = VarianceCorrected(target).bind(spec)
    own = None if self_model is None else x[0]
    merged = rule(x, mask=torch.ones_like(weight, dtype=torch.bool), weight=weight, center=own)
    return spec.views(merged)
