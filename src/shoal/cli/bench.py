"""`shoal bench`: speed and memory on this machine, against their bounds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.options import Json, Quiet

if TYPE_CHECKING:
    from shoal.cli.progress import Tell
    from shoal.lab.bench import Row

_NAME, _WIDE = 10, 200


def _names() -> list[str]:
    """For shell completion."""
    from shoal.lab.bench import names

    return list(names())


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Benches; all of them if none is named.",
            autocompletion=_names,
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="The smallest sizes: does everything run? Judges nothing."),
    ] = False,
    quiet: Quiet = False, json: Json = False,
) -> None:  # fmt: skip
    """Measure speed and memory on this machine.

    Each bench runs by itself in a process with one thread. Times are medians of runs that take
    turns; for figures worth keeping, leave the machine alone meanwhile. Exit code 0: every bound
    holds; 1: one does not, or a bench broke down; 2: misuse.

    Examples:
      shoal bench
      shoal bench kernel star-mlp
      shoal bench --tiny
      shoal bench --json > bench.jsonl
    """
    from shoal.base.errors import ShoalError
    from shoal.cli.console import explain, json_line
    from shoal.cli.progress import progress
    from shoal.lab import bench

    chosen = list(dict.fromkeys(names or bench.names()))
    titles = {name: bench.title(name) for name in chosen}
    code = 0
    for place, name in enumerate(chosen):
        rows: list[Row] = []
        try:
            with progress("benches", quiet=quiet, json=json) as tell:
                note = _noting(tell, name, place, len(chosen))
                for row in bench.run(name, tiny=tiny, note=note):
                    rows.append(row)
                    if json:
                        json_line(row.to_json())
        except ShoalError as error:
            # The other benches have answers of their own.
            code = max(code, explain(error))
        if any(row.holds is False for row in rows):
            code = 1
        if not json:
            _show(titles[name], rows)
    raise typer.Exit(code)


def _noting(tell: Tell | None, name: str, place: int, total: int) -> Callable[[str], None] | None:
    if tell is None:
        return None
    tell(place, total, name)
    return lambda text: tell(place, total, f"{name}: {text}")


def _show(title: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", overflow="fold", min_width=_NAME)
    for head in ("value", "unit", "against", "its value", "ratio", "bound", ""):
        right = head in ("value", "its value", "ratio")
        table.add_column(
            head, justify="right" if right else "left", overflow="fold",
            no_wrap=head not in ("unit", "against"), min_width=None if head else 5,
        )  # fmt: skip
    verdicts = {True: "[green]holds[/]", False: "[bold red]fails[/]", None: ""}
    for row in rows:
        table.add_row(
            # What others' errors say may look like markup.
            escape(row.name), _number(row.value), row.unit, escape(row.reference or ""),
            _number(row.reference_value), _number(row.ratio), row.bound or "", verdicts[row.holds],
        )  # fmt: skip
    # A file or a pipe has no width of its own: rows stay whole there.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
    console.print(table)
    console.print()


def _number(value: float | None) -> str:
    """Three significant digits, thousands apart."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
