"""`shoal reproduce`: the claims of systems, measured and judged."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.options import (
    AllCores,
    Device,
    Engine,
    Fresh,
    Json,
    Out,
    Peers,
    Quiet,
    Seed,
    Settings,
    engine_name,
    overrides,
    system_names,
)  # fmt: skip

if TYPE_CHECKING:
    from shoal.lab.judge import Verdict


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Systems.", autocompletion=system_names),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every system with claims.")] = False,
    budget: Annotated[str, typer.Option("--budget", help="small or full.")] = "small",
    seed: Seed = None, peers: Peers = None, engine: Engine = None, device: Device = None,
    settings: Settings = None, jobs: AllCores = None, fresh: Fresh = False, out: Out = None,
    quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Measure the claims of systems and judge them.

    Exit code 0: no claim fails or is inconclusive; 1: one is; 2: misuse.

    Examples:
      shoal reproduce modest
      shoal reproduce monna fedzip --budget full --jobs 2
      shoal reproduce --all --json > verdicts.jsonl
    """
    from shoal.base.errors import UsageError
    from shoal.base.stopwatch import Stopwatch
    from shoal.cli.console import json_line, run_and_save, say, show_report
    from shoal.lab import discover
    from shoal.lab.experiment import Experiment
    from shoal.lab.values import near

    if budget not in ("small", "full"):
        raise UsageError(f"--budget {budget}; {near(budget, ('small', 'full'))}")
    if everything == bool(names):
        raise UsageError("reproduce: name systems, or give --all (one of the two)")
    if everything:
        names = [card.name for card in discover.cards() if card.claims]
    chosen = list(dict.fromkeys(names or []))
    for name in chosen:
        # A misspelt last name must not be found out after an hour of running the others.
        discover.find(name)
    code = 0
    for name in chosen:
        watch = Stopwatch()
        experiment = Experiment.of_system(
            name, budget, seed=seed, engine=engine_name(engine),
            overrides=overrides(settings, peers, device),
        )  # fmt: skip
        report, path = run_and_save(
            experiment, jobs=jobs or os.cpu_count() or 1, fresh=fresh, out=out, quiet=quiet,
            json=json,
        )  # fmt: skip
        code = max(code, report.exit_code)
        if json:
            json_line(
                {
                    "system": name,
                    "budget": budget,
                    "seconds": round(watch.wall_s, 3),
                    "report": str(path),
                    "claims": [_claim(verdict) for verdict in report.verdicts],
                }
            )
        else:
            show_report(report, path)
            if not report.verdicts:
                say(f"{name} has no claims of its own: nothing is judged", error=True)
    raise typer.Exit(code)


def _claim(verdict: Verdict) -> dict[str, Any]:
    interval = verdict.interval
    return {
        "name": verdict.name,
        "measured": verdict.measured,
        "interval": [interval.low, interval.high] if interval else None,
        "bound": verdict.bound,
        "verdict": verdict.verdict,
        "clear": verdict.clear,
        "expected": verdict.expected,
    }
