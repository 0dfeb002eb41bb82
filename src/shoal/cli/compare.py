"""`shoal compare`: several systems on one scenario."""

from __future__ import annotations

from typing import Annotated

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


def command(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Systems.", autocompletion=system_names)
    ],
    scenario: Annotated[
        str | None,
        typer.Option("--scenario", help="family.name, or a .toml file; default: of the first."),
    ] = None,
    seed: Seed = None, seeds: Seeds = 3, peers: Peers = None, engine: Engine = None,
    device: Device = None, settings: Settings = None, values: Grid = None, jobs: Jobs = 1,
    fresh: Fresh = False, out: Out = None, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Compare systems on one scenario.

    For each seed all of them see the same data, links and faults.

    Examples:
      shoal compare fedavg dpsgd gossip --seeds 5
      shoal compare dpsgd modest --scenario training.images_small --set faults='[]'
      shoal compare fedavg dpsgd --grid task.alpha=0.1,1 --jobs 2
    """
    from shoal.base.errors import UsageError
    from shoal.cli.console import run_and_save, show_report, show_report_json
    from shoal.lab import discover
    from shoal.lab.experiment import Experiment
    from shoal.lab.run import scenario_of
    from shoal.lab.scenario import Scenario
    from shoal.lab.toml_file import load_toml

    if len(set(names)) != len(names):
        raise UsageError(f"compare {' '.join(names)}: a name is given twice (name each once)")
    known = [discover.find(name) for name in names]
    if scenario is None:
        base = scenario_of(names[0])
    elif scenario.endswith(".toml"):
        file = load_toml(scenario)
        skip = ("arms", "seeds", "title", "system", "base")
        base = Scenario() if "base" not in file.data else discover.scenario(file.data["base"])
        data = {key: value for key, value in file.data.items() if key not in skip}
        base = base.with_settings(data, file.where)
    else:
        base = discover.scenario(scenario)
    first = base.seed if seed is None else seed
    experiment = Experiment(
        {card.name: card.name for card in known},
        base,
        tuple(range(first, first + (seeds or 3))),
        title=" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])),
        engine=engine_name(engine),
        overrides=overrides(settings, peers, device),
        grid=grid(values),
    )
    report, path = run_and_save(experiment, jobs=jobs, fresh=fresh, out=out, quiet=quiet, json=json)
    (show_report_json if json else show_report)(report, path)
    raise typer.Exit(report.exit_code)
