"""`shoal replay`: run a report again and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import Json


def command(
    report: Annotated[Path, typer.Argument(help="A report: its .json, or a file beside it.")],
    arm: Annotated[str | None, typer.Option("--arm", help="Only this arm.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Only this seed.")] = None,
    json: Json = False,
) -> None:
    """Run a report again and compare.

    The numbers must be the same.

    Exit code 0: all are; 1: one differs, with what differs.

    Examples:
      shoal replay .shoal/reports/modest-small.json
      shoal replay .shoal/reports/modest-small.html --arm modest --seed 3
    """
    from shoal.cli.console import json_line, say
    from shoal.lab.replay import code_changed, replay
    from shoal.lab.report import Report

    loaded = Report.load(report)
    if code_changed(loaded) and not json:
        say("note: the code has changed since this report", "yellow", error=True)
    same = True
    for found in replay(loaded, arm=arm, seed=seed):
        same &= found.same
        if json:
            json_line(
                {
                    "arm": found.arm, "seed": found.seed, "same": found.same,
                    "differences": list(found.differences),
                }
            )  # fmt: skip
        else:
            typer.echo(f"{found.arm}, seed {found.seed}: {'same' if found.same else 'DIFFERS'}")
            for difference in found.differences:
                typer.echo(f"  {difference}")
    raise typer.Exit(0 if same else 1)
