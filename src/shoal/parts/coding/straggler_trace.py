"""Which workers are slow in which round: random bursts, heavy-tailed ones, or the worst allowed.

Draws are keyed by worker and round, so that all schemes meet the same stragglers.

Two-state model of bursts: Gilbert 1960; as a model of stragglers: Yang et al. 2019
(arXiv 1904.08054), Krishnan et al. 2023 (arXiv 2211.13802), appendix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from shoal.base.errors import UsageError
from shoal.parts.coding.delay_profile import DelayProfile
from shoal.tensor import keyed

Kind = Literal["gilbert-elliott", "measured", "adversarial"]


@dataclass(frozen=True)
class StragglerTrace:
    """How workers' times come about: (base + slope * load + noise) * slowness, in seconds.

    kind: "gilbert-elliott": every worker is slow or not, a chain with the share `stationary` of
    rounds slow, `mean_burst` rounds at a time. "measured": as on rented functions, most bursts last
    one round and some much longer (`mean_burst` is the mean of a law with tail k^-2.5, cut off at
    32), and how slow a worker is in a burst varies (Pareto, at least `slow`, tail index 2.5).
    "adversarial": `most` workers at a time are slow for `mean_burst` rounds (B, whole), the next
    ones, in turn, `window` rounds after the last round of these: the worst of the (B, W, lambda)
    model.

    noise_s, noise_shape: mean and shape of Gamma noise. slow: how many times as long a slow worker
    takes.

    >>> trace = StragglerTrace(stationary=0.04, mean_burst=1.5)
    >>> slow = trace.slowness(64, 2000, seed=1) > 1
    >>> round(float(slow.mean()), 2)
    0.04
    """

    kind: Kind = "gilbert-elliott"
    base_s: float = 1.0
    slope_s: float = 10.0
    noise_s: float = 0.1
    noise_shape: float = 4.0
    stationary: float = 0.04
    mean_burst: float = 1.5
    slow: float = 6.0
    most: int = 1
    window: int = 2

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(
                f"StragglerTrace: kind={self.kind!r}; need one of {', '.join(get_args(Kind))}"
            )
        if not 0 <= self.stationary < 1 or not self.mean_burst >= 1 or not self.slow >= 1:
            raise UsageError(
                f"StragglerTrace: stationary={self.stationary}, mean_burst={self.mean_burst}, "
                f"slow={self.slow}; need a share below 1, bursts of a round and a factor of 1 at "
                "least"
            )
        if self.entering > 1:
            raise UsageError(
                f"StragglerTrace: stationary={self.stationary} with bursts of {self.mean_burst}; "
                "need a smaller share (slow times would follow each other at once)"
            )
        if not (self.base_s > 0 and self.slope_s >= 0 and self.noise_s >= 0):
            raise UsageError("StragglerTrace: need base_s > 0, slope_s >= 0 and noise_s >= 0")
        fits = self.kind != "adversarial" or (
            self.window > self.mean_burst and self.mean_burst == int(self.mean_burst)
        )
        if not (self.noise_shape > 0 and self.most >= 0 and fits):
            raise UsageError(
                f"StragglerTrace: noise_shape={self.noise_shape}, most={self.most}, "
                f"window={self.window}, mean_burst={self.mean_burst}; need a shape above 0, 0 or "
                "more workers, and for 'adversarial' bursts of whole rounds and a longer window"
            )

    @property
    def leaving(self) -> float:
        """Chance that a slow worker is fast in the next round."""
        return 1.0 / self.mean_burst

    @property
    def entering(self) -> float:
        """Chance that a fast worker is slow in the next round."""
        return self.leaving * self.stationary / (1.0 - self.stationary)

    def slowness(self, workers: int, rounds: int, seed: int = 0) -> np.ndarray:
        """What times are multiplied with, float64 [workers, rounds], 1 where nobody is slow."""
        if self.kind == "adversarial":
            return self._adversarial(workers, rounds)
        draws = self._draws("state", workers, rounds + 1, seed)
        if self.kind == "measured":
            return self._measured(draws, self._draws("burst", workers, rounds, seed),
                                  self._draws("factor", workers, rounds, seed))  # fmt: skip
        state = draws[:, 0] < self.stationary
        out = np.ones((workers, rounds))
        for round in range(rounds):
            if round:
                # A burst of mean 1 ends for certain; then the worker is fast for a round at least.
                state = np.where(
                    state, draws[:, round] >= self.leaving, draws[:, round] < self.entering
                )
            out[state, round] = self.slow
        return out

    def _measured(self, enter: np.ndarray, length: np.ndarray, factor: np.ndarray) -> np.ndarray:
        workers, rounds = length.shape
        lengths, chances = _burst_lengths(self.mean_burst)
        # In the first round bursts are under way as in any other, and long ones rather.
        beyond = np.array([chances[lengths >= k].sum() for k in range(1, lengths.max() + 1)])
        whole, rest = np.cumsum(chances), np.cumsum(beyond / beyond.sum())
        out = np.ones((workers, rounds))
        left = np.zeros(workers, dtype=int)
        late = np.zeros(workers, dtype=bool)
        pace = np.ones(workers)
        for round in range(rounds):
            if round:
                # As in the chain, a worker is fast for a round at least.
                begins = (left == 0) & ~late & (enter[:, round] < self.entering)
                place = np.searchsorted(whole, length[:, round]).clip(0, len(lengths) - 1)
                drawn = lengths[place]
            else:
                begins = enter[:, 0] < self.stationary
                drawn = 1 + np.searchsorted(rest, length[:, 0]).clip(0, len(rest) - 1)
            left = np.where(begins, drawn, left)
            pace = np.where(begins, self.slow * (1.0 - factor[:, round]) ** -0.4, pace)
            late = left > 0
            out[:, round] = np.where(late, pace, 1.0)
            left = np.maximum(left - 1, 0)
        return out

    def _adversarial(self, workers: int, rounds: int) -> np.ndarray:
        out = np.ones((workers, rounds))
        most, burst = min(self.most, workers), int(self.mean_burst)
        # The window slides: the next ones begin when the last round of these has left it.
        for turn, first in enumerate(range(0, rounds, self.window + burst - 1)):
            who = (turn * most + np.arange(most)) % workers
            out[who, first : first + burst] = self.slow
        return out

    def seconds(self, load: float, workers: int, rounds: int, seed: int = 0) -> np.ndarray:
        """How long every worker takes in every round with this load, float64 [workers, rounds]."""
        noise = self.noise(workers, rounds, seed)
        plain = self.base_s + self.slope_s * load + noise
        return plain * self.slowness(workers, rounds, seed)

    def profile(self, load: float, workers: int, rounds: int, seed: int = 0) -> DelayProfile:
        """What would be recorded at this load, with the true slope."""
        return DelayProfile(self.seconds(load, workers, rounds, seed), load, self.slope_s)

    def noise(self, workers: int, rounds: int, seed: int = 0) -> np.ndarray:
        """Seconds of noise in every round, float64 [workers, rounds]."""
        if not self.noise_s:
            return np.zeros((workers, rounds))
        from scipy.stats import gamma

        draws = self._draws("noise", workers, rounds, seed)
        return gamma.ppf(draws, self.noise_shape, scale=self.noise_s / self.noise_shape)

    def _draws(self, what: str, workers: int, rounds: int, seed: int) -> np.ndarray:
        key = keyed.key_of(seed, "stragglers", what)
        each = keyed.fold(key, torch.arange(workers, device="cpu")).unsqueeze(-1)
        return keyed.uniform(each, torch.arange(rounds, device="cpu")).numpy()


def _burst_lengths(mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Lengths 1 .. 32 and their chances: so many single rounds beside a tail of k^-2.5 that the
    mean is right."""
    lengths = np.arange(1, 33)
    tail = lengths**-2.5
    tail = tail / tail.sum()
    longest = float((tail * lengths).sum())
    share = min(1.0, (mean - 1.0) / (longest - 1.0)) if mean > 1 else 0.0
    chances = share * tail
    chances[0] += 1.0 - share
    if mean > longest:
        # Longer bursts than the law has: all are prolonged alike, to whole rounds by chance.
        wanted = lengths * (mean / longest)
        lower = np.floor(wanted).astype(int)
        over = wanted - lower
        lengths = np.concatenate([lower, lower + 1])
        chances = np.concatenate([chances * (1.0 - over), chances * over])
    return lengths, chances


def stationary_of(slowness: np.ndarray) -> tuple[float, float]:
    """The share of slow rounds of a trace, and the mean length of its bursts (nan without any)."""
    slow = slowness > 1
    begins = slow & ~np.pad(slow, ((0, 0), (1, 0)))[:, :-1]
    bursts = int(begins.sum())
    return float(slow.mean()), float(slow.sum()) / bursts if bursts else math.nan
