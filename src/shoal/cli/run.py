"""`shoal run`: a scenario file, or one system on its own scenario."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.options import (
    Device,
    Engine,
    Fresh,
    Grid,
    Jobs,
    Json,
    Out,
    Peers,
    Quiet,
    Seed,
    Seeds,
    Settings,
    engine_name,
    grid,
    overrides,
    system_names,
)  # fmt: skip

if TYPE_CHECKING:
    from shoal.lab.experiment import Experiment


def command(
    what: Annotated[
        str, typer.Argument(metavar="FILE_OR_NAME", help="A .toml file, or a system's name.",
                            autocompletion=system_names),
    ],
    seed: Seed = None, seeds: Seeds = None, peers: Peers = None, engine: Engine = None,
    device: Device = None, settings: Settings = None, values: Grid = None, jobs: Jobs = 1,
    fresh: Fresh = False, out: Out = None, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Run a scenario file or one system.

    A system runs on the scenario of its card. The report is written as HTML, JSON, Markdown and
    CSV. Runs that are stored already are not repeated.

    Examples:
      shoal run examples/first_comparison.toml
      shoal run dpsgd --peers 200 --set topology=ring --set lr=0.05
      shoal run fedavg --grid lr=0.01,0.1 --seeds 3 --jobs 2
    """
    from shoal.cli.console import run_and_save, show_report, show_report_json

    experiment = experiment_of(what)
    if engine is not None:
        experiment.engine = engine_name(engine)
    experiment.overrides = overrides(settings, peers, device)
    experiment.grid = grid(values)
    _set_seeds(experiment, seed, seeds)
    report, path = run_and_save(experiment, jobs=jobs, fresh=fresh, out=out, quiet=quiet, json=json)
    (show_report_json if json else show_report)(report, path)
    raise typer.Exit(report.exit_code)


def experiment_of(what: str) -> Experiment:
    """What a file or a system's card describes."""
    from shoal.lab.card import Arm
    from shoal.lab.discover import load
    from shoal.lab.experiment import Experiment
    from shoal.lab.run import scenario_of

    if what.endswith(".toml") or Path(what).is_file():
        return Experiment.load(what)
    card = load(what)
    arms = {what: Arm(system=what)} if card.make is not None else card.all_arms()
    # No budget: this is no reproduction, whose report it must not take the place of.
    return Experiment(arms, scenario_of(what), title=card.title, system=what, budget="")


def _set_seeds(experiment: Experiment, seed: int | None, seeds: int | None) -> None:
    """--seed is the first one; --seeds how many there are."""
    before = experiment.seed_list()
    first = before[0] if seed is None else seed
    if seed is not None or seeds is not None:
        experiment.seeds = tuple(range(first, first + (seeds or len(before))))
