"""What rules that change the rows before another rule share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.base.errors import UsageError
from shoal.parts.aggregate.base import (
    Settings,
    frozen,
    need_told,
    part_of,
    rule_named,
    same_for_all,
)
from shoal.tensor.stack import certain, usable
from shoal.tensor.types import Mask, Stack, Vector, Weight

_PIECE = 512
_SMALL, _LARGE = 1e-12, 1e12
"""Lengths between these lose no digits to squares outside the range of float32."""


class Before:
    """Changes the rows; the rule that `then` and `settings` name combines what came of them.

    A subclass is a frozen dataclass with these fields and a method `before`. An own vector is
    handed on unchanged.
    """

    byzantine: int
    then: str
    settings: Settings

    keeps_rows: ClassVar[bool] = True
    """Whether row i of what comes is row i of what goes in, so that its weight still belongs."""

    def __post_init__(self) -> None:
        need_told(self, self.byzantine)
        object.__setattr__(self, "settings", frozen(self.settings))
        _ = self.rule

    @property
    def rule(self) -> Any:
        """The rule that follows."""
        part = part_of(self)
        if self.then == part:
            raise UsageError(
                f"{part}: then={self.then!r} comes twice; need another rule, such as median"
            )
        return rule_named(self.then, self.settings, self.byzantine)

    @property
    def centered(self) -> bool:
        return self.rule.centered

    def before(self, x: Stack, mask: Mask) -> tuple[Stack, Mask]:
        """The changed rows, NaN where a row that was received is not finite, and which are there.

        What rows hold that are not there has no meaning.
        """
        raise NotImplementedError

    def __call__(
        self, x: Stack, *, mask: Mask, weight: Weight | None = None, center: Vector | None = None
    ) -> Vector:
        changed, some = self.before(x, mask)
        weight = weight if self.keeps_rows else None
        return self.rule(changed, mask=some, weight=weight, center=center)

    def everyone(self, x: Stack, mask: Mask) -> Stack:
        if not self.centered:
            return same_for_all(self, x, mask)
        changed, some = self.before(x, mask)
        seen = changed.unsqueeze(-3).expand(*x.shape[:-1], *changed.shape[-2:])
        return self.rule(seen, mask=some.unsqueeze(-2), center=x)

    def tolerates(self, rows: int) -> int:
        # Around an own vector that was not changed itself, the changed rows need not lie evenly.
        limit = 0 if self.centered else self.rule.tolerates(rows)
        return self.byzantine if self.byzantine <= min(limit, (rows - 1) // 2) else 0


def measured(x: Stack, mask: Mask) -> tuple[Stack, Mask, Tensor]:
    """(`usable` rows, which ones count, their lengths)."""
    if x.is_cpu and mask.dim() < x.dim() and certain(mask):
        length = _length(x)
        # A row with a number that is not finite has no such length: no other look is needed.
        if certain((length > _SMALL) & (length < _LARGE)):
            return x, mask.expand(x.shape[:-1]), length
    x, rows = usable(x, mask)
    return x, rows, lengths(x, rows)


def lengths(x: Stack, rows: Mask) -> Tensor:
    """Euclidean length of each row, float64 [..., k], NaN for rows that do not count."""
    length = _length(x)
    sound = (length > _SMALL) & (length < _LARGE)
    # Whether squares vanish or overflow somewhere needs a look, which on a device means a wait.
    if not (x.is_cpu and certain(sound | ~rows)):
        top = x.abs().amax(-1).to(torch.float64) if x.shape[-1] else length
        scale = torch.where(top > 0, top, 1.0)
        scaled = scale * _length(x / scale.to(x.dtype).unsqueeze(-1))
        length = torch.where(sound, length, scaled)
    return torch.where(rows, length, float("nan"))


def _length(x: Stack) -> Tensor:
    """Lengths in pieces, so that the sum of many squares keeps its digits; float64."""
    whole = x.shape[-1] // _PIECE * _PIECE
    pieces = x[..., :whole].unflatten(-1, (-1, _PIECE)) if whole else x[..., :0].unsqueeze(-2)
    found = torch.linalg.vector_norm(pieces, dim=-1).to(torch.float64)
    rest = torch.linalg.vector_norm(x[..., whole:], dim=-1, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.cat((found, rest.unsqueeze(-1)), -1), dim=-1)


def shortened(x: Stack, rows: Mask, length: Tensor, limit: Tensor) -> Stack:
    """Rows no longer than `limit` [...], NaN for those that do not count."""
    factor = (limit.unsqueeze(-1) / torch.where(length > 0, length, 1.0)).clamp(max=1)
    shorter = x * factor.to(x.dtype).unsqueeze(-1)
    if x.is_cpu and certain(rows):
        return shorter
    return torch.where(rows.unsqueeze(-1), shorter, float("nan"))
