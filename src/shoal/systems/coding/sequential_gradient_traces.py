"""Sequential gradient coding on delays: what each family of schemes takes, at its best.

Delays of all workers are made, or read; each family's parameters are chosen on the first rounds
alone, and tested on the rounds after them. No messages and no gradients: only who is late, who is
waited for, and whether every job is decoded in time.

Krishnan et al. 2023 (arXiv 2211.13802), section 5.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from shoal.base.errors import UsageError
from shoal.lab.card import Source, System
from shoal.lab.scenario import Scenario
from shoal.parts.coding.delay_profile import DelayProfile
from shoal.parts.coding.scheme_choice import FAMILIES, choose_scheme, replay, round_end
from shoal.parts.coding.sequential_scheme import SequentialScheme
from shoal.parts.coding.straggler_trace import Kind, StragglerTrace, stationary_of
from shoal.world.record import Row, Run

What = Literal["delays", "loads"]
FITTED_AT = 8
"""The second load at which delays are recorded to fit the slope, in shares of an uncoded worker."""


def sequential_gradient_traces(
    scenario: Scenario, what: What = "delays", kind: Kind = "gilbert-elliott", base_s: float = 1.0,
    slope_s: float = 10.0, noise_s: float = 0.1, stationary: float = 0.04,
    mean_burst: float = 1.5, slow: float = 6.0, calibration: int = 40, max_delay: int = 10,
    most: int | None = None, mu: float = 1.0, together: int = 4, window: int = 3,
    delays: str = "", delays_load: float = 0.0,
) -> Run:  # fmt: skip
    """The scenario's peers are workers, its rounds are the jobs J after the calibration.

    what: "delays", or "loads": instead, count the loads of the published parameters. kind ...
    slow: see `StragglerTrace`. calibration: rounds on which parameters are chosen, among schemes
    with T <= max_delay that tolerate up to `most` workers; mu: how much longer than the fastest
    worker the others may take. together, window: of "adversarial" delays, how many workers are slow
    at a time, and within how many rounds nobody else is. delays: a CSV file of recorded seconds
    (`DelayProfile.read`) at the load `delays_load`, in place of made ones; slope_s is then what is
    known of the slope.

    Numbers: of each family (`uncoded`, `replicated`, `gc`, `sr_sgc`, `m_sgc`) `..._s`, `..._load`,
    `..._delay` and `..._waits` (share of rounds in which all were waited for); `ignoring_s` and
    `oracle_s` (the work is dealt to those who will not be late); `undecoded`: jobs that were not
    decoded in time; `load_gap`: how far counted loads are from their formulas.
    """
    if what not in get_args(What):
        raise UsageError(f"what={what!r}; need one of {', '.join(get_args(What))}")
    jobs, workers = scenario.rounds or 0, scenario.peers
    if jobs < 1 or calibration < 1:
        raise UsageError(
            f"rounds={scenario.rounds}, calibration={calibration}; need a job and a round to "
            "calibrate on at least"
        )
    run = Run(engine="study", seed=scenario.seed, peers=workers)
    if what == "loads":
        _published(run, workers, jobs)
        return run
    world: _Recorded | _Made
    if delays:
        recorded = DelayProfile.read(delays, delays_load, slope_s)
        world = _Recorded(recorded, calibration)
        if recorded.workers != workers:
            raise UsageError(
                f"{delays}: {recorded.workers} workers; the scenario has {workers} (set peers)"
            )
    else:
        trace = StragglerTrace(
            kind, base_s, slope_s, noise_s, stationary=stationary, mean_burst=mean_burst, slow=slow,
            most=together, window=window,
        )  # fmt: skip
        world = _Made(trace, workers, calibration + jobs + max_delay, calibration, scenario.seed)
        share, burst = stationary_of(world.slowness)
        _tell(run, slow_share=share, slow_burst=burst)
    undecoded, gap = 0, 0.0
    for family in FAMILIES:
        choice = choose_scheme(
            world.profile, max_delay, jobs=jobs, patience=mu, families=(family,), most=most
        )
        scheme = choice.scheme
        seconds = world.tested(scheme.load)
        played = replay(scheme, seconds, mu)
        missed, off = _decoded(scheme.again(), seconds, mu)
        undecoded, gap = undecoded + missed, max(gap, off)
        _tell(
            run, scheme.name, **{
                f"{family}_s": played.total_s, f"{family}_load": scheme.load,
                f"{family}_delay": scheme.delay, f"{family}_expected_s": choice.expected_s,
                f"{family}_waits": float(np.mean(played.waited)),
            },
        )  # fmt: skip
    ignoring = SequentialScheme.ignoring(workers, jobs=jobs)
    _tell(run, ignoring_s=replay(ignoring, world.tested(ignoring.load), mu).total_s)
    _tell(run, oracle_s=_oracle(world, jobs, mu), undecoded=undecoded, load_gap=gap)
    return run


def _tell(run: Run, scheme: str = "", **numbers: float) -> None:
    labels = (("scheme", scheme),) if scheme else ()
    run.rows.extend(Row(name, float(each), 0.0, labels=labels) for name, each in numbers.items())


class _Made:
    """Delays by formula: after the calibration they depend on the load as they really do."""

    def __init__(
        self, trace: StragglerTrace, workers: int, rounds: int, calibration: int, seed: int
    ) -> None:
        self._plain = trace.base_s + trace.noise(workers, rounds, seed)
        self.slowness = trace.slowness(workers, rounds, seed)
        self._slope_s, self._calibration = trace.slope_s, calibration
        load = 1.0 / workers
        first = DelayProfile(self._seconds(load)[:, :calibration], load)
        # A system would be recorded at another load in other rounds.
        other_load = min(1.0, FITTED_AT * load)
        other = DelayProfile(
            trace.seconds(other_load, workers, calibration, seed + 1_000_003), other_load
        )
        self.profile = DelayProfile.fitted([first, other]) if other_load > load else first

    def _seconds(self, load: float) -> np.ndarray:
        return (self._plain + self._slope_s * load) * self.slowness

    def tested(self, load: float) -> np.ndarray:
        """Seconds [workers, rounds] after the calibration."""
        return self._seconds(load)[:, self._calibration :]


class _Recorded:
    """Delays from a file, taken to other loads by their slope."""

    def __init__(self, profile: DelayProfile, calibration: int) -> None:
        self.profile = profile.part(0, calibration)
        self._rest = profile.part(calibration, profile.rounds)

    def tested(self, load: float) -> np.ndarray:
        """Seconds [workers, rounds] after the calibration."""
        return self._rest.at(load)


def _decoded(scheme: SequentialScheme, seconds: np.ndarray, mu: float) -> tuple[int, float]:
    """The rounds again, task by task: how many jobs were not decodable in time, and how far the
    work that was counted in full rounds is from the scheme's load."""
    missed, gap = 0, 0.0
    everybody = set(range(scheme.workers))
    for round in range(1, scheme.rounds + 1):
        scheme.plan(round)
        _, late = round_end(seconds[:, round - 1], mu)
        finished = everybody - set(np.flatnonzero(late).tolist())
        if scheme.must_wait(round, finished):
            finished = everybody
        if scheme.delay < round <= scheme.jobs:
            most = max(scheme.planned_load(worker) for worker in everybody)
            gap = max(gap, abs(most - scheme.load) / scheme.load)
        scheme.observe(round, finished)
        due = round - scheme.delay
        if due >= 1:
            missed += not scheme.decodable(due)
            scheme.forget(due)
    return missed, gap


def _oracle(world: _Recorded | _Made, jobs: int, mu: float) -> float:
    """All work is dealt evenly to those who will not be late, who are waited for."""
    workers = world.profile.workers
    total = 0.0
    known = world.tested(1.0 / workers)
    for round in range(jobs):
        _, late = round_end(known[:, round], mu)
        load = 1.0 / float((~late).sum())
        total += float(world.tested(load)[~late, round].max())
    return total


def _published(run: Run, workers: int, jobs: int) -> None:
    """Loads of the parameters of the paper's experiments, counted in a full round."""
    schemes = {
        "uncoded": SequentialScheme.uncoded(workers, jobs=jobs),
        "gc": SequentialScheme.gc(workers, 15, jobs=jobs),
        "sr_sgc": SequentialScheme.sr_sgc(workers, 2, 3, 23, jobs=jobs),
        "m_sgc": SequentialScheme.m_sgc(workers, 1, 2, 27, jobs=jobs),
    }
    for family, scheme in schemes.items():
        for round in range(1, scheme.delay + 1):
            scheme.observe(round, range(workers))
        counted = max(scheme.planned_load(worker) for worker in range(workers))
        numbers = {"load": counted, "formula": scheme.load, "delay": scheme.delay}
        _tell(run, scheme.name, **{f"{family}_{name}": v for name, v in numbers.items()})


SYSTEM = System(
    name="sequential-gradient-traces",
    kind="study",
    title="Gradient coding over rounds on recorded or made delays: each family at its best",
    make=sequential_gradient_traces,
    source=Source(
        "Krishnan et al. 2023",
        "Sequential Gradient Coding For Straggler Mitigation",
        arxiv="2211.13802",
        venue="ICLR 2023",
    ),
    scenario="coding.delays",
    deviations=("claims about these schemes are on the card of sequential-gradient-coding",),
)
