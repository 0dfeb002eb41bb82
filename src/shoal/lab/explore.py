"""Fault fuzzing: many generated fault lists, invariants over each run, minimal failing lists.

Every list follows from its seed alone, so a failure is replayed from its JSON (seed and explicit
list) and the search can be split over processes. A run fails when an invariant complains, when an
exception from outside the error tree (or a broken rule of the kernel) comes out of it, and when it
hangs: more events than allowed, nobody left to wake anybody, or not done by the horizon.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.base import keyed
from shoal.base.errors import ProgramError, ShoalError, SimulationError, UsageError
from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Program
from shoal.world.faults import KINDS, Fault, Round, from_data, to_data
from shoal.world.network import Network
from shoal.world.record import Run

Programs = Program | Callable[[int], Program]
Invariant = Callable[[Run], str | None]
"""What is wrong with a finished run, or None. An AssertionError counts as a complaint too."""

MOST_FAULTS = 6


@dataclass(frozen=True)
class Problem:
    """Why a run failed. kind: "invariant", "exception" or "hang"; `where` tells problems apart."""

    kind: str
    where: str
    text: str


@dataclass(frozen=True)
class Failure:
    """A fault list under which a run fails, as generated and as shrunk."""

    seed: int
    strict: bool
    generated: tuple[Fault, ...]
    minimal: tuple[Fault, ...]
    problem: Problem

    def to_data(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "strict": self.strict,
            "problem": {"kind": self.problem.kind, "text": self.problem.text},
            "faults": [to_data(fault) for fault in self.minimal],
            "generated": [to_data(fault) for fault in self.generated],
        }


@dataclass(frozen=True)
class Exploration:
    """What a search found."""

    seeds: int
    kinds: Mapping[str, int]
    """how many faults of each kind were tried"""
    traces: int
    """how many runs differed in their deliveries"""
    ended: Mapping[str, int]
    """runs that an error of the tree ended, by its class; such a run has no invariants to hold"""
    failures: tuple[Failure, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it; `replay` takes an element of "failures"."""
        return json.dumps(
            {
                "seeds": self.seeds,
                "kinds": dict(self.kinds),
                "traces": self.traces,
                "ended": dict(self.ended),
                "settings": dict(self.settings),
                "failures": [failure.to_data() for failure in self.failures],
            },
            indent=2,
        )


@dataclass(frozen=True)
class Trial:
    """Everything about a run but its seed and its faults."""

    make: Callable[[], Programs]
    network: Network
    horizon_s: float
    invariants: tuple[Invariant, ...] = ()
    events: int = 1_000_000

    def run(
        self, seed: int, faults: Sequence[Fault], strict: bool
    ) -> tuple[Run | None, Problem | str]:
        """The run with a problem or "", or no run and the class of the error that ended it."""
        settings = EventSettings(strict=strict, horizon_s=self.horizon_s, events=self.events)
        network = replace(self.network, faults=(*self.network.faults, *faults))
        try:
            run = simulate(self.make(), network, seed=seed, settings=settings)
        except SimulationError as error:
            return None, Problem("hang", type(error).__name__, str(error))
        except ProgramError as error:
            return None, Problem("exception", type(error).__name__, _told(error))
        except ShoalError as error:
            return None, type(error).__name__
        except Exception as error:
            return None, Problem("exception", type(error).__name__, _told(error))
        if not run.finished:
            text = f"not done at the horizon of {self.horizon_s} virtual seconds"
            return run, Problem("hang", "horizon", text)
        return run, self.complaint(run) or ""

    def complaint(self, run: Run) -> Problem | None:
        for invariant in self.invariants:
            name = getattr(invariant, "__name__", type(invariant).__name__)
            try:
                text = invariant(run)
            except AssertionError as error:
                text = str(error) or "assertion failed"
            if text is not None:
                return Problem("invariant", name, f"{name}: {text}")
        return None


def _told(error: BaseException) -> str:
    return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


@dataclass(frozen=True)
class Plan:
    """How a seed becomes a fault list, and how far a failing one is shrunk."""

    window_s: float
    rounds: int
    kinds: tuple[str, ...]
    strict_every: int
    shrink_runs: int


@dataclass(frozen=True)
class Tried:
    """What came of one fault list. trace: the digest of the run, if there is one; ended: the class
    of the error of the tree that ended it, or ""."""

    kinds: tuple[str, ...]
    trace: str | None
    ended: str
    failure: Failure | None


def attempt(trial: Trial, plan: Plan, seed: int) -> Tried:
    """Run the fault list of one seed, and shrink it if it fails."""
    faults = generate(
        seed, trial.network.peers, window_s=plan.window_s, rounds=plan.rounds, kinds=plan.kinds
    )
    strict = seed % plan.strict_every == 0
    run, problem = trial.run(seed, faults, strict)
    failure = None
    if isinstance(problem, Problem):
        minimal = _shrink(trial, seed, faults, strict, problem, plan.shrink_runs)
        failure = Failure(seed, strict, faults, minimal, problem)
    return Tried(
        tuple(fault.kind for fault in faults), None if run is None else run.trace_digest,
        problem if isinstance(problem, str) else "", failure,
    )  # fmt: skip


def explore(
    make_program: Callable[[], Programs], network: Network, *, seeds: int = 300, horizon_s: float,
    invariants: Sequence[Invariant] = (), kinds: Sequence[str] = tuple(KINDS),
    rounds: int | None = None, window_s: float | None = None, strict_every: int = 10,
    events: int = 1_000_000, first_seed: int = 0, most_failures: int = 10, shrink_runs: int = 200,
    progress: Callable[[int, int], None] | None = None,
    spread: Callable[[Plan, Sequence[int]], Generator[Tried]] | None = None,
) -> Exploration:  # fmt: skip
    """Run `make_program()` under `seeds` fault lists and shrink those that fail.

    horizon_s, events: a run that needs more hangs. Faults begin within `window_s` (default: what a
    run without faults takes) and, a third of them, at rounds below `rounds` (default: as many as
    the run without faults recorded). Every `strict_every`-th run uses the strict wire. The search
    ends early after `most_failures`; `progress(done, failures)` is called after each run.
    spread: what gives `attempt(trial, plan, seed)` for each seed, in the order of the seeds; by
    default they run here, one after the other. What is found does not depend on it.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"explore: kinds={tuple(kinds)!r}; need some of {', '.join(KINDS)}")
    if seeds < 1 or strict_every < 1:
        raise UsageError(f"explore: seeds={seeds}, strict_every={strict_every}; need at least 1")
    trial = Trial(make_program, network, horizon_s, tuple(invariants), events)
    quiet, problem = trial.run(first_seed, (), True)
    if window_s is None:
        window_s = min(horizon_s, quiet.virtual_s) if quiet is not None else horizon_s
    if rounds is None:
        rounds = 1 + max((row.round for row in quiet.rows), default=-1) if quiet is not None else 0
    tried: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    traces: set[str] = set()
    failures: list[Failure] = []
    done = 0
    if isinstance(problem, Problem):
        failures.append(Failure(first_seed, True, (), (), problem))
    else:
        plan = Plan(window_s or horizon_s, rounds, tuple(kinds), strict_every, shrink_runs)
        numbers = range(first_seed, first_seed + seeds)
        each = (
            (attempt(trial, plan, seed) for seed in numbers)
            if spread is None
            else spread(plan, numbers)
        )
        with closing(each):
            for done, one in enumerate(each, 1):
                tried.update(one.kinds)
                if one.trace is not None:
                    traces.add(one.trace)
                if one.failure is not None:
                    failures.append(one.failure)
                elif one.ended:
                    ended[one.ended] += 1
                if progress is not None:
                    progress(done, len(failures))
                if len(failures) >= most_failures:
                    break
    settings = {
        "horizon_s": horizon_s, "events": events, "window_s": window_s, "rounds": rounds,
        "kinds": list(kinds), "strict_every": strict_every, "first_seed": first_seed,
    }  # fmt: skip
    return Exploration(done, dict(tried), len(traces), dict(ended), tuple(failures), settings)


def replay(
    make_program: Callable[[], Programs], network: Network, data: Mapping[str, Any], *,
    horizon_s: float, events: int = 1_000_000, invariants: Sequence[Invariant] = (),
) -> Problem | None:  # fmt: skip
    """Run a failure from its JSON again: the problem, or None when it is gone."""
    trial = Trial(make_program, network, horizon_s, tuple(invariants), events)
    faults = tuple(from_data(fault) for fault in data["faults"])
    _, problem = trial.run(data["seed"], faults, data["strict"])
    return problem if isinstance(problem, Problem) else None


# Generation.


def generate(
    seed: int, peers: int, *, window_s: float, rounds: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
) -> tuple[Fault, ...]:  # fmt: skip
    """The fault list of a seed: one to six faults; consecutive seeds use all kinds equally often.

    >>> generate(3, 8, window_s=10.0) == generate(3, 8, window_s=10.0)
    True
    """
    count = seed % MOST_FAULTS + 1
    first = seed // MOST_FAULTS * (MOST_FAULTS * (MOST_FAULTS + 1) // 2) + count * (count - 1) // 2
    return tuple(
        _fault(seed, number, _dealt(first + number, kinds), peers, window_s, rounds)
        for number in range(count)
    )


def _dealt(place: int, kinds: Sequence[str]) -> str:
    """Kinds as from a pack of cards that is shuffled anew whenever it is used up."""
    pack, card = divmod(place, len(kinds))
    order = sorted(range(len(kinds)), key=lambda kind: keyed.uniform(pack, "explore", kind))
    return kinds[order[card]]


def _fault(seed: int, number: int, kind: str, peers: int, window_s: float, rounds: int) -> Fault:
    def draw(what: str) -> float:
        return keyed.uniform(seed, "explore", number, what)

    def log_draw(what: str, low: float, high: float) -> float:
        return low * (high / low) ** draw(what)

    size = 1 + int(draw("size") * max(1, peers // 3))
    order = sorted(range(peers), key=lambda p: keyed.uniform(seed, "explore", number, "who", p))
    values: dict[str, Any] = {"who": tuple(sorted(order[:size]))}
    lasting = kind in ("crash", "partition", "slow", "loss", "hold", "skew", "corrupt")
    ends = lasting and (kind == "hold" or draw("ends") < 0.7)
    if rounds > 0 and draw("tied") < 1 / 3:
        at = int(draw("at") * rounds)
        values["at"] = Round(at)
        if ends:
            values["until"] = Round(at + 1 + int(draw("until") * max(1, rounds // 2)))
    else:
        at_s = draw("at") * window_s
        values["at"] = round(at_s, 6)
        if ends:
            values["until"] = round(at_s + log_draw("until", 0.05, 1.0) * window_s + 1e-6, 6)
    if kind == "crash":
        values["store"] = "lost" if draw("store") < 0.3 else "kept"
    elif kind == "leave":
        values["grace_s"] = round(log_draw("grace", 0.001, 0.3) * window_s, 6)
    elif kind == "partition":
        values["one_way"] = draw("one way") < 0.3
    elif kind == "slow":
        values["factor"] = round(log_draw("factor", 1.5, 100.0), 3)
    elif kind in ("loss", "corrupt"):
        values["probability"] = round(log_draw("probability", 0.05, 1.0), 3)
    elif kind == "skew":
        values["offset_s"] = round((2 * draw("offset") - 1) * 0.2 * window_s, 6)
        values["drift"] = round((2 * draw("drift") - 1) * 0.1, 6)
    return KINDS[kind](**values)


# Shrinking.


def _shrink(
    trial: Trial, seed: int, faults: tuple[Fault, ...], strict: bool, problem: Problem, runs: int
) -> tuple[Fault, ...]:
    """A list that fails in the same way and from which nothing can be taken (Zeller and
    Hildebrandt 2002, one-minimal); then fewer peers, rounder and shorter times."""
    left = runs

    def fails(candidate: tuple[Fault, ...]) -> bool:
        nonlocal left
        if left <= 0:
            return False
        left -= 1
        _, found = trial.run(seed, candidate, strict)
        return isinstance(found, Problem) and (found.kind, found.where) == (
            problem.kind, problem.where,
        )  # fmt: skip

    faults = _fewer(faults, fails)
    changed = True
    while changed and left > 0:
        changed = False
        for place, fault in enumerate(faults):
            for simpler in _simpler(fault):
                candidate = (*faults[:place], simpler, *faults[place + 1 :])
                if fails(candidate):
                    faults = candidate
                    changed = True
                    break
    return faults


def _fewer(
    faults: tuple[Fault, ...], fails: Callable[[tuple[Fault, ...]], bool]
) -> tuple[Fault, ...]:
    if fails(()):
        return ()
    parts = 2
    while len(faults) >= 2:
        size = -(-len(faults) // parts)
        for start in range(0, len(faults), size):
            candidate = faults[:start] + faults[start + size :]
            if candidate and fails(candidate):
                faults = candidate
                parts = max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(faults), 2 * parts)
    return faults


def _simpler(fault: Fault) -> Iterator[Fault]:
    """Variants of one fault that are easier to read, the boldest first."""
    if len(fault.who) > 1:
        half = len(fault.who) // 2
        yield replace(fault, who=fault.who[:half])
        yield replace(fault, who=fault.who[half:])
        for peer in fault.who:
            yield replace(fault, who=tuple(p for p in fault.who if p != peer))
    if isinstance(fault.at, Round) or isinstance(fault.until, Round):
        return
    if fault.until is not None and fault.until - fault.at > 1e-3:
        middle = round(fault.at + (fault.until - fault.at) / 2, 6)
        yield replace(fault, until=middle)
    for digits in range(4):
        at = round(fault.at, digits)
        until = None if fault.until is None else round(fault.until, digits)
        if (at, until) != (fault.at, fault.until) and (until is None or until > at):
            yield replace(fault, at=at, until=until)
            return
