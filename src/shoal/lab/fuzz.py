"""Fault fuzzing of a catalogue entry: its smallest world, and what every run must keep."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from shoal.base.errors import ShoalError, UsageError
from shoal.lab import discover
from shoal.lab.card import Arm
from shoal.lab.cell import Cell, cell_of, make
from shoal.lab.explore import (
    Exploration,
    Invariant,
    Plan,
    Problem,
    Trial,
    Tried,
    attempt,
    explore,
    replay,
)  # fmt: skip
from shoal.lab.jobs import workers
from shoal.lab.launch import program_of
from shoal.lab.run import scenario_of
from shoal.lab.scenario import Part, Scenario
from shoal.world.network import Network
from shoal.world.record import Run

PEERS = 10
ROUNDS = 8
PATIENCE = 300
"""A run hangs when it takes this many times as long as one without faults: `slow` goes to 100."""

ON_THE_WAY = ("lost", "dead", "partition", "corrupt")


@dataclass(frozen=True)
class Target:
    """A system as fuzzing runs it."""

    name: str
    program: Any
    network: Network
    horizon_s: float
    invariants: tuple[Invariant, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def explore(
        self, seeds: int, first_seed: int = 0,
        progress: Callable[[int, int], None] | None = None, *, jobs: int = 1,
    ) -> Exploration:  # fmt: skip
        """Search for fault lists that break it, in `jobs` processes.

        What is found, and in which order, does not depend on `jobs`. A script that asks for more
        than one needs the usual `if __name__ == "__main__"`.
        """
        if jobs < 1:
            raise UsageError(f"jobs = {jobs}; need at least 1")
        jobs = min(jobs, seeds)

        def spread(plan: Plan, numbers: Sequence[int]) -> Generator[Tried]:
            return _in_processes(self.name, self.overrides, plan, numbers, jobs)

        return explore(
            lambda: self.program, self.network, seeds=seeds, first_seed=first_seed,
            horizon_s=self.horizon_s, invariants=self.invariants, progress=progress,
            spread=spread if jobs > 1 else None,
        )  # fmt: skip

    def replay(self, failure: Mapping[str, Any]) -> Problem | None:
        """Run a failure of an exploration again: its problem, or None when it is gone."""
        return replay(
            lambda: self.program, self.network, failure, horizon_s=self.horizon_s,
            invariants=self.invariants,
        )  # fmt: skip


def target(name: str, overrides: Mapping[str, Any] | None = None) -> Target:
    """A system of the catalogue in its own scenario, shrunk to a few peers and rounds.

    Settings in `overrides` stay as they are given. The faults of the scenario are left out.
    Invariants: those below, and the tuple `INVARIANTS` of the system's module if it has one.
    """
    card = discover.load(name)
    if card.kind == "study":
        raise UsageError(
            f"explore {name}: a study runs worlds of its own (explore what it studies)"
        )
    what, scenario = _made(smallest(name, overrides))
    program, network = program_of(what, scenario, scenario.seed)
    quiet = _quiet(program, network)
    module = discover.module_of(discover.find(name))
    falling = () if card.kind == "program" else (rounds_do_not_fall,)
    # Who waits for the dead for as long as it says does not hang.
    waits_s = getattr(program, "gives_up_s", 0.0)
    return Target(
        name, program, network, PATIENCE * max(quiet.virtual_s, 1.0) + waits_s,
        (*INVARIANTS, *falling, *getattr(module, "INVARIANTS", ())), dict(overrides or {}),
    )  # fmt: skip


def _in_processes(
    name: str, overrides: Mapping[str, Any], plan: Plan, seeds: Sequence[int], jobs: int
) -> Generator[Tried]:
    """The seeds spread over processes, in their order; closing it ends the processes."""
    # A system's module need not be importable by name in another process (SHOAL_SYSTEMS), so
    # that what travels is how to make the target, not the target.
    recipe = pickle.dumps((name, dict(overrides)))
    with workers(jobs) as pool:
        waiting = [pool.submit(_attempt, recipe, plan, seed) for seed in seeds]
        for seed, future in zip(seeds, waiting, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                raise ShoalError(
                    f"a worker process died at fault list {seed} of {name} or one near it (out "
                    "of memory? lower --jobs)"
                ) from None


def _attempt(recipe: bytes, plan: Plan, seed: int) -> Tried:
    """In the worker."""
    aim = _made_again(recipe)
    trial = Trial(lambda: aim.program, aim.network, aim.horizon_s, aim.invariants)
    return attempt(trial, plan, seed)


@lru_cache(maxsize=1)
def _made_again(recipe: bytes) -> Target:
    return target(*pickle.loads(recipe))


def smallest(name: str, overrides: Mapping[str, Any] | None = None) -> Cell:
    """A system of the catalogue in its own scenario, shrunk and without faults, as a cell.

    Settings in `overrides` stay as they are given.
    """
    given = dict(overrides or {})
    cell = cell_of(name, Arm(system=name), 0, scenario_of(name), overrides=given)
    return replace(cell, scenario=_smallest(cell.scenario, given))


def _made(cell: Cell) -> tuple[Any, Scenario]:
    made = make(cell)
    assert not isinstance(made, Run)
    return made


def _smallest(scenario: Scenario, given: Mapping[str, Any]) -> Scenario:
    changes: dict[str, Any] = {"faults": [], "peers": min(scenario.peers, PEERS)}
    changes["rounds"] = min(scenario.rounds or ROUNDS, ROUNDS)
    changes["eval_every"] = 1
    changes["byzantine"] = 0
    if scenario.byzantine:
        share = len(scenario.byzantine_peers()) / scenario.peers
        changes["byzantine"] = max(1, int(share * changes["peers"]))
    task = scenario.task
    if isinstance(task, Part) and (holders := dict(task.settings).get("holders")):
        changes["task.holders"] = [peer for peer in holders if peer < changes["peers"]]
    topology = scenario.topology
    if isinstance(topology, Part) and dict(topology.settings).get("degree", 0) > 4:
        changes["topology.degree"] = 4
    return scenario.with_settings({k: v for k, v in changes.items() if k not in given})


def _quiet(program: Any, network: Network) -> Run:
    from shoal.engine.event import EventSettings, simulate

    return simulate(program, network, seed=0, settings=EventSettings(events=1_000_000))


# Invariants of every run, whatever the method.


def messages_are_conserved(run: Run) -> str | None:
    """What was sent was delivered, dropped on the way for a known reason, or is in flight."""
    dropped = sum(run.dropped.get(reason, 0) for reason in ON_THE_WAY)
    accounted = run.messages_delivered + dropped + run.messages_in_flight
    if run.messages_sent != accounted:
        return f"{run.messages_sent} messages sent, {accounted} accounted for"
    if sum(run.bytes_received) > sum(run.bytes_sent):
        return f"{sum(run.bytes_received)} bytes received of {sum(run.bytes_sent)} sent"
    return None


def nothing_is_negative(run: Run) -> str | None:
    """Counters and times are at least 0."""
    counts = {
        "messages_sent": run.messages_sent, "messages_delivered": run.messages_delivered,
        "messages_in_flight": run.messages_in_flight, "virtual_s": run.virtual_s,
        "bytes_sent": min(run.bytes_sent, default=0),
        "bytes_received": min(run.bytes_received, default=0), **run.dropped,
    }  # fmt: skip
    below = {name: value for name, value in counts.items() if value < 0}
    return f"below zero: {below}" if below else None


def numbers_are_finite(run: Run) -> str | None:
    """Recorded values and final parameters hold no infinity and no NaN."""
    for row in run.rows:
        if not math.isfinite(row.value):
            return f"{row.name} of peer {row.peer} is {row.value} at {row.time_s} s"
    for peer, params in run.final.items():
        if not bool(params.isfinite().all()):
            return f"parameters of peer {peer} are not finite"
    return None


def rounds_do_not_fall(run: Run) -> str | None:
    """A peer that never restarted records rounds in rising order."""
    restarted = {peer for mark in run.happenings for peer in mark.peers}
    last: dict[tuple[str, int], int] = {}
    for row in run.rows:
        if row.peer < 0 or row.round < 0 or row.peer in restarted:
            continue
        before = last.get((row.name, row.peer), -1)
        if row.round < before:
            return f"{row.name} of peer {row.peer}: round {row.round} after {before}"
        last[row.name, row.peer] = row.round
    return None


INVARIANTS: tuple[Invariant, ...] = (
    messages_are_conserved, nothing_is_negative, numbers_are_finite,
)  # fmt: skip
