"""What pages are made of: a document that loads nothing, sections, tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shoal.lab.page_style import STYLE


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of finished HTML parts; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def header(over: str, title: str, facts: Sequence[str]) -> str:
    """The head of a page: what it is, its title, and facts; empty facts are left out."""
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts if fact)
    return (
        f'<header><p class="over">{escape(over)}</p><h1>{escape(title)}</h1>'
        f'<ul class="facts">{items}</ul></header>'
    )


def section(title: str, *content: str, note: str = "") -> str:
    """A titled section of finished HTML; nothing when there is no content."""
    inside = "\n".join(filter(None, content))
    if not inside:
        return ""
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}\n{inside}</section>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of finished HTML cells; it scrolls by itself when it is too wide."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(picture: str, caption: str = "", *, wide: bool = False) -> str:
    """A picture with a caption; nothing when there is no picture. wide: alone in its row."""
    if not picture:
        return ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{picture}{text}</figure>"
