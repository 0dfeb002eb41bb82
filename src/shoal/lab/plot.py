"""Plots of a report as inline SVG, drawn with matplotlib's objects (no pyplot, no global figure).

Colours are the page's CSS variables, so that the same picture suits light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.lab.report_data import CellResult
from shoal.lab.statistics import median
from shoal.lab.text import label, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shoal.lab.card import Plot
    from shoal.lab.report import Report

# Okabe and Ito 2008, ordered so that neighbours differ in lightness, too; yellow is left out since
# it vanishes on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a6ff0", "#6b6f76")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
# Stand-ins that become CSS variables in the finished SVG.
INK, MUTED, GRID, PAPER = "#31343a", "#6c7078", "#e3e5e8", "#fdfdfe"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--card)"}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "shoal", "font.size": 9.5,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "axes.unicode_minus": True,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.9, "axes.titlesize": 10,
    "lines.solid_capstyle": "round", "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every picture."""

    color: str
    dash: Any


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """A colour per arm; from the ninth on, another dash, too."""
    size = len(PALETTE)
    return {
        arm: Look(PALETTE[i % size], DASHES[(i // size) % len(DASHES)])
        for i, arm in enumerate(arms)
    }


def svg(width: float, height: float, draw: Callable[[Figure], None], title: str) -> str:
    """Run `draw` on a figure of that size in inches and return it as inline SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # rc_context restores what it changes; figures take their styles from it at construction.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0.0)
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), title)


_count = re.compile(r"(id=\"|url\(#|href=\"#)")


def _inline(text: str, title: str) -> str:
    """Only the <svg> element, with ids of its own, CSS variables, no namespaces and no metadata."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    text = _count.sub(lambda match: f"{match[0]}{prefix}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r"font: ([^;\"]*)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()


def merge(curves: Iterable[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several seeds on one axis: (x [n], y [seeds, n]), linear between points.

    x is the union of all x up to the end of the shortest curve, thinned to 240 points.
    """
    clean = [sorted((x, y) for x, y in c if math.isfinite(x)) for c in curves]
    clean = [c for c in clean if c]
    if not clean:
        return np.empty(0), np.empty((0, 0))
    start, end = max(c[0][0] for c in clean), min(c[-1][0] for c in clean)
    x = np.array(sorted({p[0] for c in clean for p in c if start <= p[0] <= end}))
    if not x.size:
        x = np.array([start])
    if x.size > 240:
        x = np.unique(np.concatenate((np.linspace(x[0], x[-1], 240), x[[0, -1]])))
    y = np.stack([np.interp(x, [p[0] for p in c], [p[1] for p in c]) for c in clean])
    return x, y


def points(cell: CellResult, metric: str, axis: str) -> list[tuple[float, float]]:
    """(x, value) of a metric over `time`, `bytes` or `round`; empty when the axis is unknown."""
    curve = cell.curves.get(metric, [])
    if axis == "time":
        return [(time_s, value) for time_s, _, value in curve]
    if axis == "round":
        return [(float(round), value) for _, round, value in curve if round >= 0]
    sent = cell.curves.get("bytes_sent", [])
    if not sent:
        return []
    times, totals = [p[0] for p in sent], [p[2] for p in sent]
    return [(float(np.interp(time_s, times, totals)), value) for time_s, _, value in curve]


def progress(report: Report, metric: str) -> str:
    """A metric over virtual time, over bytes and over rounds, as far as each is known."""
    chosen = looks(report.arms)
    data: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for axis in ("time", "bytes", "round"):
        for arm in report.arms:
            cells = [cell for cell in report.cells if cell.arm == arm]
            x, y = merge(points(cell, metric, axis) for cell in cells)
            if x.size > 1:
                data.setdefault(axis, {})[arm] = (x, y)
    if not data:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
        for panel, (axis, arms) in zip(axes, data.items(), strict=True):
            for arm, (x, y) in arms.items():
                _line(panel, x, y, chosen[arm])
            _axis(panel, axis, max(float(x[-1]) for x, _ in arms.values()))
            if axis in ("time", "round"):
                _fault_marks(panel, report, axis)
        axes[0].set_ylabel(label(metric))

    return svg(3.7 * len(data) + 0.4, 3.0, draw, f"{label(metric)} over time, bytes and rounds")


def against(report: Report, wanted: Plot) -> str:
    """A metric's last value over a number in which arms differ, a line per entry of the plot."""
    chosen = looks(tuple(wanted.lines))
    values: dict[str, dict[int, float]] = {}
    for arm, seed, metric, value in report.rows():
        if metric == wanted.metric and math.isfinite(value):
            values.setdefault(arm, {})[seed] = value
    data: dict[str, tuple[list[float], list[list[float]]]] = {}
    for name, points in wanted.lines.items():
        known = sorted((x, list(values[arm].values())) for x, arm in points if arm in values)
        if len(known) > 1:
            data[name] = ([x for x, _ in known], [each for _, each in known])
    if not data:
        return ""

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        for name, (x, seeds) in data.items():
            look = chosen[name]
            panel.plot(
                x, [median(each) for each in seeds], color=look.color, linestyle=look.dash,
                marker="o", markersize=4, label=name, zorder=3,
            )  # fmt: skip
            low, high = [min(each) for each in seeds], [max(each) for each in seeds]
            panel.fill_between(x, low, high, color=look.color, alpha=0.12, linewidth=0)
        panel.set_xlabel(wanted.over)
        panel.set_ylabel(label(wanted.metric))
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return svg(7.6, 3.4, draw, wanted.title)


def _line(panel: Axes, x: np.ndarray, y: np.ndarray, look: Look) -> None:
    middle = np.array([median(column) for column in y.T])
    panel.plot(x, middle, color=look.color, linestyle=look.dash, zorder=3)
    if len(y) > 1:
        panel.fill_between(x, y.min(0), y.max(0), color=look.color, alpha=0.16, linewidth=0)


def _axis(panel: Axes, axis: str, end: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if axis == "bytes":
        panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v, "bytes")))
        panel.set_xlabel("bytes sent by all peers")
    elif axis == "round":
        panel.set_xlabel("round")
    else:
        size, unit = _time_unit(end)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / size:.4g}"))
        panel.set_xlabel(f"virtual time, {unit}")
        places = MaxNLocator(5).tick_values(0.0, end / size) if end > 0 else [0.0]
        panel.xaxis.set_major_locator(FixedLocator([size * place for place in places]))
    if axis != "time":
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "round"))
    panel.set_xlim(left=0, right=end * 1.02 if end > 0 else None)


def _time_unit(end: float) -> tuple[float, str]:
    """(seconds, name) of the unit in which an axis of this length reads best."""
    for least, size, unit in ((7200.0, 3600.0, "hours"), (240.0, 60.0, "minutes"), (1.0, 1.0, "s")):
        if end >= least:
            return size, unit
    return 1e-3, "ms"


def _fault_marks(panel: Axes, report: Report, axis: str) -> None:
    """A dashed line per moment at which faults set in, named at the top."""
    from matplotlib.transforms import blended_transform_factory

    left, right = panel.get_xlim()
    marks: list[tuple[float, str]] = []
    for x, what in fault_moments(report, axis):
        if left <= x <= right and not any(
            what == other and abs(x - place) < 0.02 * (right - left) for place, other in marks
        ):
            marks.append((x, what))
    if len(marks) > 40:
        marks = marks[:: math.ceil(len(marks) / 40)]
    place = blended_transform_factory(panel.transData, panel.transAxes)
    last = -math.inf
    for x, what in sorted(marks):
        panel.axvline(x, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        if x - last > 0.16 * (right - left):
            end = x > left + 0.8 * (right - left)
            panel.text(
                x, 1.01, what, transform=place, fontsize=8, color=MUTED,
                ha="right" if end else "left", va="bottom",
            )  # fmt: skip
            last = x


def fault_moments(report: Report, axis: str) -> list[tuple[float, str]]:
    """(x, what) of every fault: what took effect, by time; or what was tied to rounds, by round."""
    found: set[tuple[float, str]] = set()
    for cell in report.cells:
        if axis == "time":
            found.update((time_s, what) for time_s, what, _ in cell.happenings)
        else:
            for fault in cell.faults:
                at = fault.get("at", 0.0)
                if isinstance(at, dict):
                    found.add((float(at["round"]), fault["kind"]))
    return sorted(found)


def spread(report: Report, metric: str) -> str:
    """How peers differ: the 5th to 95th percentile as it develops, and the last values as boxes."""
    cells = [c for c in _firsts(report) if metric in c.spreads]
    if not any(len(c.finals[metric]) > 1 for c in cells):
        return ""
    chosen = looks(report.arms)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for cell in cells:
            bands = cell.spreads[metric]
            by_round = all(band[1] >= 0 for band in bands)
            x = [band[1 if by_round else 0] for band in bands]
            look = chosen[cell.arm]
            low, high = [band[2] for band in bands], [band[6] for band in bands]
            left.fill_between(x, low, high, color=look.color, alpha=0.2, linewidth=0)
            left.plot(x, [band[4] for band in bands], color=look.color, linestyle=look.dash)
            left.set_xlabel("round" if by_round else "virtual time, s")
        left.set_ylabel(label(metric))
        left.set_title("median peer, 5th to 95th percentile", loc="left", color=MUTED)
        boxes(right, [(c.arm, c.finals[metric], chosen[c.arm].color) for c in cells])
        right.set_xlabel(label(metric))
        right.set_title("each peer at the end", loc="left", color=MUTED)

    height = max(2.8, 0.34 * len(cells) + 1.2)
    return svg(11.0, height, draw, f"{label(metric)} of single peers")


def traffic(report: Report) -> str:
    """Bytes sent by each peer, as boxes on a logarithmic axis: who carries the load."""
    cells = [c for c in _firsts(report) if c.peer_bytes and any(c.peer_bytes)]
    if not cells:
        return ""
    chosen = looks(report.arms)

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        panel = figure.subplots()
        rows = [
            (c.arm, [float(b) for b in c.peer_bytes if b > 0], chosen[c.arm].color) for c in cells
        ]
        boxes(panel, rows)
        values = [value for _, each, _ in rows for value in each]
        if max(values) > 30 * min(values):
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v, "bytes")))
        panel.set_xlabel("bytes sent by a peer")

    return svg(5.4, max(2.6, 0.36 * len(cells) + 1.1), draw, "bytes sent by single peers")


def boxes(panel: Axes, rows: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """Horizontal boxes from the 25th to the 75th percentile, whiskers 5th to 95th, dots beyond."""
    for place, (_, values, color) in enumerate(reversed(rows)):
        low, first, middle, third, high = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        panel.plot((low, high), (place, place), color=color, linewidth=1.2)
        panel.barh(
            place, third - first, 0.5, first, color=color, alpha=0.35, edgecolor=color, linewidth=1
        )
        panel.plot((middle, middle), (place - 0.25, place + 0.25), color=color, linewidth=2.4)
        beyond = [v for v in values if v < low or v > high]
        panel.plot(beyond, [place] * len(beyond), "o", color=color, markersize=2.6, alpha=0.7)
    panel.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.grid(axis="y", visible=False)


def _firsts(report: Report) -> list[CellResult]:
    """The first finished cell of every arm."""
    found: dict[str, CellResult] = {}
    for cell in report.cells:
        if not cell.error:
            found.setdefault(cell.arm, cell)
    return [found[arm] for arm in report.arms if arm in found]


def dots(values: Sequence[tuple[int, float]], bound: tuple[float, float]) -> str:
    """A claim's number of each seed against its bound; the permitted side is shaded."""
    numbers = [value for _, value in values if math.isfinite(value)]
    if not numbers:
        return ""
    ends = [b for b in bound if math.isfinite(b)]
    low, high = min(numbers + ends), max(numbers + ends)
    pad = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return 4 + 152 * (min(max(value, low), high) - low) / (high - low)

    start, end = x(bound[0]), x(bound[1])
    parts = [
        '<svg class="dots" viewBox="0 0 160 20" role="img" aria-label="values of the seeds">',
        f'<rect x="{start:.1f}" y="3" width="{max(end - start, 1):.1f}" height="14" class="zone"/>',
        '<line x1="4" x2="156" y1="10" y2="10" class="rule"/>',
    ]
    parts += [f'<line x1="{x(e):.1f}" x2="{x(e):.1f}" y1="2" y2="18" class="bound"/>' for e in ends]
    parts += [f'<circle cx="{x(v):.1f}" cy="10" r="3.2"/>' for v in numbers]
    return "".join(parts) + "</svg>"
