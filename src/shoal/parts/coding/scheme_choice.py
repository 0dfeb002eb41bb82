"""Which scheme is fastest on recorded delays: every candidate is replayed, the best one is taken.

A round ends when all workers are there, or (1 + mu) times as long after its start as the fastest
one took, if the scheme can do without the others; they are cancelled then.

Krishnan et al. 2023 (arXiv 2211.13802), section 4 and appendix on the selection of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shoal.base.errors import UsageError
from shoal.parts.coding.delay_profile import DelayProfile
from shoal.parts.coding.sequential_scheme import SequentialScheme, spare

Family = Literal["uncoded", "replicated", "gc", "sr_sgc", "m_sgc"]
FAMILIES: tuple[Family, ...] = ("uncoded", "replicated", "gc", "sr_sgc", "m_sgc")


@dataclass(frozen=True)
class Replayed:
    """What a scheme took: seconds of each round, in which rounds all were waited for, and how many
    workers were cancelled in each."""

    round_s: tuple[float, ...]
    waited: tuple[bool, ...]
    cancelled: tuple[int, ...]

    @property
    def total_s(self) -> float:
        return float(sum(self.round_s))


@dataclass(frozen=True)
class Choice:
    """A scheme and what it is expected to take for all jobs, flush rounds included."""

    scheme: SequentialScheme
    expected_s: float


def round_end(seconds: np.ndarray, patience: float) -> tuple[float, np.ndarray]:
    """When a round of these workers ends if late ones can be done without, and who is late."""
    limit = (1.0 + patience) * float(seconds.min())
    late = seconds > limit
    return (limit if late.any() else float(seconds.max())), late


def replay(scheme: SequentialScheme, seconds: np.ndarray, patience: float = 1.0) -> Replayed:
    """All rounds of a scheme on seconds [workers, rounds] at its load.

    Who is late is what the scheme's tolerance is asked about; what is decoded from what is the
    business of `SequentialScheme`. Every round is charged in full, the T first and last ones with
    slots that nothing is in as well. UsageError when the trace is shorter than J + T.
    """
    rounds = scheme.rounds
    if seconds.shape[0] != scheme.workers or seconds.shape[1] < rounds:
        raise UsageError(
            f"replay: seconds {list(seconds.shape)}; {scheme.name} needs {scheme.workers} workers "
            f"and {rounds} rounds (J={scheme.jobs} and T={scheme.delay}; record more, or do fewer "
            "jobs)"
        )
    tolerance = scheme.rule.tolerance(scheme.jobs)
    times, waited, cancelled = [], [], []
    for round in range(rounds):
        column = seconds[:, round]
        end_s, late = round_end(column, patience)
        bits = _bits(late)
        waits = bits != 0 and not tolerance.admits(bits)
        tolerance.advance(0 if waits else bits)
        times.append(float(column.max()) if waits else end_s)
        waited.append(waits)
        cancelled.append(0 if waits else bits.bit_count())
    return Replayed(tuple(times), tuple(waited), tuple(cancelled))


def candidates(
    workers: int,
    jobs: int,
    max_delay: int,
    families: Sequence[Family] = FAMILIES,
    most: int | None = None,
) -> Iterator[SequentialScheme]:
    """All schemes with T of `max_delay` at most, that tolerate up to `most` (None = half of the)
    workers."""
    most = max(1, workers // 2) if most is None else min(most, workers)
    if "uncoded" in families:
        yield SequentialScheme.uncoded(workers, jobs=jobs)
    if "replicated" in families:
        # One copy is uncoded, which is there already unless it was not asked for.
        first = 2 if "uncoded" in families else 1
        for copies in range(first, min(most + 1, workers) + 1):
            if workers % copies == 0:
                yield SequentialScheme.replicated(workers, copies, jobs=jobs)
    if "gc" in families:
        for stragglers in range(1, min(most, workers - 1) + 1):
            yield SequentialScheme.gc(workers, stragglers, jobs=jobs)
    if "sr_sgc" in families:
        for burst in range(1, max_delay + 1):
            for window in range(burst + 1, max(max_delay, 3 * burst) + 2, burst):
                for count in _useful(burst, window, most):
                    yield SequentialScheme.sr_sgc(workers, burst, window, count, jobs=jobs)
    if "m_sgc" in families:
        for burst in range(1, max_delay + 1):
            for window in range(burst + 1, max_delay + 3 - burst):
                for count in range(1, most + 1):
                    yield SequentialScheme.m_sgc(workers, burst, window, count, jobs=jobs)


def _useful(burst: int, window: int, most: int) -> Iterator[int]:
    """Of all counts of stragglers that need the same code, the largest."""
    for count in range(1, most + 1):
        if count == most or spare(burst, window, count + 1) > spare(burst, window, count):
            yield count


def choose_scheme(
    profile: DelayProfile, max_delay: int, *, jobs: int | None = None, patience: float = 1.0,
    families: Sequence[Family] = FAMILIES, most: int | None = None,
) -> Choice:  # fmt: skip
    """The scheme that would have been fastest on a profile, for so many jobs.

    profile: delays at one load, with the slope that takes them to others. max_delay: rounds that a
    job may be late (with M models in turn: M - 1). jobs: of the run that is planned, None = as many
    as the profile has room for. Each round of the profile is used, and the mean round counts
    J + T times. Ties go to the smaller delay, then to the smaller load.

    Assumes that the future is like the profile: a choice among many on few rounds is optimistic.
    UsageError when the profile is shorter than one job and its delay.

    >>> seconds = np.ones((4, 20))
    >>> choose_scheme(DelayProfile(seconds, load=0.25, slope=1.0), 2).scheme.name
    'uncoded'
    """
    if max_delay < 0:
        raise UsageError(f"choose_scheme: max_delay={max_delay}; need 0 or more rounds")
    if profile.rounds < 1 + max_delay:
        raise UsageError(
            f"choose_scheme: a profile of {profile.rounds} rounds; a job with a delay of "
            f"{max_delay} needs {1 + max_delay} (record more, or allow less delay)"
        )
    planned = profile.rounds - max_delay if jobs is None else jobs
    best: tuple[float, int, float] | None = None
    chosen: SequentialScheme | None = None
    for scheme in candidates(profile.workers, planned, max_delay, families, most):
        seconds = profile.at(scheme.load)
        # As many jobs as fill the profile, so that each candidate is judged by all rounds.
        trial = SequentialScheme(scheme.rule, profile.rounds - scheme.delay)
        mean = replay(trial, seconds, patience).total_s / profile.rounds
        value = (mean * (planned + scheme.delay), scheme.delay, scheme.load)
        if best is None or value < best:
            best, chosen = value, scheme
    if best is None or chosen is None:
        raise UsageError(f"choose_scheme: no candidates of {', '.join(families)} (allow more)")
    return Choice(chosen, best[0])


def _bits(late: np.ndarray) -> int:
    out = 0
    for worker in np.flatnonzero(late).tolist():
        out |= 1 << worker
    return out
