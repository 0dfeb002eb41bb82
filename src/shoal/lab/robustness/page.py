"""The page of a robustness matrix: heat maps, tables, what was refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from shoal.lab import plot
from shoal.lab.page_parts import document, figure, header, section, table
from shoal.lab.robustness.text import lying, notes, reasons, summary_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shoal.lab.robustness.matrix import Matrix

BESIDE = 8
"""Columns up to which a heat map can be read beside another one."""

Field = tuple[float, str]
"""A share of 0 to 1, nan for none, and what is written there."""


def page(matrix: Matrix) -> str:
    """The whole page."""
    parts = [_head(matrix)]
    for world in matrix.worlds:
        parts += [_summary(matrix, world), _maps(matrix, world)]
    parts += [_refused(matrix), _reading(matrix)]
    return document(matrix.title, parts)


def _head(matrix: Matrix) -> str:
    def several(count: int, what: str) -> str:
        return f"{count:,} {what}{'s' if count != 1 else ''}"

    peers = sorted(set(matrix.peers.values()))
    facts = [
        " or ".join(f"{count:,}" for count in peers) + " peers",
        several(len(matrix.rules), "rule"), several(len(matrix.attacks), "attack"),
        several(len([share for share in matrix.shares if share]), "share") + " of liars",
        several(len(matrix.seeds), "seed"), matrix.created,
    ]  # fmt: skip
    return header("Robustness", matrix.title, facts)


def _summary(matrix: Matrix, world: str) -> str:
    _, heads, rows = summary_table(matrix, world)
    note = (
        "Accuracy of the honest peers at the end, in percent. Worst case and average are over all "
        "attacks and shares; the best worst case comes first."
    )
    body = [[escape(cell) for cell in row] for row in rows]
    return section(f"{world}: summary", table([*map(escape, heads)], body, "numbers"), note=note)


def _maps(matrix: Matrix, world: str) -> str:
    """A heat map for the worst case, and one for each share."""
    shares = [share for share in matrix.shares if share]
    columns = [lying(matrix, world, share) for share in (0.0, *shares)]
    worst = [[matrix.at_worst(world, rule, s) for s in (0.0, *shares)] for rule in matrix.rules]
    title = f"{world}: worst case over the attacks, by share of liars"
    figures = [figure(heat_map(title, matrix.rules, columns, worst, "liars"), title)]
    for share in shares:
        fields = []
        for rule in matrix.rules:
            entries = [matrix.entry(world, rule, attack, share) for attack in matrix.attacks]
            fields.append([(entry.value, entry.text) for entry in entries])
        title = f"{world}: {lying(matrix, world, share)} of the peers lie"
        drawn = heat_map(title, matrix.rules, matrix.attacks, fields, "attack")
        figures.append(figure(drawn, title, wide=len(matrix.attacks) > BESIDE))
    note = "Accuracy in percent; the darker the better."
    return section(f"{world}: heat maps", f'<div class="pair">{"".join(figures)}</div>', note=note)


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], fields: Sequence[Sequence[Field]],
    x: str,
) -> str:  # fmt: skip
    """A grid of shaded fields with their texts; what has no number is outlined."""

    def draw(drawing: Figure) -> None:
        panel = drawing.subplots()
        for place, line in enumerate(fields):
            for column, (share, text) in enumerate(line):
                panel.add_patch(_patch(column, place, share))
                known = math.isfinite(share)
                panel.text(
                    column, place, text, ha="center", va="center", zorder=4,
                    fontsize=9 if known else 7.5,
                    color=(plot.PAPER if share > 0.6 else plot.INK) if known else plot.MUTED,
                )  # fmt: skip
        slanted = sum(map(len, columns)) > 44
        panel.set_xticks(
            range(len(columns)), columns, rotation=28 if slanted else 0,
            ha="right" if slanted else "center", rotation_mode="anchor" if slanted else None,
        )  # fmt: skip
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(visible=False)
        panel.set_xlabel(x)

    width = max(5.6, 0.62 * len(columns) + 2.0)
    return plot.svg(width, 0.38 * len(rows) + 1.6, draw, title)


def _patch(column: int, row: int, share: float) -> Any:
    from matplotlib.patches import Rectangle

    place, size = (column - 0.47, row - 0.45), (0.94, 0.90)
    if not math.isfinite(share):
        return Rectangle(place, *size, fill=False, edgecolor=plot.GRID, linewidth=1.0, zorder=3)
    shade = 0.06 + 0.89 * min(max(share, 0.0), 1.0)
    return Rectangle(place, *size, facecolor=plot.PALETTE[0], alpha=shade, linewidth=0, zorder=3)


def _refused(matrix: Matrix) -> str:
    rows = [[escape(cell) for cell in row] for row in reasons(matrix)]
    heads = ["rule", "liars", "reason"]
    return section("Refused, or ended in an error", table(heads, rows, "plain") if rows else "")


def _reading(matrix: Matrix) -> str:
    lines = "".join(f"<p>{escape(note)}</p>" for note in notes(matrix))
    facts = "".join(
        f"<span><b>{escape(key.replace('_', ' '))}</b> {escape(str(value))}</span>"
        for key, value in matrix.environment.items()
        if value is not None
    )
    return section("How to read it", lines, f'<p class="environment">{facts}</p>')
