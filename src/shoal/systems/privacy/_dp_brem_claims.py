"""What is asked of DP-BREM's runs."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.lab.rows import Rows
from shoal.parts.privacy.momentum_accountant import momentum_epsilon, momentum_renyi
from shoal.systems.privacy._dp_brem_secure import compared

ATTACKS = ("ipm 1", "ipm 3", "alie", "flip", "min-max")
PRIVATE = ("fedsgd", "median", "ldp", "sign", "entries")
"""Private baselines."""
LOCAL = ("ldp", "sign")
"""Those in which nobody trusts the hub."""

FIGURES = {
    (2.0, 0.9): 3.77, (5.0, 0.9): 1.40, (1.0, 0.9): 8.32,
    (2.0, 0.0): 11.19, (5.0, 0.0): 3.91, (1.0, 0.0): 28.0,
}  # fmt: skip
"""(s, beta) -> epsilon of a second implementation, at p = 0.05, 200 rounds, delta = 1e-5 and whole
orders from 2 to 128; without what sampling gives more at beta = 0."""

SIZES = (68, 69)
"""Records of a client."""
P, ROUNDS, DELTA = 0.1, 150, 1e-4
NOISE = {
    (8, 0.9): 1.255, (4, 0.9): 2.292, (2, 0.9): 4.226, (8, 0.0): 1.096,
}  # fmt: skip
"""(epsilon, beta) -> s, the noise over what one of the fewest records moves."""


def accuracy(rows: Rows, arm: str, seed: int) -> float:
    return rows.value(arm, seed, "mean_model_accuracy")


def worst(rows: Rows, rule: str, seed: int) -> float:
    """Over the attacks by a quarter of the clients."""
    return min(accuracy(rows, f"{rule}, {attack}", seed) for attack in ATTACKS)


def _above(rows: Rows, others: Iterable[str]) -> dict[int, float]:
    names = tuple(others)
    return {
        s: worst(rows, "brem", s) - max(worst(rows, name, s) for name in names) for s in rows.seeds
    }


def above_fedsgd(rows: Rows) -> dict[int, float]:
    """Worst accuracy of DP-BREM minus that of DP-FedSGD."""
    return _above(rows, ("fedsgd",))


def above_private(rows: Rows) -> dict[int, float]:
    """Worst accuracy of DP-BREM minus the best worst accuracy of a private baseline."""
    return _above(rows, PRIVATE)


def above_local(rows: Rows) -> dict[int, float]:
    """The same against those with noise at the clients."""
    return _above(rows, LOCAL)


def above_local_clean(rows: Rows) -> dict[int, float]:
    """Without attackers, against the better of those with noise at the clients."""
    return {
        s: accuracy(rows, "brem", s) - max(accuracy(rows, name, s) for name in LOCAL)
        for s in rows.seeds
    }


def monotone(rows: Rows) -> dict[int, float]:
    """The smaller gain in accuracy from epsilon = 2 to 4 and from 4 to 8."""
    out = {}
    for s in rows.seeds:
        two, four, eight = (
            accuracy(rows, arm, s) for arm in ("brem, epsilon 2", "brem, epsilon 4", "brem")
        )
        out[s] = min(four - two, eight - four)
    return out


def off_figures(rows: Rows) -> dict[int, float]:
    """The largest relative difference of the accountant from the figures."""
    orders = [float(order) for order in range(2, 129)]
    gaps: list[float] = []
    for (s, beta), figure in FIGURES.items():
        spent = momentum_renyi(s, 0.05, 200, beta, orders)
        epsilon = min(e + 11.512925465 / (a - 1) for a, e in zip(orders, spent, strict=True))
        gaps.append(abs(epsilon / figure - 1))
    largest: float = max(gaps)
    return dict.fromkeys(rows.seeds, largest)


def secure_gap(rows: Rows) -> dict[int, float]:
    """Distance of DP-BREM+'s model from DP-BREM's over how far that moved."""
    return {s: compared(s).gap for s in rows.seeds}


def long_alone_rejected(rows: Rows) -> dict[int, float]:
    """1 where the client that sends 1% more than the clip is rejected, and only then and it."""
    return {s: float(compared(s).rejected == (2,) and compared(s).short == ()) for s in rows.seeds}


def spent_curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """epsilon at delta = 1e-4 over rounds, for clients with the fewest and the most records."""
    return {
        f"{name}, {size} records": [
            (rounds, momentum_epsilon(NOISE[8, beta] / SIZES[0] * size, P, rounds, beta, DELTA))
            for rounds in (10, 25, 50, 75, 100, 125, 150)
        ]
        for name, beta in (("DP-BREM", 0.9), ("DP-FedSGD", 0.0))
        for size in SIZES
    }
