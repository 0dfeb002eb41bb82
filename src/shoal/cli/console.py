"""What commands print: aligned tables, JSON Lines on stdout; errors on stderr."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.base.errors import ShoalError, UsageError

if TYPE_CHECKING:
    from shoal.lab.experiment import Experiment
    from shoal.lab.report import Report


_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def say(text: str = "", *styles: str, error: bool = False, end: str = "\n") -> None:
    """Print a line, styled if it goes to a terminal (and NO_COLOR is not set)."""
    stream = sys.stderr if error else sys.stdout
    if styles and stream.isatty() and not os.environ.get("NO_COLOR"):
        text = f"\033[{';'.join(_STYLES[style] for style in styles)}m{text}\033[0m"
    print(text, file=stream, end=end)


def explain(error: BaseException) -> int:
    """Say what went wrong in one block, without a traceback; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        say("\nstopped; what is done is stored, the same command goes on from there", error=True)
        return 130
    if isinstance(error, ShoalError):
        say("error: ", "bold", "red", error=True, end="")
        say(str(error), error=True)
        return 2 if isinstance(error, UsageError) else 1
    say("internal error: ", "bold", "red", error=True, end="")
    say(f"{type(error).__name__}: {error}", error=True)
    say("set SHOAL_DEBUG=1 to see where, and please report it", error=True)
    return 1


def json_line(value: dict[str, Any]) -> None:
    """One object, one line; numbers that are not finite become null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """Aligned columns; the last one is cut to the terminal's width. right: numbers to the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    room = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 10**6

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        text = "  ".join(parts).rstrip()
        return text if len(text) <= room else text[: room - 1] + "…"

    say(line(heads), "dim")
    for row in rows:
        say(line(row))


_COLORS = {"holds": "green", "fails": "red", "inconclusive": "yellow", "out of scale": "dim"}


def show_report(report: Report, path: Path) -> None:
    """The summary, the verdicts, errors, and where the report is."""
    from shoal.lab.text import interval_text, label, number
    from shoal.lab.text import table as summary_table

    metrics, rows = summary_table(report)
    say(report.title, "bold")
    table(["arm", *map(label, metrics)], rows, right=True)
    if report.verdicts:
        say()
    for verdict in report.verdicts:
        say(f"{verdict.verdict:>12}", "bold", _COLORS[verdict.verdict], end="")
        text = f"  {verdict.name}: {verdict.statement}"
        if not math.isnan(verdict.measured):
            text += f"; {number(verdict.measured)} {interval_text(verdict.interval)}"
        text += f", bound {verdict.bound}"
        text += "" if verdict.as_expected else f", expected {verdict.expected}"
        say(text)
    for cell in report.cells:
        if cell.error:
            say(f"{cell.arm}, seed {cell.seed}: {cell.error}", "red", error=True)
    say(f"\nreport: {path}")


def show_report_json(report: Report, path: Path) -> None:
    """A line per arm and metric, then one that says where the report is."""
    for row in report.summary():
        interval = [row.interval.low, row.interval.high] if row.interval else None
        json_line(
            {
                "arm": row.arm, "metric": row.metric, "value": row.value, "interval": interval,
                "seeds": row.seeds,
            }
        )  # fmt: skip
    errors = [
        {"arm": cell.arm, "seed": cell.seed, "error": cell.error}
        for cell in report.cells
        if cell.error
    ]
    json_line({"report": str(path), "title": report.title, "errors": errors})


def run_and_save(
    experiment: Experiment, *, jobs: int, fresh: bool, out: Path | None, quiet: bool, json: bool
) -> tuple[Report, Path]:
    """Run an experiment with the workspace's store and write its report."""
    from shoal.cli.progress import of_ticks, progress
    from shoal.lab.store import Store, default_folder

    with Store() as store, progress("runs", quiet=quiet, json=json) as tell:
        report = experiment.run(store, jobs=jobs, progress=of_ticks(tell), fresh=fresh)
    return report, report.save(out or default_folder() / "reports")
