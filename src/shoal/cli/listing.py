"""What `shoal list` prints. Apart from its command so that it loads without the option parser."""

from __future__ import annotations

from shoal.cli.console import json_line, say, table
from shoal.lab.discover import cards


def print_list(family: str | None, json: bool) -> None:
    """Every system of the catalogue, or of one family: a table, or an object a line."""
    found = cards(family)
    if json:
        for card in found:
            json_line(card.summary())
        return
    if not found:
        say("the catalogue is empty")
        return
    rows, last = [], ""
    for card in found:
        rows.append(("" if card.family == last else card.family, card.name, card.kind, card.title))
        last = card.family
    table(("family", "name", "kind", "title"), rows)
