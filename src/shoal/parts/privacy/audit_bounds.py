"""What an attacker's success proves: lower bounds of epsilon from guesses about coins.

A canary is put in by a fair coin, the mechanism runs, and an attacker who sees what it shows gives
a score: the higher, the likelier was the canary in. If the mechanism is (epsilon, delta)-private no
attacker guesses well, so one who does proves that epsilon is at least so much. The bounds hold
with the confidence given, whatever the scores are; bad scores only prove less. They say nothing
about how much more is spent: a bound far below what is claimed does not show that the claim is
right, one above it shows that it is wrong.

- `many_runs_epsilon`: independent runs with one canary each.
- `gaussian_runs_epsilon`: the same, for mechanisms that are exactly Gaussian.
- `one_run_epsilon`: many canaries in one run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Neighbours differ by one record that is there or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, log_ndtr, ndtr, ndtri

from shoal.base.errors import UsageError

THRESHOLDS = 400
"""How many of the scores are tried as thresholds, evenly spaced in rank."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def surely_more(hits: ArrayLike, trials: ArrayLike, confidence: float) -> Floats:
    """Chances that are not overestimated, with this confidence (Clopper and Pearson 1934).

    >>> float(surely_more(0, 10, 0.95)), round(float(surely_more(10, 10, 0.95)), 4)
    (0.0, 0.7411)
    """
    hits, trials = np.asarray(hits), np.asarray(trials)
    found = betaincinv(np.maximum(hits, 1), trials - hits + 1, 1 - confidence)
    return np.where(hits > 0, found, 0.0)


def surely_less(hits: ArrayLike, trials: ArrayLike, confidence: float) -> Floats:
    """Chances that are not underestimated, with this confidence.

    >>> round(float(surely_less(0, 10, 0.95)), 4)
    0.2589
    """
    hits, trials = np.asarray(hits), np.asarray(trials)
    return 1 - surely_more(trials - hits, trials, confidence)


def many_runs_epsilon(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float = 0.95
) -> float:
    """epsilon is at least this, from independent runs with one canary each; 0 if nothing is proved.

    scores, included: [runs], floats and bools. The first half of the runs chooses a threshold and
    whether guesses of "in" or of "out" are looked at; the other half is the test, with limits of
    Clopper and Pearson. No more than about log(runs / 4 / log(1 / (1 - confidence))) can be proved.

    >>> included = np.arange(4000) % 2 == 0
    >>> round(many_runs_epsilon(np.where(included, 1.0, 0.0), included, 0.0), 2)
    5.6
    """
    runs = _Runs.of(scores, included, delta, confidence)

    def proved(right: Floats, wrong: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(right - delta, 0.0)) - np.log(wrong)

    return max(0.0, runs.tested(proved))


def gaussian_runs_epsilon(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float = 0.95
) -> float:
    """The same for a mechanism that is Gaussian, which proves far more from as few runs.

    Assumes that no attack does better than telling N(0, 1) from N(mu, 1) for some mu, at any
    threshold, as with Gaussian noise on sums of all records (Dong, Roth and Su 2019, arXiv
    1905.02383). Where records are sampled that is approximately so after many rounds, and the
    bound is no proof. Nasr et al. 2023 (arXiv 2302.07956).
    """
    runs = _Runs.of(scores, included, delta, confidence)

    def proved(right: Floats, wrong: Floats) -> Floats:
        return ndtri(right) - ndtri(wrong)

    mu = runs.tested(proved)
    return gaussian_epsilon(mu, delta) if mu > 0 else 0.0


@dataclass(frozen=True)
class _Runs:
    """Scores of runs, sorted out by coin and by half."""

    first: tuple[Floats, Floats]
    second: tuple[Floats, Floats]
    confidence: float

    @staticmethod
    def of(scores: ArrayLike, included: ArrayLike, delta: float, confidence: float) -> _Runs:
        scores, coins = _checked(scores, included, delta, confidence)
        half = len(scores) // 2
        halves = (scores[:half], coins[:half]), (scores[half:], coins[half:])
        first, second = ((s[c], s[~c]) for s, c in halves)
        if min(map(len, (*first, *second))) == 0:
            raise UsageError(
                f"audit: {len(scores)} runs; each half needs runs with and without the canary "
                "(make more runs)"
            )
        return _Runs(first, second, confidence)

    def tested(self, proved: Callable[[Floats, Floats], Floats]) -> float:
        """`proved` of (a chance of right guesses, one of wrong guesses) in the second half, for
        the guess that proves most in the first."""
        order = np.sort(np.concatenate(self.first))
        places = np.linspace(0, len(order) - 1, min(THRESHOLDS, len(order))).astype(np.int64)
        thresholds = np.unique(order[places])
        tried = self._both(self.first, thresholds, proved)
        side, place = np.unravel_index(int(np.argmax(tried)), tried.shape)
        return float(self._both(self.second, thresholds[place : place + 1], proved)[side, 0])

    def _both(
        self, half: tuple[Floats, Floats], thresholds: Floats,
        proved: Callable[[Floats, Floats], Floats],
    ) -> Floats:  # fmt: skip
        """[2, thresholds]: by guesses of "in" (scores at the threshold or above), and of "out"."""
        with_it, without = half
        right = len(with_it) - np.searchsorted(np.sort(with_it), thresholds)
        wrong = len(without) - np.searchsorted(np.sort(without), thresholds)
        # Two limits are used, so each may fail half as often.
        each = (1 + self.confidence) / 2
        return np.stack([
            proved(
                surely_more(right, len(with_it), each), surely_less(wrong, len(without), each)
            ),
            proved(
                surely_more(len(without) - wrong, len(without), each),
                surely_less(len(with_it) - right, len(with_it), each),
            ),
        ])  # fmt: skip


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta at epsilon of telling N(0, 1) from N(mu, 1) (Balle and Wang 2018, theorem 8)."""
    if mu == 0:
        return 0.0
    up, down = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    return max(0.0, float(ndtr(up)) - math.exp(epsilon + float(log_ndtr(down))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon of the Gaussian mechanism whose record moves the mean by mu deviations.

    Exact, where accountants by Renyi divergences are above it.

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """
    if not 0 < delta < 1 or not 0 <= mu < math.inf:
        raise UsageError(f"gaussian_epsilon: mu={mu}, delta={delta}; need mu >= 0, 0 < delta < 1")
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    found = brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, high, xtol=1e-10)
    assert isinstance(found, float)
    return found


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely `right` guesses or more of `guesses` are at most, if epsilon and delta hold.

    canaries: all of them, also those about which nothing was guessed. With delta = 0 no attack
    beats one coin of bias e^epsilon / (1 + e^epsilon) for each guess; with delta theorem 5.2.

    >>> round(one_run_p_value(100, 50, 40, 1.0, 0.0), 4)
    0.1743
    """
    if not 0 <= right <= guesses <= canaries:
        raise UsageError(
            f"audit: {right} right of {guesses} guesses about {canaries} canaries; need "
            "0 <= right <= guesses <= canaries"
        )
    chance = 1 / (1 + math.exp(-epsilon))
    # Chances of `right`, right - 1, ... guesses or more, and at last of 0 or more.
    least = np.arange(right, 0, -1)
    or_more = np.append(betainc(least, guesses - least + 1, chance), 1.0)
    found = float(or_more[0])
    if delta > 0 and right > 0:
        # Of every i the chance to fall short by i or less, over i.
        short = or_more[1:] - or_more[0]
        found += 2 * canaries * delta * float((short / np.arange(1, right + 1)).max())
    return min(1.0, found)


def one_run_epsilon(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float = 0.95,
    guesses: int | None = None,
) -> float:  # fmt: skip
    """epsilon is at least this, from one run with many canaries; 0 if nothing is proved.

    scores, included: [canaries]; every coin must be independent of all others. guesses: how many
    canaries are guessed about, half of them those of the highest scores, "in", half those of the
    lowest, "out"; None = half of the canaries. It must not depend on the outcome: to take the best
    of several is no longer covered by the confidence. No more than
    -log((1 - confidence)^(-1 / guesses) - 1) can be proved.

    >>> included = np.arange(200) % 3 == 0
    >>> round(one_run_epsilon(np.where(included, 1.0, 0.0), included, 0.0, guesses=100), 2)
    3.49
    """
    values, coins = _checked(scores, included, delta, confidence)
    guesses = len(values) // 2 if guesses is None else guesses
    if not 2 <= guesses <= len(values):
        raise UsageError(
            f"audit: guesses={guesses} about {len(values)} canaries; need at least 2, at most all"
        )
    order = np.argsort(values, kind="stable")
    ins, outs = guesses - guesses // 2, guesses // 2
    right = int(coins[order[len(order) - ins :]].sum() + (~coins[order[:outs]]).sum())

    def excess(epsilon: float) -> float:
        return one_run_p_value(len(values), guesses, right, epsilon, delta) - (1 - confidence)

    if excess(0.0) > 0:
        return 0.0
    high = 1.0
    while excess(high) <= 0:
        high *= 2
    low = 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return low


def _checked(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float
) -> tuple[Floats, NDArray[np.bool_]]:
    values, coins = np.asarray(scores, np.float64), np.asarray(included)
    if values.ndim != 1 or values.shape != coins.shape or coins.dtype != np.bool_:
        raise UsageError(
            f"audit: scores {values.shape}, included {coins.shape} of {coins.dtype}; need a number "
            "and a bool for each"
        )
    if np.isnan(values).any():
        raise UsageError("audit: a score is not a number (let a run that failed count as 0)")
    if not 0 <= delta < 1 or not 0 < confidence < 1:
        raise UsageError(
            f"audit: delta={delta}, confidence={confidence}; need 0 <= delta < 1 and a confidence "
            "between 0 and 1"
        )
    return values, coins
