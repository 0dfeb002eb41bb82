"""What aggregators may offer beyond the contract of `shoal.rounds.aggregator`, and what they share.

A rule in this folder is a frozen dataclass with

- `examples`: settings that the contract suite runs it with,
- `centered`: True when it starts from the receiver's own vector,
- `tolerates(rows)`: how many of `rows` received vectors, own included, may be arbitrary,
- `kappa(rows)`: what that tolerance is worth, see `Robust`,
- `breaks_at(rows)`: how many arbitrary vectors carry the result anywhere, see `Robust`,
- optionally `everyone(x, mask)`: all receivers at once, see `Everyone`; `among(x, heard)`: the
  same with rows in hand that differ by receiver, see `Among`; and `mix` (linear rules).

Most rules begin and end alike: `Plain` has that part of the contract, `Told` also the number of
arbitrary rows that a rule is told, `ByPlace` the calls of rules that sort each coordinate.

Non-finite rows: a rule that knows how many vectors are faulty counts them as the worst ones, so
that they use up that number; the others treat them as absent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts import find
from shoal.rounds.aggregator import Aggregator
from shoal.tensor.distances import inner_products
from shoal.tensor.stack import or_center, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight

_VAST = 1e300

Setting = int | float | str | bool | None
Settings = tuple[tuple[str, Setting], ...]
"""Keyword settings of another part in hashable form."""


class Robust(Aggregator, Protocol):
    """A rule that states when it breaks (Allouah et al. 2023, definition 2: (f, kappa)-robustness).

    For any `f = tolerates(rows)` rows, NaN and infinity included, and the mean and the variance
    (mean squared distance to that mean) of the other rows:
    `|result - mean|^2 <= kappa(rows) * variance`. A rule that starts from the receiver's own vector
    promises it when that vector is the center and one of the other rows. An infinite kappa promises
    nothing. With `breaks_at(rows)` rows an attack is known that carries the result to any distance;
    None: no number of rows does. Between the two nothing is proven either way; where they are
    neighbours the breakdown point is exact.
    """

    def tolerates(self, rows: int) -> int: ...

    def kappa(self, rows: int) -> float: ...

    def breaks_at(self, rows: int) -> int | None: ...


class Everyone(Aggregator, Protocol):
    """A rule that can serve all receivers of the same rows at once (complete graph).

    `everyone(x [..., n, dim], mask [..., n])[..., i, :]` is `rule(x, mask=mask, center=x[..., i])`
    for each present row i; other rows of the result have no meaning. The result may be an expanded
    view: clone it before writing to it.
    """

    def everyone(self, x: Stack, mask: Mask) -> Stack: ...


class Among(Aggregator, Protocol):
    """A rule that can serve all receivers of a dense graph at once, each with rows of its own.

    `among(x [..., n, dim], heard [..., n, n])[..., i, :]` is `rule(x, mask=heard[..., i, :],
    center=x[..., i, :])` for each receiver i that has its own row in hand; other rows of the result
    have no meaning. The order of rows may settle ties only as it does in the plain call with the
    own row put first.
    """

    def among(self, x: Stack, heard: Mask) -> Stack: ...


class Plain:
    """The part of the contract that rules without a center and without weights share."""

    centered: ClassVar[bool] = False

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        x, rows = usable(x, mask)
        if x.shape[-2]:
            value = self.combined(x, rows, mask.expand(rows.shape).sum(-1))
        else:
            value = x.sum(-2)
        return or_center(value, rows.any(-1), center)

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        """The rule itself. x: at least one row, and `rows`, as `usable` returns them; received:
        [...], rows in hand, those that are not finite included. Without rows: any finite vector."""
        raise NotImplementedError

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        return same_for_all(self, x, mask)


@dataclass(frozen=True)
class Told(Plain):
    """A rule that is told how many of the rows that it gets may be arbitrary."""

    byzantine: int = 1

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"byzantine": 2}, {"byzantine": 0})

    def __post_init__(self) -> None:
        need_told(self, self.byzantine)


class ByPlace(Plain):
    """A rule that takes each coordinate's values in ascending order."""

    def values(self, x: Stack, rows: Mask) -> Vector:
        """The rule itself; rows may have leading axes that x lacks. Zeros when no row counts."""
        raise NotImplementedError

    def combined(self, x: Stack, rows: Mask, received: Tensor) -> Vector:
        return self.values(x, rows)

    def among(self, x: Stack, heard: Mask) -> Stack:
        """All receivers, without a copy of the rows for each."""
        own = x
        x, good = usable(x)
        rows = heard.expand(*good.shape, good.shape[-1]) & good.unsqueeze(-2)
        return or_center(self.values(x.unsqueeze(-3), rows), rows.any(-1), own)


def same_for_all(rule: Aggregator, x: Stack, mask: Mask) -> Stack:
    """`everyone` of a rule without center: one result, seen by all receivers without a copy."""
    return rule(x, mask=mask).unsqueeze(-2).expand(x.shape)


def part_of(rule: object) -> str:
    """What a scenario calls the rule: the name of its module."""
    return type(rule).__module__.rpartition(".")[2]


def need_told(rule: object, byzantine: object) -> None:
    """Refuse a number of arbitrary rows that is no whole number."""
    need_count(part_of(rule), "byzantine", byzantine, 0, "how many peers may be faulty")


def need_count(part: str, name: str, value: object, least: int, repair: str) -> None:
    """Refuse a setting that is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{part}: {name}={value!r}; need a whole number >= {least} ({repair})")


def need_positive(part: str, name: str, value: object, repair: str) -> None:
    """Refuse a setting that is no finite number above zero."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise UsageError(f"{part}: {name}={value!r}; need a finite number > 0 ({repair})")


def frozen(settings: Mapping[str, Setting] | Settings) -> Settings:
    """Settings as sorted pairs; a mapping or pairs in any order (lists from JSON too)."""
    pairs = settings.items() if isinstance(settings, Mapping) else settings
    return tuple(sorted((str(name), value) for name, value in pairs))


def rule_named(name: str, settings: Settings, byzantine: int) -> Any:
    """The rule of that name; its `byzantine` or `trim` is `byzantine` unless the settings say.

    >>> rule_named("trimmed_mean", (), 2)
    TrimmedMean(trim=2)
    """
    kind = find("aggregate", name)
    known = {f.name for f in dataclasses.fields(kind)}
    given = dict(settings)
    for wrong in given.keys() - known:
        raise UsageError(
            f"aggregate: {name} has no setting {wrong!r}; it has {', '.join(sorted(known))}"
        )
    for count in ("byzantine", "trim"):
        if count in known:
            given.setdefault(count, byzantine)
    return kind(**given)


def bounded_products(x: Stack, rows: Mask) -> Tensor:
    """`inner_products` of the rows that count, zeros elsewhere, without infinities.

    A row too far for float64 becomes one that is far from everything, in a direction of its own.
    """
    inner = inner_products(x, rows)
    norm = inner.diagonal(dim1=-2, dim2=-1)
    near = rows & (norm < _VAST)
    both = near.unsqueeze(-1) & near.unsqueeze(-2)
    far = (rows & ~near).to(inner.dtype) * _VAST
    return torch.where(both, inner, torch.zeros_like(inner)) + torch.diag_embed(far)


def around_pivot(honest: int, kept: int, byzantine: int) -> float:
    """Kappa of averaging the `kept` rows nearest to an honest one, with `byzantine` others.

    Each arbitrary row that is kept pairs with an honest row that is not and lies no nearer to the
    pivot. So with m kept of h honest rows the result is within (2/m) sqrt(b * s) of the mean of m
    honest rows, s = sum of squares around the pivot <= h^2 variances; and such a mean is within
    sqrt((h - m) / m) standard deviations of the mean of all.
    """
    from_pairs = 2 * math.sqrt(min(byzantine, kept - 1)) * honest / kept
    from_subset = math.sqrt(max(0, honest - kept) / kept)
    return (from_pairs + from_subset) ** 2
