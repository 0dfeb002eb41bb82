"""`shoal data`: which data sets are here, and how to get the others."""

from __future__ import annotations

from shoal.cli.options import Json


def command(json: Json = False) -> None:
    """Show which data sets are installed.

    Also how to get the others.

    Examples:
      shoal data
      shoal data --json
    """
    from shoal.cli.console import json_line, table
    from shoal.lab.data_sets import DATA_SETS

    if json:
        for each in DATA_SETS:
            json_line({**vars(each), "installed": each.installed()})
        return
    rows = [
        (
            each.task, "yes" if each.installed() else "no", each.content, each.size, each.licence,
            "" if each.installed() else each.get,
        )
        for each in DATA_SETS
    ]  # fmt: skip
    table(("task", "installed", "content", "size", "licence", "how to get it"), rows)
