"""Rules that choose rows, values or lengths, against their definitions in plain numpy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import UsageError
from shoal.parts.aggregate.arc import ARC
from shoal.parts.aggregate.bucketing import Bucketing
from shoal.parts.aggregate.bulyan import Bulyan
from shoal.parts.aggregate.caf import CAF
from shoal.parts.aggregate.clipping import Clipping
from shoal.parts.aggregate.fools_gold import FoolsGold
from shoal.parts.aggregate.mda import MDA
from shoal.parts.aggregate.meamed import Meamed
from shoal.parts.aggregate.mean import Mean
from shoal.parts.aggregate.phocas import Phocas
from shoal.parts.aggregate.smea import SMEA

RULES = {"meamed": Meamed, "phocas": Phocas, "mda": MDA, "smea": SMEA, "caf": CAF}


@st.composite
def stacks(draw, least: int = 5, most: int = 9):
    """(x, mask): rows that are absent or not finite among others, the first one present."""
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    count = draw(st.integers(least, most))
    x = random.normal(size=(count, draw(st.integers(1, 5)))) * draw(st.sampled_from([1e-3, 1.0]))
    mask = random.random(count) < draw(st.sampled_from([0.7, 1.0]))
    mask[0] = True
    if draw(st.booleans()) and count > 3:
        x[2, 0] = random.choice([np.nan, np.inf, -np.inf])
        mask[2] = True
    return x, mask


def run(rule, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return rule(torch.tensor(x), mask=torch.tensor(mask)).numpy()


def split(x: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Finite rows in hand, and how many rows are in hand."""
    return x[mask & np.isfinite(x).all(-1)], int(mask.sum())


def near(rows: np.ndarray, pivot: np.ndarray, keep: int) -> np.ndarray:
    out = []
    for values, point in zip(rows.T, pivot, strict=True):
        order = sorted(values, key=lambda v: (abs(v - point), v))
        out.append(np.mean(order[:keep]))
    return np.array(out)


def check(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(stacks(), st.integers(0, 3))
def test_means_around_the_median_and_the_trimmed_mean(case, byzantine: int) -> None:
    x, mask = case
    rows, received = split(x, mask)
    keep = max(1, received - byzantine)
    if keep > 1:  # One value of two equally far from their mean is a matter of rounding.
        check(run(Meamed(byzantine), x, mask), near(rows, np.median(rows, axis=0), keep))
    trim = min(byzantine, (len(rows) - 1) // 2)
    pivot = np.sort(rows, axis=0)[trim : len(rows) - trim].mean(0)
    if keep > 1:
        check(run(Phocas(byzantine), x, mask), near(rows, pivot, keep))


@settings(max_examples=30, deadline=None)
@given(stacks(least=7, most=11), st.integers(0, 2))
def test_bulyan(case, byzantine: int) -> None:
    x, mask = case
    rows, received = split(x, mask)
    left, picked = list(range(len(rows))), []
    for step in range(min(max(1, received - 2 * byzantine), len(rows))):
        neighbors = max(1, received - step - byzantine - 2)
        scores = []
        for i in left:
            apart = [((rows[i] - rows[j]) ** 2).sum() for j in left if j != i]
            scores.append((round(sum(sorted(apart)[:neighbors]), 12), sum(apart), i))
        best = min(scores)[2]
        left.remove(best)
        picked.append(best)
    chosen = rows[sorted(picked)]
    keep = max(1, received - 4 * byzantine)
    if keep > 1:
        check(run(Bulyan(byzantine), x, mask), near(chosen, np.median(chosen, axis=0), keep))


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(0, 3))
def test_the_best_set_is_the_best_of_all(case, byzantine: int) -> None:
    x, mask = case
    rows, received = split(x, mask)
    keep = min(len(rows), max(1, received - byzantine))

    def width(chosen: tuple[int, ...]) -> tuple[float, float]:
        apart = [((rows[i] - rows[j]) ** 2).sum() for i in chosen for j in chosen]
        return max(apart), sum(apart)

    def eigenvalue(chosen: tuple[int, ...]) -> float:
        part = rows[list(chosen)] - rows[list(chosen)].mean(0)
        return np.linalg.norm(part, 2)

    sets = list(combinations(range(len(rows)), keep))
    if keep > 1:
        check(run(MDA(byzantine), x, mask), rows[list(min(sets, key=width))].mean(0))
        check(run(SMEA(byzantine), x, mask), rows[list(min(sets, key=eigenvalue))].mean(0))


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(0, 2))
def test_filter_by_covariance(case, byzantine: int) -> None:
    x, mask = case
    rows, received = split(x, mask)
    if received <= 3 * byzantine:
        return  # Too few rows for the filter's promise: it stops at a weight of one.
    weight, best, least = np.ones(len(rows)), rows.mean(0), math.inf
    while True:
        mean = weight @ rows / weight.sum()
        apart = rows - mean
        sizes, axes = np.linalg.eigh((weight * apart.T) @ apart / weight.sum())
        if sizes[-1] < least:
            best, least = mean, sizes[-1]
        along = (apart @ axes[:, -1]) ** 2
        along[weight == 0] = 0
        weight = weight * (1 - along / along.max())
        if weight.sum() <= received - 2 * byzantine or (weight > 0).sum() < 2:
            break
    check(run(CAF(byzantine), x, mask), best)


def test_no_outlier_of_any_size_moves_the_filter() -> None:
    honest = np.random.default_rng(0).normal(size=(9, 4))
    for size in (1e3, 1e30, 1e200):
        x = np.concatenate((honest, size * np.ones((2, 4))))
        for rule in (CAF(2), SMEA(2), MDA(2)):
            moved = run(rule, x, np.ones(11, dtype=bool)) - honest.mean(0)
            assert np.abs(moved).max() < 1.0


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(0, 3))
def test_adaptive_clipping_cuts_the_longest_to_the_next(case, byzantine: int) -> None:
    x, mask = case
    rows, received = split(x, mask)
    cut = max(0, int(2 * byzantine * (received - byzantine) // received))
    cut = max(0, cut - (received - len(rows)))
    size = np.linalg.norm(rows, axis=1)
    limit = np.sort(size)[::-1][min(cut, len(rows) - 1)]
    clipped = rows * np.minimum(1, limit / size)[:, None]
    check(run(ARC(byzantine, then="mean"), x, mask), clipped.mean(0))


@settings(max_examples=20, deadline=None)
@given(stacks(), st.sampled_from([1e-4, 0.5, 2.0]))
def test_clipping_bounds_each_length(case, radius: float) -> None:
    x, mask = case
    rows, _ = split(x, mask)
    size = np.linalg.norm(rows, axis=1)
    check(run(Clipping(radius), x, mask), (rows * np.minimum(1, radius / size)[:, None]).mean(0))


@settings(max_examples=30, deadline=None)
@given(stacks(), st.sampled_from([0.5, 1.0]))
def test_fools_gold(case, confidence: float) -> None:
    x, mask = case
    rows, _ = split(x, mask)
    count = len(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = np.maximum(unit @ unit.T, 0) * (1 - np.eye(count))
    most = alike.max(1)
    pardoned = alike.copy()
    for i in range(count):
        for j in range(count):
            if most[i] < most[j]:
                pardoned[i, j] *= most[i] / most[j]
    score = 1 - np.minimum(pardoned.max(1), 1)
    score[score <= 1e-7] = 0
    score = score / score.max() if score.max() > 0 else score
    with np.errstate(divide="ignore"):
        spread = np.clip(confidence * (np.log(score) - np.log(1 - score) + 0.5), 0, 1)
    expected = spread @ rows / spread.sum() if spread.sum() > 0 else rows.mean(0)
    check(run(FoolsGold(confidence), x, mask), expected)


def test_any_number_of_alike_sybils_count_for_nothing() -> None:
    random = np.random.default_rng(1)
    axes = np.linalg.qr(random.normal(size=(8, 8)))[0]
    honest, goal = axes[:4], -50.0 * axes[4]
    x = np.concatenate((honest, goal + 1e-5 * random.normal(size=(20, 8))))
    moved = run(FoolsGold(), x, np.ones(24, dtype=bool))
    assert np.abs(moved - honest.mean(0)).max() < 1e-3
    assert np.linalg.norm(run(Mean(), x, np.ones(24, dtype=bool)) - honest.mean(0)) > 30


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(1, 4), st.integers(0, 5))
def test_buckets_hold_every_row_once(case, size: int, seed: int) -> None:
    x, mask = case
    rule = Bucketing(size, 0, then="mean", seed=seed)
    rows, _ = split(x, mask)
    tagged = np.where(np.isfinite(x), np.arange(len(x))[:, None].astype(float), x)
    means, some = rule.before(torch.tensor(tagged), torch.tensor(mask))
    full, rest = divmod(len(rows), size)
    assert int(some.sum()) == full + (rest > 0)
    held = [size] * full + [rest] * (rest > 0)
    here = np.flatnonzero(mask & np.isfinite(x).all(-1))
    total = sum(float(m) * n for m, n in zip(means[some][:, 0], held, strict=True))
    assert total == pytest.approx(here.sum())


def test_buckets_are_dealt_by_seed() -> None:
    x = torch.arange(12.0)[:, None]
    dealt = {
        tuple(Bucketing(3, seed=s).before(x, torch.ones(12).bool())[0].flatten().tolist())
        for s in range(5)
    }
    assert len(dealt) == 5


@pytest.mark.parametrize("name", RULES)
def test_counts_must_be_counts(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: byzantine=-1"):
        RULES[name](-1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Bulyan(1.5), "byzantine=1.5"),  # type: ignore[arg-type]
        (lambda: ARC(1, then="arc"), "comes twice"),
        (lambda: Clipping(0.0), "radius=0.0"),
        (lambda: Bucketing(0), "size=0"),
        (lambda: FoolsGold(confidence=0.0), "confidence=0.0"),
    ],
)
def test_bad_settings_say_what_to_do(make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_too_many_sets_are_refused() -> None:
    x = torch.zeros(60, 2)
    with pytest.raises(UsageError, match="sets to try"):
        MDA(8)(x, mask=torch.ones(60, dtype=torch.bool))
