"""What every aggregator states about arbitrary rows: how many it stands, and how many break it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts import find, names
from shoal.parts.aggregate.centered_clipping import CenteredClipping
from shoal.parts.aggregate.clipping import Clipping
from shoal.parts.aggregate.krum import Krum
from shoal.parts.aggregate.mean import Mean
from shoal.parts.aggregate.median import Median
from shoal.parts.aggregate.trimmed_mean import TrimmedMean
from shoal.testing import aggregate

EXAMPLES = [(name, s) for name in names("aggregate") for s in find("aggregate", name).examples]
EXACT = {
    "mean", "variance_corrected", "fools_gold", "median", "trimmed_mean", "meamed", "phocas",
    "geometric_median", "mda", "smea", "nna", "nnm",
}  # fmt: skip
"""Rules that break with one more row than they are proven to stand, whatever they are told."""


@pytest.mark.parametrize(("name", "settings"), EXAMPLES)
def test_every_rule_states_when_it_breaks(name: str, settings: dict) -> None:
    rule = find("aggregate", name)(**settings)
    for rows in range(1, 30):
        stands, breaks = rule.tolerates(rows), rule.breaks_at(rows)
        assert 0 <= stands < rows
        assert breaks is None or stands < breaks, (rows, stands, breaks)
        assert rule.kappa(rows) >= 0
    told = settings.get("byzantine", settings.get("trim", 0))
    # Centred rules and rules before one that never break are told apart by None.
    if name in EXACT and rule.breaks_at(25) is not None:
        assert rule.breaks_at(25) == rule.tolerates(25) + 1
        assert rule.tolerates(25) >= told


@pytest.mark.parametrize("rows", [8, 15])
@pytest.mark.parametrize(("name", "settings"), EXAMPLES)
def test_stands_as_many_as_it_says_and_breaks_with_as_many_as_it_says(
    name: str, settings: dict, rows: int
) -> None:
    rule = find("aggregate", name)(**settings)
    if hasattr(rule, "bind"):
        return  # As at 11 rows, where the whole contract is checked.
    key = aggregate.keyed.key_of(rows, name)
    aggregate._check_breakdown(rule, rows, 4, 6, key)
    aggregate._check_breaks(rule, rows, 4, 6, key)


@st.composite
def attacked(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows with liars at drawn places, which are honest, how many are not)."""
    count = draw(st.integers(3, 12))
    bad = draw(st.integers(0, (count - 1) // 2))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    honest = random.normal(size=(count, 3)) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    honest += draw(st.sampled_from([0.0, 1e4]))
    liars = random.permutation(count)[:bad]
    shapes = ("huge", "nan", "inf", "together", "beside", "mixed")
    for place, liar in enumerate(liars):
        shape = draw(st.sampled_from(shapes))
        honest[liar] = {
            "huge": 1e30 * random.normal(size=3),
            "nan": np.full(3, np.nan),
            "inf": np.array([np.inf, -np.inf, 0.0]),
            "together": np.full(3, 1e9),
            "beside": honest[liar] * 1.5,
            "mixed": np.array([np.nan, 1e30, 0.0]) if place % 2 else np.full(3, -1e9),
        }[shape]
    where = np.ones(count, dtype=bool)
    where[liars] = False
    return honest, where, bad


@settings(max_examples=60, deadline=None)
@given(attacked())
def test_rules_by_coordinate_stay_between_honest_values(case) -> None:
    x, honest, bad = case
    here = torch.ones(len(x), dtype=torch.bool)
    low, high = x[honest].min(0), x[honest].max(0)
    room = 1e-9 * (1 + np.abs(x[honest]).max())
    for rule in (Median(), TrimmedMean(bad)):
        assert rule.tolerates(len(x)) >= bad
        out = rule(torch.tensor(x), mask=here).numpy()
        assert ((out >= low - room) & (out <= high + room)).all(), rule
    # A mean of values no farther from such a point than honest ones are.
    wide = high - low + room
    for name in ("meamed", "phocas"):
        out = find("aggregate", name)(bad)(torch.tensor(x), mask=here).numpy()
        assert ((out >= low - wide) & (out <= high + wide)).all(), name


@settings(max_examples=60, deadline=None)
@given(attacked())
def test_krum_gives_a_row_that_someone_sent_near_the_honest_ones(case) -> None:
    x, honest, bad = case
    if len(x) < 2 * bad + 3:
        return
    out = Krum(bad)(torch.tensor(x), mask=torch.ones(len(x), dtype=torch.bool)).numpy()
    assert any(np.array_equal(out, row) for row in x)
    good = x[honest]
    wide = np.linalg.norm(good[:, None] - good, axis=-1).max()
    near = np.linalg.norm(good - out, axis=-1).min()
    assert near <= wide * np.sqrt(len(x)) + 1e-6


@pytest.mark.parametrize("far", [1e3, 1e9, 1e18])
def test_clipping_bounds_what_all_the_others_together_can_do(far: float) -> None:
    x = torch.full((9, 4), far, dtype=torch.float64)
    x[0] = 0.1
    here = torch.ones(9, dtype=torch.bool)
    moved = CenteredClipping(0.5, iterations=3)(x, mask=here, center=x[0]) - x[0]
    assert float(moved.norm()) <= 3 * 0.5
    assert float(Clipping(2.0)(x, mask=here).norm()) <= 2.0 + 1e-9


@dataclass(frozen=True)
class _Claims(Median):
    """A median that says something else about itself."""

    breaks: int | None = None

    def breaks_at(self, rows: int) -> int | None:  # type: ignore[override]
        return self.breaks


@dataclass(frozen=True)
class _Unbroken(Mean):
    def breaks_at(self, rows: int) -> int | None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (_Claims(5), r"breaks_at\(11\) = 5"),  # it stands 5
        (_Unbroken(), "breaks_at is None"),
        (_Claims(None), "breaks_at is None"),
    ],
)
def test_false_claims_are_found(rule: object, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        aggregate.check_aggregator(rule)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Timid(TrimmedMean):
    """Stands less than it does, so that what it is said to break at does not break it."""

    def tolerates(self, rows: int) -> int:
        return 0

    def kappa(self, rows: int) -> float:
        return float("inf")

    def breaks_at(self, rows: int) -> int:
        return 1


def test_a_claim_to_break_too_soon_is_found() -> None:
    with pytest.raises(AssertionError, match="none of the known attacks"):
        aggregate.check_aggregator(_Timid(2))


@pytest.mark.parametrize("name", names("aggregate"))
def test_every_rule_that_is_told_a_number_refuses_what_is_none(name: str) -> None:
    kind = find("aggregate", name)
    word = next((f.name for f in fields(kind) if f.name in ("byzantine", "trim")), None)
    for wrong in (-1, 1.5, True) if word else ():
        with pytest.raises(UsageError, match=f"{name}: {word}={wrong}; need a whole number >= 0"):
            kind(**{word: wrong})
