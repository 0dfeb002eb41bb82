"""Every rule against a plain reading of its definition, on many small cases of the nasty kind.

Ties, duplicates, zeros, rows far from the origin, rows near the largest number, one row, one
coordinate, as many liars told as there are rows; half precision; what absent rows hold. The plain
readings take the rows themselves, in extended precision, and no inner products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch

from shoal.parts import find
from shoal.tensor import stack

Array = np.ndarray
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """given: what the rule gets, garbage in absent rows included; rows: the finite ones in hand;
    received: how many are in hand; told: how many of them may lie."""

    family: str
    given: torch.Tensor
    mask: torch.Tensor
    rows: Array
    received: int
    told: int

    @property
    def own(self) -> Array:
        return self.rows[0]


def by_distance(rows: Array, point: Array) -> Array:
    return np.argsort(((rows - point) ** 2).sum(-1), kind="stable")


def apart(rows: Array) -> Array:
    return ((rows[:, None] - rows) ** 2).sum(-1)


def near(values: Array, point: float, keep: int) -> list[float]:
    """Means of the `keep` values nearest to a point; several where rounding may settle a tie."""
    far, keep = np.abs(values - point), min(keep, len(values))
    edge = np.sort(far)[keep - 1]
    room = 1e-6 * (edge + abs(point)) if np.isfinite(edge) else 0.0
    sure = values[far < edge - room]
    tied = np.sort(values[np.abs(far - edge) <= room])
    missing = keep - len(sure)
    return [float(np.mean([*sure, *some])) for some in {*combinations(tied, missing)}]


def any_near(rows: Array, pivot: Array, keep: int) -> list[list[float]]:
    return [near(values, point, keep) for values, point in zip(rows.T, pivot, strict=True)]


def trimmed(rows: Array, trim: int) -> Array:
    trim = min(trim, (len(rows) - 1) // 2)
    return np.sort(rows, axis=0)[trim : len(rows) - trim].mean(0)


def krum_scores(rows: Array, received: int, told: int) -> Array:
    square = apart(rows)
    others = [np.sort(np.delete(line, i)) for i, line in enumerate(square)]
    return np.array([line[: max(1, received - told - 2)].sum() for line in others])


def nearest_means(case: Case) -> Array:
    means = []
    for i, row in enumerate(case.rows):
        order = [i, *(j for j in by_distance(case.rows, row) if j != i)]
        means.append(case.rows[order[: max(1, case.received - case.told)]].mean(0))
    return np.array(means)


def bulyan(case: Case) -> list[list[float]]:
    left, picked = list(range(len(case.rows))), []
    square = apart(case.rows)
    for step in range(min(max(1, case.received - 2 * case.told), len(case.rows))):
        scores = krum_scores(case.rows[left], case.received - step, case.told)
        worth = [(s, square[i, left].sum(), i) for s, i in zip(scores, left, strict=True)]
        best = min(worth)[2]
        left.remove(best)
        picked.append(best)
    chosen = case.rows[sorted(picked)]
    return any_near(chosen, np.median(chosen, axis=0), max(1, case.received - 4 * case.told))


def shortened(rows: Array, limit: float) -> Array:
    size = np.sqrt((rows**2).sum(-1))
    return rows * np.minimum(1, limit / np.where(size > 0, size, 1))[:, None]


def adaptively(case: Case) -> Array:
    cut = max(0, 2 * case.told * (case.received - case.told)) // case.received
    cut = min(max(0, cut - (case.received - len(case.rows))), len(case.rows) - 1)
    limit = np.sort(np.sqrt((case.rows**2).sum(-1)))[::-1][cut]
    return shortened(case.rows, limit)


def clipped_around(case: Case) -> Array:
    point = case.own
    for _ in range(2):
        point = point + shortened(case.rows - point, 1.0).mean(0)
    return point


def geometric_median(case: Case) -> Array:
    point = np.median(case.rows, axis=0)
    for _ in range(8):
        pull = 1 / np.maximum(np.sqrt(((case.rows - point) ** 2).sum(-1)), 1e-6)
        point = pull @ case.rows / pull.sum()
    return point


def sets(case: Case, worth: Callable[[Array], float]) -> list[Array]:
    """Means of all sets that are best but for rounding."""
    keep = min(len(case.rows), max(1, case.received - case.told))
    found = [(worth(case.rows[list(s)]), s) for s in combinations(range(len(case.rows)), keep)]
    least = min(found)[0]
    room = 1e-6 * least + 1e-9 * np.abs(case.rows).min() ** 2
    return [case.rows[list(s)].mean(0) for value, s in found if value <= least + room]


def width(rows: Array) -> float:
    return float(apart(rows).max())


def eigenvalue(rows: Array) -> float:
    return float(np.linalg.norm((rows - rows.mean(0)).astype(float), 2) ** 2)


def krum(case: Case) -> Array:
    return case.rows[krum_scores(case.rows, case.received, case.told).argmin()]


def multi_krum(case: Case) -> Array:
    order = np.argsort(krum_scores(case.rows, case.received, case.told), kind="stable")
    return case.rows[order[: max(1, case.received - case.told - 2)]].mean(0)


def phocas(case: Case) -> list[list[float]]:
    pivot = trimmed(case.rows, case.told)
    return any_near(case.rows, pivot, max(1, case.received - case.told))


def meamed(case: Case) -> list[list[float]]:
    pivot = np.median(case.rows, axis=0)
    return any_near(case.rows, pivot, max(1, case.received - case.told))


def nna(case: Case) -> Array:
    order = by_distance(case.rows, case.own)
    return case.rows[order[: max(1, case.received - case.told)]].mean(0)


Rule = tuple[Callable[[int], object], Callable[[Case], object]]
"""(the rule told of so many liars, its definition)."""


def told(name: str, **settings: object) -> Callable[[int], object]:
    return lambda count: find("aggregate", name)(count, **settings)


def plain(name: str, *settings: object) -> Callable[[int], object]:
    return lambda _: find("aggregate", name)(*settings)


RULES: dict[str, Rule] = {
    "mean": (plain("mean"), lambda case: case.rows.mean(0)),
    "median": (plain("median"), lambda case: np.median(case.rows, axis=0)),
    "trimmed_mean": (told("trimmed_mean"), lambda case: trimmed(case.rows, case.told)),
    "krum": (told("krum"), krum),
    "multi_krum": (told("multi_krum"), multi_krum),
    "nna": (told("nna"), nna),
    "nnm": (told("nnm", then="median"), lambda case: np.median(nearest_means(case), axis=0)),
    "meamed": (told("meamed"), meamed),
    "phocas": (told("phocas"), phocas),
    "bulyan": (told("bulyan"), bulyan),
    "mda": (told("mda"), lambda case: sets(case, width)),
    "smea": (told("smea"), lambda case: sets(case, eigenvalue)),
    "centered_clipping": (plain("centered_clipping", 1.0, 2), clipped_around),
    "arc": (told("arc", then="mean"), lambda case: adaptively(case).mean(0)),
    "clipping": (plain("clipping", 1.5), lambda case: shortened(case.rows, 1.5).mean(0)),
    "geometric_median": (plain("geometric_median"), geometric_median),
}

FAMILIES = (
    "normal", "far", "lattice", "far lattice", "duplicates", "zeros", "equal", "huge", "nonfinite",
)  # fmt: skip
WITH_LIARS = ("huge", "nonfinite")


def cases(seed: int, dtype: torch.dtype, each: int) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    # In float64 the largest number whose square is one: beyond it rows are infinitely far.
    top = min(float(torch.finfo(dtype).max), 1e150)
    for family in FAMILIES * each:
        count, dim = int(random.integers(1, 10)), int(random.choice([1, 2, 5]))
        x = random.normal(size=(count, dim))
        if "lattice" in family:
            x = random.integers(-2, 3, size=(count, dim)).astype(float)
        if "far" in family:
            x += 1e4 if dtype != torch.float16 else 1000.0
        if family == "duplicates":
            x = x[random.integers(0, max(1, count // 2), size=count)]
        if family == "zeros":
            x[random.random(count) < 0.6] = 0
        if family == "equal":
            x[:] = x[0]
        if family in WITH_LIARS:
            # Fewer than half, and a first row of the honest kind: it is the own one.
            for i in random.permutation(np.arange(1, count))[: (count - 1) // 2]:
                size = random.choice([top, top**0.5, top**0.25])
                x[i] = size * random.choice([1, -1], size=dim)
                if family == "nonfinite" and random.random() < 0.5:
                    x[i, random.integers(dim)] = random.choice([np.nan, np.inf, -np.inf])
        mask = random.random(count) < random.choice([0.6, 1.0])
        if family in WITH_LIARS:
            mask[:] = True
        mask[0] = True
        given = torch.tensor(x).to(dtype)
        exact = given.double().numpy()
        for i in np.flatnonzero(~mask):
            given[i] = float(random.choice([np.nan, np.inf, torch.finfo(dtype).max]))
        rows = exact[mask & np.isfinite(exact).all(-1)].astype(np.longdouble)
        told = int(random.integers(0, 5))
        if family in WITH_LIARS:
            told = (count - 1) // 2
        yield Case(family, given, torch.tensor(mask), rows, int(mask.sum()), told)


def is_one_of(found: Array, wanted: object, tolerance: float) -> bool:
    if isinstance(wanted, Array):
        return bool((np.abs(found - wanted) <= tolerance).all())
    assert isinstance(wanted, list)
    if isinstance(wanted[0], Array):
        return any(is_one_of(found, each, tolerance) for each in wanted)
    # Coordinates have choices of their own.
    pairs = zip(found, wanted, strict=True)
    return all(min(abs(value - each) for each in some) <= tolerance for value, some in pairs)


def largest(wanted: object) -> float:
    if isinstance(wanted, list):
        return max(map(largest, wanted))
    return float(np.abs(wanted).max())


@pytest.mark.parametrize(
    ("dtype", "least"), [*((dtype, 1 << 60) for dtype in TYPES), *((each, 0) for each in TYPES[:2])]
)
@pytest.mark.parametrize("name", RULES)
def test_rules_do_what_their_definitions_say(
    name: str, dtype: torch.dtype, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch, and by compiled loops where there are such."""
    monkeypatch.setattr(stack, "_LEAST", least)
    rule, definition = RULES[name]
    for case in cases(sum(map(ord, name)), dtype, 2):
        if name == "bulyan" and case.family in WITH_LIARS and case.received < 4 * case.told + 3:
            continue  # Promises nothing, and a liar's row fills the sum that settles ties.
        wanted = definition(case)
        found = rule(case.told)(case.given, mask=case.mask, center=case.given[0])  # type: ignore[operator]
        assert found.dtype == dtype
        # Rounding is relative to what is added up.
        added = {"arc": adaptively(case), "mean": case.rows}.get(name, case.own)
        size = max(1.0, largest(wanted), largest(added))
        tolerance = size * (1e-8 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps)
        assert is_one_of(found.double().numpy(), wanted, tolerance), (case, found, wanted)
