"""`shoal leaderboard`: methods in the same worlds, at equal bytes and at equal time."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.options import AllCores, Json, Out, Quiet, Settings, overrides, system_names


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Systems; the usual ones if none is named. The first one "
            "sets the bytes and the time.", autocompletion=system_names,
        ),
    ] = None,
    world: Annotated[
        list[str] | None,
        typer.Option("--world", help="A world, such as 'Dirichlet 0.1'; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds.")] = 3,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="Choose learning rates from a small grid.")
    ] = True,
    settings: Settings = None, jobs: AllCores = None, out: Out = None, quiet: Quiet = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Rank methods of learning in eight worlds.

    Equal and unequal data, crashes, stragglers, slow uplinks, a sparse graph, wrong labels: each
    method's accuracy when all have sent as many bytes, and when all have had as much virtual time.
    Runs that are stored already are not repeated.

    Examples:
      shoal leaderboard
      shoal leaderboard fedavg scaffold dpsgd --world 'two classes' --seeds 5
      shoal leaderboard --set rounds=20 --no-tune
    """
    import os
    import sys

    from shoal.cli.console import report_folder, say
    from shoal.cli.progress import of_ticks, progress
    from shoal.lab.leaderboard import METHODS, WORLDS, make_board
    from shoal.lab.store import Store

    with Store() as store, progress("runs", quiet=quiet, json=json) as tell:
        folder = report_folder(out)
        board = make_board(
            names or METHODS, world or tuple(WORLDS), seeds=seeds,
            changes=overrides(settings, None, None), tuned=tune, store=store,
            jobs=jobs or os.cpu_count() or 1, progress=of_ticks(tell),
        )  # fmt: skip
    path = board.save(folder)
    if json:
        sys.stdout.write(board.to_json() + "\n")
    else:
        say(board.markdown())
        say(f"Page: {path}")
