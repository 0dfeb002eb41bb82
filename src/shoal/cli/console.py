"""What commands print: aligned tables, JSON Lines on stdout; errors on stderr."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import traceback
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


def explain(error: BaseException, *, stored: bool = False) -> int:
    """Say what went wrong in one block, without a traceback; returns the exit code.

    stored: the command keeps what is done, and goes on from there when it is given again.
    """
    if isinstance(error, KeyboardInterrupt):
        more = "; what is done is stored, the same command goes on from there" if stored else ""
        say(f"\nstopped{more}", error=True)
        return 130
    if isinstance(error, ShoalError):
        _say_error("error", str(error))
        return 2 if isinstance(error, UsageError) else 1
    where, own = _place(error)
    if own:
        _say_error("error", f"{type(error).__name__}: {error} ({where})")
        say("set SHOAL_DEBUG=1 to see the whole traceback", error=True)
        return 1
    repair = _repair(error)
    if repair:
        _say_error("error", repair)
        return 2
    _say_error("internal error", f"{type(error).__name__}: {error} ({where})")
    say("set SHOAL_DEBUG=1 to see the whole traceback, and please report it", error=True)
    return 1


def _say_error(head: str, text: str) -> None:
    say(f"{head}: ", "bold", "red", error=True, end="")
    say(text, error=True)


def _place(error: BaseException) -> tuple[str, bool]:
    """Where it was raised, and whether code of the user's own (a system, a script) was running.

    Of calls that go through several files the innermost one of the user's counts.
    """
    calls = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    # What a worker process raised comes with its calls as text.
    calls += re.findall(r'File "(.+)", line (\d+), in (\S+)', str(error.__cause__ or ""))
    ours = Path(__file__).parents[1]
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    for file, line, name in reversed(calls):
        if Path(file).is_file() and not {ours, *libraries}.intersection(Path(file).parents):
            return f"{file}:{line}, in {name}", True
    for file, line, name in reversed(calls):
        if ours in Path(file).parents:
            return f"shoal/{Path(file).relative_to(ours)}:{line}, in {name}", False
    return "outside of Shoal", False


def _repair(error: BaseException) -> str:
    """Of mistakes that are no fault of the program: what to do about them; else an empty text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror} (make room, and give the same command again)"
    if isinstance(error, OSError) and isinstance(error.filename, (str, Path)):
        return f"{error.filename}: {error.strerror} (check the path, and who may use it)"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "shoal":
            return (
                f"the package {package} is not installed, and Shoal needs it (in the clone: "
                "pip install torch, then pip install -e .)"
            )
    return ""


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
    """Aligned columns. On a terminal that is too narrow the table continues below itself.

    Each part begins with the first column, if that names every row; else the last column is cut.
    right: numbers to the right.
    """
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    room = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 10**6
    named = all(row[0] for row in rows)
    for part, columns in enumerate(_parts(widths, room) if named else [range(len(heads))]):
        if part:
            say()
        for index, cells in enumerate([heads, *rows]):
            pieces = [
                cells[i].rjust(widths[i]) if right and i else cells[i].ljust(widths[i])
                for i in columns
            ]
            text = "  ".join(pieces).rstrip()
            text = text if len(text) <= room else text[: room - 1] + "…"
            say(text, *(() if index else ("dim",)))


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns that fit beside the first one, part by part; each part has one at least.

    >>> _parts([5, 10, 10, 30], 30)
    [[0, 1, 2], [0, 3]]
    """
    parts: list[list[int]] = [[0]]
    used = widths[0]
    for column, width in enumerate(widths[1:], 1):
        if len(parts[-1]) > 1 and used + 2 + width > room:
            parts.append([0])
            used = widths[0]
        parts[-1].append(column)
        used += 2 + width
    return parts


def report_folder(out: Path | None) -> Path:
    """Where reports go; one that cannot be written to is refused before hours of work."""
    from shoal.lab.store import default_folder

    folder = out or default_folder() / "reports"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UsageError(
            f"reports cannot be written to {folder}: {reason} (name another folder with --out)"
        )
    return folder


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
    from shoal.lab.store import Store

    with Store() as store, progress("runs", quiet=quiet, json=json) as tell:
        folder = report_folder(out)
        report = experiment.run(store, jobs=jobs, progress=of_ticks(tell), fresh=fresh)
    return report, report.save(folder)
