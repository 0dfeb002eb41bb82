"""A report for terminals and text files: numbers with units, Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.lab.statistics import Interval

if TYPE_CHECKING:
    from shoal.lab.report import Report

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def number(value: float, metric: str = "") -> str:
    """A value with the unit that the metric's name says, in four significant digits.

    >>> number(12_300_000, "bytes_sent"), number(0.87654, "accuracy"), number(75.0, "virtual_s")
    ('12.3 MB', '0.8765', '75 s')
    """
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "never" if value > 0 else "-inf"
    if "bytes" in metric:
        size, unit = value, 0
        while abs(size) >= 999.5 and unit < len(_BYTES) - 1:
            size, unit = size / 1000, unit + 1
        return f"{size:.3g} {_BYTES[unit]}"
    if metric.endswith("_s"):
        return seconds(value)
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    """A duration: milliseconds, seconds, minutes or hours.

    >>> seconds(0.0042), seconds(42.0), seconds(4200.0)
    ('4.2 ms', '42 s', '1 h 10 min')
    """
    if abs(value) < 1:
        return f"{1000 * value:.3g} ms" if value else "0 s"
    if abs(value) < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    if minutes < 60:
        return f"{value / 60:.3g} min"
    return f"{minutes // 60} h {minutes % 60} min"


def interval_text(interval: Interval | None, metric: str = "") -> str:
    """`[low, high]`, or a dash when one seed gives none."""
    if interval is None:
        return "-"
    return f"[{number(interval.low, metric)}, {number(interval.high, metric)}]"


def level_text(interval: Interval | None) -> str:
    """What the interval is, such as `94% order statistics`."""
    if interval is None:
        return ""
    if math.isnan(interval.level):
        return interval.method
    return f"{100 * interval.level:.0f}% {interval.method}"


def label(metric: str) -> str:
    """A metric's name for people.

    >>> label("bytes_sent"), label("virtual_s")
    ('bytes sent', 'virtual time')
    """
    known = {"virtual_s": "virtual time", "cpu_s": "CPU time", "wall_s": "wall time"}
    return known.get(metric, metric.removesuffix("_s").replace("_", " "))


def columns(report: Report) -> tuple[list[str], list[str]]:
    """Metrics of the summary: those that every arm has, and those of some arms only."""
    summary = report.summary()
    have = {(row.arm, row.metric) for row in summary}
    metrics = list(dict.fromkeys(row.metric for row in summary))
    common = [m for m in metrics if all((arm, m) in have for arm in report.arms)]
    if not common:
        return metrics, []
    return common, [m for m in metrics if m not in common]


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """What every arm has as a table: (metrics, rows of arm and values). One column per metric."""
    summary = report.summary()
    metrics, _ = columns(report)
    rows = []
    for arm in report.arms:
        values = {row.metric: row for row in summary if row.arm == arm}
        line = [arm]
        for metric in metrics:
            row = values.get(metric)
            text = number(row.value, metric) if row else "missing"
            if row and row.seeds < len(report.seeds):
                text += f" ({row.seeds} of {len(report.seeds)} seeds)"
            line.append(text)
        rows.append(line)
    return metrics, rows


def markdown(report: Report) -> str:
    """Summary, verdicts and conditions as Markdown."""
    metrics, rows = table(report)
    seeds = ", ".join(map(str, report.seeds))
    lines = [f"# {report.title}", "", f"{report.created}; seeds {seeds}; median over seeds.", ""]
    lines += _table(["arm", *map(label, metrics)], rows)
    if report.verdicts:
        lines += ["", "## Claims", ""]
        heads = ["claim", "measured", "interval", "bound", "verdict", "clear", "expected"]
        body = []
        for v in report.verdicts:
            interval = interval_text(v.interval)
            if v.interval is not None:
                interval += f" ({level_text(v.interval)})"
            body.append(
                [
                    f"{v.name}: {v.statement}", number(v.measured), interval, v.bound, v.verdict,
                    "yes" if v.clear else "no", v.expected,
                ]
            )  # fmt: skip
        lines += _table(heads, body)
    errors = [cell for cell in report.cells if cell.error]
    if errors:
        lines += ["", "## Runs that ended in an error", ""]
        lines += [f"- {cell.arm}, seed {cell.seed}: {cell.error}" for cell in errors]
    lines += ["", "## Environment", ""]
    lines += [f"- {key}: {value}" for key, value in report.environment.items()]
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows)]
