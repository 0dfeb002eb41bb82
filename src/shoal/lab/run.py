"""`run`: one system, strategy or program, in one scenario, with one seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.base.errors import UsageError
from shoal.lab import discover
from shoal.lab import launch as seam
from shoal.lab.card import Arm, System
from shoal.lab.cell import Cell, Launcher, Progress, cell_of, execute
from shoal.lab.scenario import Scenario
from shoal.world.record import Run


def run(
    what: Any,
    scenario: Scenario,
    seed: int | None = None,
    engine: str = "auto",
    progress: Progress | None = None,
    *,
    launcher: Launcher | None = None,
) -> Run:
    """Run something once: the shortest way from an idea to numbers.

    what: a Strategy or Program, a system's name or card, or an `Arm` that names a system with
    other settings. seed: None = the scenario's. engine: "lockstep" (strategies, fastest), "event"
    (virtual time), "live" (sockets of this machine, real time); "auto" is lockstep where it can
    be, else event. The same arguments give the same `Run`, in every process. To compare several
    and get a report, use `Experiment`.

    >>> world = Scenario(peers=4, rounds=2, task="digits", topology="ring")
    >>> found = run("dpsgd", world)
    >>> found.engine, found.messages_delivered, len(found.series("accuracy"))
    ('lockstep', 16, 8)
    """
    if not isinstance(scenario, Scenario):
        raise UsageError(
            f"run: scenario = {scenario!r}; need a Scenario (such as Scenario(peers=8, rounds=10))"
        )
    seed = scenario.seed if seed is None else seed
    if not isinstance(seed, int):
        raise UsageError(f"run: seed = {seed!r}; need a whole number")
    if isinstance(what, System):
        what = what.name
    if isinstance(what, str):
        what = Arm(system=what)
    if isinstance(what, Arm):
        cell = cell_of(what.system or "", what, seed, scenario, engine=engine)
    else:
        cell = Cell("run", seed, replace(scenario, seed=seed), engine=engine, what=what)
    return execute(cell, launcher or seam.launch, progress)


def scenario_of(name: str) -> Scenario:
    """The scenario that a system's card names."""
    card = discover.load(name)
    if isinstance(card.scenario, Scenario):
        return card.scenario
    return discover.scenario(card.scenario)
