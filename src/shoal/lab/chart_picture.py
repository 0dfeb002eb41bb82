"""Draws the charts of cards: curves, bars, grids of shares, and spans of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.lab import plot
from shoal.lab.chart import Drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def svg(drawn: Drawn) -> str:
    """The picture; empty when there is nothing to draw."""
    if not any(drawn.lines.values()):
        return ""
    draw = {
        "curves": _curves, "points": _curves, "bars": _bars, "grid": _grid, "spans": _spans,
    }[drawn.kind]  # fmt: skip
    rows = len(drawn.lines) if drawn.kind in ("grid", "spans") else 0
    height = max(3.4, 0.5 * rows + 1.4)
    return plot.svg(7.6, height, lambda figure: draw(drawn, figure), drawn.title)


def _curves(drawn: Drawn, figure: Figure) -> None:
    panel = figure.subplots()
    # What holds until it changes goes in steps; what was measured here and there is marked.
    style: dict[str, Any] = (
        {"drawstyle": "steps-post"} if drawn.kind == "curves" else {"marker": "o"}
    )
    for name, look in plot.looks(tuple(drawn.lines)).items():
        x, y = zip(*drawn.lines[name], strict=True)
        panel.plot(x, y, color=look.color, linestyle=look.dash, label=name, zorder=3, **style)
    _named(drawn, panel)


def _bars(drawn: Drawn, figure: Figure) -> None:
    panel = figure.subplots()
    places = sorted({x for points in drawn.lines.values() for x, _ in points})
    width = 0.8 / len(drawn.lines)
    for number, (name, look) in enumerate(plot.looks(tuple(drawn.lines)).items()):
        at = [places.index(x) + (number - (len(drawn.lines) - 1) / 2) * width
              for x, _ in drawn.lines[name]]  # fmt: skip
        heights = [y for _, y in drawn.lines[name]]
        panel.bar(at, heights, 0.92 * width, color=look.color, label=name, zorder=3)
    panel.set_xticks(range(len(places)), [f"{x:g}" if isinstance(x, float) else str(x)
                                          for x in places])  # fmt: skip
    panel.grid(axis="x", visible=False)
    _named(drawn, panel)


def _named(drawn: Drawn, panel: Any) -> None:
    panel.set_xlabel(drawn.x)
    panel.set_ylabel(drawn.y)
    panel.set_ylim(bottom=0)
    if len(drawn.lines) > 1:
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _grid(drawn: Drawn, figure: Figure) -> None:
    panel = figure.subplots()
    columns = list(dict.fromkeys(x for points in drawn.lines.values() for x, _ in points))
    color = plot.PALETTE[0]
    for place, points in enumerate(drawn.lines.values()):
        for name, share in points:
            column = columns.index(name)
            panel.add_patch(_cell(column, place, color, share))
            panel.text(
                column, place, f"{100 * share:.4g}%", ha="center", va="center",
                color=plot.PAPER if share > 0.6 else plot.INK, zorder=4,
            )  # fmt: skip
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(drawn.lines)), list(drawn.lines))
    panel.set_xlim(-0.5, len(columns) - 0.5)
    panel.set_ylim(len(drawn.lines) - 0.5, -0.5)
    panel.grid(visible=False)
    panel.set_xlabel(drawn.x)
    panel.set_ylabel(drawn.y)


def _spans(drawn: Drawn, figure: Figure) -> None:
    panel = figure.subplots()
    for place, points in enumerate(drawn.lines.values()):
        widths = [(begin, end - begin) for begin, end in points]
        # The edge tells a span from one that follows at once.
        panel.broken_barh(
            widths, (place - 0.36, 0.72), facecolor=plot.PALETTE[0], edgecolor=plot.PAPER,
            linewidth=0.8, zorder=3,
        )  # fmt: skip
    panel.set_yticks(range(len(drawn.lines)), list(drawn.lines))
    panel.set_ylim(len(drawn.lines) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.grid(axis="y", visible=False)
    panel.set_xlabel(drawn.x)
    panel.set_ylabel(drawn.y)


def _cell(column: int, row: int, color: str, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.47, row - 0.46), 0.94, 0.92, facecolor=color, alpha=0.08 + 0.87 * share,
        linewidth=0, zorder=3,
    )  # fmt: skip
