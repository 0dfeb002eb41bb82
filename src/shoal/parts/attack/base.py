"""What attacks share: clean data, honest statistics and the search for the worst strength.

An attack in this folder is a frozen dataclass with `knowledge`, `per_receiver` and `examples`:
settings that the contract suite runs it with. Keys have the leading axes of the view.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from shoal.base.errors import UsageError
from shoal.rounds.attack import View
from shoal.rounds.task import Shard, Task
from shoal.tensor.stack import masked_mean, usable
from shoal.tensor.types import Key, Mask, Scalar, Stack, Vector

FACTORS = ("fixed", "search")

# Coarse strengths, then ratios to the best one so far: with the fixed strength, eight evaluations.
_COARSE = (0.5, 2.0, 8.0)
_RATIOS = (2.0, 0.5, math.sqrt(2.0), math.sqrt(0.5))
EVALUATIONS = 1 + len(_COARSE) + len(_RATIOS)
"""How often a search asks the rule."""


def clean_data(self: object, task: Task, shard: Shard, key: Key) -> Shard:
    """The `poison` of an attack that leaves the peer's data alone."""
    return shard


def need_number(
    part: str, name: str, value: object, repair: str, least: float | None = None
) -> None:
    """Refuse a setting that is no finite number, or one below `least`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or (least is not None and value < least)
    ):
        rule = "a finite number" if least is None else f"a finite number >= {least:g}"
        raise UsageError(f"{part}: {name}={value!r}; need {rule} ({repair})")


def need_row(part: str, name: str, value: object) -> None:
    """Refuse a setting that is neither None nor a row number."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UsageError(
            f"{part}: {name}={value!r}; need a row among the honest peers, 0 or more, or None"
        )


def need_factor(part: str, value: object) -> None:
    """Refuse a way to choose the strength that does not exist."""
    if value not in FACTORS:
        raise UsageError(f"{part}: factor={value!r}; need one of {', '.join(FACTORS)}")


def honest_mean(view: View) -> tuple[Vector, Stack, Mask]:
    """Mean [..., dim] of the finite honest rows, those rows with zeros elsewhere, and which."""
    x, rows = usable(view.honest)
    return masked_mean(x, rows), x, rows


def repeated(vector: Vector, view: View) -> Stack:
    """The same vector from every Byzantine peer, [..., byzantine, dim]."""
    return vector.unsqueeze(-2).expand(view.own.shape).contiguous()


def strongest(part: str, view: View, mean: Vector, direction: Vector, fixed: Scalar) -> Stack:
    """`mean + t * direction` from everybody, with the t that harms the honest peers most.

    Harm is the mean distance from the honest mean to what honest peers hold afterwards, measured by
    `view.rule`. Tries t = fixed [...], a coarse grid, then ratios to the best; each leading index
    searches for itself. Selection rules make harm jump down where they begin to see through the
    attack, so the search assumes no shape and never returns less harm than `fixed` does.
    """
    if view.rule is None:
        raise UsageError(
            f"{part}: factor='search' asks the rule in force, and this view has none "
            "(run it on the lockstep engine, or use factor='fixed')"
        )
    rule: Callable[[Stack], Stack] = view.rule

    def candidate(strength: Scalar) -> Stack:
        return repeated(mean + strength.to(mean.dtype).unsqueeze(-1) * direction, view)

    def harm(strength: Scalar) -> Scalar:
        after = rule(candidate(strength))
        apart = torch.linalg.vector_norm(
            after - mean.unsqueeze(-2), dim=-1, dtype=torch.float64
        ).mean(-1)
        return apart.nan_to_num(nan=-1.0)

    best, most = fixed, harm(fixed)
    for coarse in _COARSE:
        best, most = _better(best, most, torch.full_like(fixed, coarse), harm)
    for ratio in _RATIOS:
        best, most = _better(best, most, best * ratio, harm)
    return candidate(best)


def _better(
    best: Scalar, most: Scalar, probe: Scalar, harm: Callable[[Scalar], Scalar]
) -> tuple[Scalar, Scalar]:
    found = harm(probe)
    better = found > most
    return torch.where(better, probe, best), torch.where(better, found, most)
