"""`shoal show`: the card of one system."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.console import say
from shoal.cli.options import Json, system_names

if TYPE_CHECKING:
    from shoal.lab.card_text import CardText


def command(
    name: Annotated[str, typer.Argument(help="A system.", autocompletion=system_names)],
    cite: Annotated[bool, typer.Option("--cite", help="Print BibTeX and nothing else.")] = False,
    json: Json = False,
) -> None:
    """Show what a system is.

    Where it comes from, its settings, arms and claims.

    Examples:
      shoal show modest
      shoal show monna --cite >> references.bib
    """
    from shoal.base.errors import UsageError
    from shoal.lab.discover import find

    card = find(name)
    if cite:
        if card.source is None:
            raise UsageError(f"{name} is a baseline without a publication of its own")
        say(card.source.bibtex(name))
    elif json:
        _print_json(card)
    else:
        _print(card)


def _print_json(card: CardText) -> None:
    from shoal.cli.console import json_line

    json_line(
        {
            **card.summary(),
            "doc": card.doc,
            "scenario": card.scenario,
            "settings": dict(card.settings),
            "arms": list(card.arms),
            "claims": [vars(claim) for claim in card.claims],
            "deviations": list(card.deviations),
            "file": card.file,
        }
    )


def _print(card: CardText) -> None:
    say(f"{card.name}: {card.title}", "bold")
    say(f"{card.kind} of the family {card.family}")
    if card.source is not None:
        where = f" (arXiv {card.source.arxiv})" if card.source.arxiv else ""
        say(f"{card.source.authors}: {card.source.title}{where}")
    if card.doc:
        say(f"\n{card.doc}")
    _block("settings", [f"{key} = {value}" for key, value in card.settings])
    _block("scenario", [card.scenario] if card.scenario else [])
    _block("arms", list(card.arms))
    claims = []
    for claim in card.claims:
        expected = "" if claim.expected == "holds" else f" (expected: {claim.expected})"
        claims.append(f"{claim.name}: {claim.statement}; {claim.compare} {claim.bound}{expected}")
    _block("claims", claims)
    _block("deviations", list(card.deviations))
    say(f"\nfile: {card.file}")


def _block(head: str, lines: list[str]) -> None:
    if not lines:
        return
    say()
    say(head, "bold")
    for line in lines:
        say(textwrap.fill(line, 96, initial_indent="  ", subsequent_indent="      "))
