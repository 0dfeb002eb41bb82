"""`shoal compare`: several systems on one scenario, or robust rules under attacks."""

from __future__ import annotations

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
    from shoal.lab.robustness import Matrix
    from shoal.lab.scenario import Scenario


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", autocompletion=system_names,
            help="Systems. For a robustness matrix strategies: fedavg (a server) and dpsgd (a "
            "graph) if none is named.",
        ),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option("--scenario", help="family.name, or a .toml file; default: of the first."),
    ] = None,
    aggregators: Annotated[
        str | None,
        typer.Option(
            "--aggregators", metavar="RULE,RULE",
            help="Robustness matrix: these rules (nnm:then=krum for settings), or the usual ones.",
        ),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(
            "--attacks", metavar="ATTACK,ATTACK",
            help="Robustness matrix: these attacks (alie:factor=search), or the usual ones.",
        ),
    ] = None,
    byzantine: Annotated[
        str | None,
        typer.Option(
            "--byzantine", metavar="SHARE,SHARE",
            help="Robustness matrix: these shares of the peers lie; 0.1,0.2,0.3 if not given.",
        ),
    ] = None,
    told: Annotated[
        int | None,
        typer.Option("--told", help="How many liars rules are told of, in place of the truth."),
    ] = None,
    breakdown: Annotated[
        bool,
        typer.Option(
            "--breakdown", help="Find the smallest number of liars that breaks each rule."
        ),
    ] = False,
    below: Annotated[
        float | None,
        typer.Option(
            "--below", metavar="PART",
            help="With --breakdown: a rule is broken below this part of its clean accuracy (0.5).",
        ),
    ] = None,
    seed: Seed = None, seeds: Seeds = 3, peers: Peers = None, engine: Engine = None,
    device: Device = None, settings: Settings = None, values: Grid = None, jobs: Jobs = 1,
    fresh: Fresh = False, out: Out = None, quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Compare systems on one scenario, or rules of aggregation under attacks.

    For each seed all of them see the same data, links and faults. With --aggregators, --attacks or
    --byzantine the outcome is a robustness matrix: every rule under every attack with every share
    of liars, as heat maps, with worst cases, averages, what a rule costs without liars, and with
    --breakdown how many liars it takes to break it. What is stored already is not run again.

    Examples:
      shoal compare fedavg dpsgd gossip --seeds 5
      shoal compare dpsgd modest --scenario training.images_small --set faults='[]'
      shoal compare fedavg dpsgd --grid task.alpha=0.1,1 --jobs 2
      shoal compare fedavg --aggregators median,krum,nnm:then=krum --attacks alie,sign_flip
      shoal compare --aggregators mean,median --byzantine 0.1,0.3 --breakdown --grid lr=0.05,0.1
    """
    from shoal.base.errors import UsageError
    from shoal.cli.console import report_folder, run_and_save, show_report, show_report_json
    from shoal.lab import discover
    from shoal.lab.experiment import Experiment
    from shoal.lab.robustness import BELOW, HOSTS

    robust = any(given is not None for given in (aggregators, attacks, byzantine))
    chosen = names or (list(HOSTS) if robust else [])
    if not chosen:
        raise UsageError("compare: name systems (such as fedavg dpsgd), or give --aggregators")
    if len(set(chosen)) != len(chosen):
        raise UsageError(f"compare {' '.join(chosen)}: a name is given twice (name each once)")
    if not robust and (told is not None or breakdown):
        raise UsageError("compare: --told and --breakdown belong to a matrix (give --aggregators)")
    if below is not None and not breakdown:
        raise UsageError("compare: --below is of use with --breakdown alone (give both)")
    known = [discover.find(name) for name in chosen]
    base = _base(chosen[0], scenario)
    first = base.seed if seed is None else seed
    title = " and ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))
    experiment = Experiment(
        {card.name: card.name for card in known},
        base,
        tuple(range(first, first + (seeds or 3))),
        title=f"Robustness of {title}" if robust else title,
        engine=engine_name(engine),
        overrides=overrides(settings, peers, device),
        grid=grid(values),
    )
    if not robust:
        report, path = run_and_save(
            experiment, jobs=jobs, fresh=fresh, out=out, quiet=quiet, json=json
        )
        (show_report_json if json else show_report)(report, path)
        raise typer.Exit(report.exit_code)

    from shoal.cli.progress import of_ticks, progress
    from shoal.lab.robustness import ATTACKS, RULES, SHARES, make_matrix, parts_named
    from shoal.lab.store import Store

    rules = aggregators.split(",") if aggregators is not None else RULES
    lies = attacks.split(",") if attacks is not None else ATTACKS
    parts = (
        parts_named(rules, "aggregator", "--aggregators"), parts_named(lies, "attack", "--attacks")
    )  # fmt: skip
    with Store() as store, progress("runs", quiet=quiet, json=json) as tell:
        folder = report_folder(out)
        matrix = make_matrix(
            experiment, *parts, SHARES if byzantine is None else _shares(byzantine), told=told,
            below=(BELOW if below is None else below) if breakdown else None, store=store,
            jobs=jobs, progress=of_ticks(tell), fresh=fresh,
        )  # fmt: skip
    path = matrix.save(folder)
    _show(matrix, str(path), json)
    raise typer.Exit(matrix.exit_code)


def _base(name: str, scenario: str | None) -> Scenario:
    """The scenario of the first system, a named one, or that of a file."""
    from shoal.lab import discover
    from shoal.lab.run import scenario_of
    from shoal.lab.scenario import Scenario
    from shoal.lab.toml_file import load_toml

    if scenario is None:
        return scenario_of(name)
    if not scenario.endswith(".toml"):
        return discover.scenario(scenario)
    file = load_toml(scenario)
    skip = ("arms", "seeds", "title", "system", "base")
    base = Scenario() if "base" not in file.data else discover.scenario(file.data["base"])
    data = {key: value for key, value in file.data.items() if key not in skip}
    return base.with_settings(data, file.where)


def _shares(text: str) -> tuple[float, ...]:
    from shoal.base.errors import UsageError

    try:
        return tuple(float(piece) for piece in text.split(","))
    except ValueError:
        raise UsageError(f"--byzantine {text}; need shares, such as 0.1,0.2 (0.2 is 20%)") from None


def _show(matrix: Matrix, path: str, json: bool) -> None:
    """Every field as a line of JSON; or the summary and the worst cases as tables."""
    from shoal.cli.console import json_line, say, table
    from shoal.lab.robustness.text import reasons, summary_table, worst_table

    if json:
        for record in matrix.records():
            json_line(record)
        json_line({"report": path, "title": matrix.title})
        return
    for world in matrix.worlds:
        for title, heads, rows in (summary_table(matrix, world), worst_table(matrix, world)):
            say(f"{world}: {title[0].lower()}{title[1:]}", "bold")
            table(heads, rows)
            say()
    for what, shares, reason in reasons(matrix):
        say(f"{what} at {shares}: {reason}", "dim")
    say(f"\nreport: {path}")
