"""`shoal list`: every system of the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.options import Json, families


def command(
    family: Annotated[
        str | None,
        typer.Option("--family", help="Only this family.", autocompletion=families),
    ] = None,
    json: Json = False,
) -> None:
    """List the systems of the catalogue.

    Examples:
      shoal list
      shoal list --family robust
      shoal list --json | jq -r .name
    """
    from shoal.cli.listing import print_list

    print_list(family, json)
