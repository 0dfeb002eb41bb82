"""What is computed of the mechanisms' laws, without training."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from shoal.lab.rows import Rows
from shoal.parts.privacy.accountant import Accountant
from shoal.parts.transform.pbm import Pbm
from shoal.parts.transform.rqm import Rqm

MATCHED: dict[str, Rqm | Pbm] = {"rqm": Rqm(), "pbm": Pbm()}
"""The paper's settings: 16 levels, clip 1.5, variances that are alike."""

ORDERS = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
COHORTS = (1, 10, 40)

# Figures of a second, independent implementation.
VARIANCES = {"rqm": (0.548, 0.485), "pbm": (0.600, 0.450)}
"""At an entry of 0 and at one of clip."""
LOCAL = {
    "rqm": {1.0: 4.57, 2.0: 5.06, 8.0: 5.32, math.inf: 5.47},
    "pbm": {1.0: 8.24, 2.0: 12.71, 8.0: 15.86, math.inf: 16.48},
}
SUMS = {
    ("rqm", 10): {2.0: 1.847, 8.0: 3.752, 32.0: 4.621},
    ("pbm", 10): {2.0: 2.280, 8.0: 10.435, 32.0: 15.087},
    ("rqm", 40): {2.0: 0.486, 8.0: 1.824, 32.0: 3.675},
    ("pbm", 40): {2.0: 0.518, 8.0: 2.421, 32.0: 10.934},
}


@lru_cache(maxsize=64)
def accountant(mechanism: Rqm | Pbm, clients: int = 1, points: int = 2) -> Accountant:
    """One for each mechanism, as the laws of sums are kept in it."""
    return Accountant(mechanism, clients, points)


def variance(mechanism: Rqm | Pbm, x: float) -> float:
    """Of the decoded entry, given the entry."""
    law: Tensor = mechanism.pmf(torch.tensor(x, dtype=torch.float64, device="cpu"))
    return float((law * (mechanism.values() - x).square()).sum())


def _same(rows: Rows, number: float) -> dict[int, float]:
    """No seed enters a law."""
    return dict.fromkeys(rows.seeds, number)


def variance_gap(rows: Rows) -> dict[int, float]:
    """How far the two variances are apart at most, as a share."""
    gaps = [
        abs(variance(MATCHED["rqm"], x) / variance(MATCHED["pbm"], x) - 1)
        for x in (0.0, MATCHED["rqm"].clip)
    ]
    return _same(rows, max(gaps))


def off_figures(rows: Rows) -> dict[int, float]:
    """The largest relative difference from the independent figures."""
    pairs = []
    for name, mechanism in MATCHED.items():
        ends = zip((0.0, mechanism.clip), VARIANCES[name], strict=True)
        pairs += [(variance(mechanism, x), figure) for x, figure in ends]
        local = accountant(mechanism)
        pairs += [(local.renyi(alpha), figure) for alpha, figure in LOCAL[name].items()]
    for (name, clients), figures in SUMS.items():
        among = accountant(MATCHED[name], clients)
        pairs += [(among.renyi(alpha), figure) for alpha, figure in figures.items()]
    return _same(rows, max(abs(found / figure - 1) for found, figure in pairs))


def _worst_ratio(clients: int, orders: tuple[float, ...]) -> float:
    ours, theirs = (accountant(MATCHED[name], clients) for name in ("rqm", "pbm"))
    return max(ours.renyi(alpha) / theirs.renyi(alpha) for alpha in orders)


def local_ratio(rows: Rows) -> dict[int, float]:
    """RQM's divergence over PBM's at the worst order, for the code of one client."""
    return _same(rows, _worst_ratio(1, (1.0, *ORDERS, math.inf)))


def sums_ratio(rows: Rows) -> dict[int, float]:
    """The same at the worst order and number of clients, for sums too."""
    return _same(rows, max(_worst_ratio(clients, ORDERS) for clients in COHORTS))


def worst_pair(rows: Rows) -> dict[int, float]:
    """The divergence of any two of 41 entries over that of the extremes, at the worst order."""
    found = [
        accountant(mechanism, points=41).renyi(alpha) / accountant(mechanism).renyi(alpha)
        for mechanism in MATCHED.values()
        for alpha in (1.1, 2.0, 32.0)
    ]
    return _same(rows, max(found))


def divergence_curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """D_alpha over alpha, per entry and message."""
    return {
        f"{name}, {clients} client{'s' * (clients > 1)}": [
            (alpha, accountant(mechanism, clients).renyi(alpha)) for alpha in ORDERS
        ]
        for name, mechanism in MATCHED.items()
        for clients in COHORTS
    }
