"""Run a report's cells again and compare: the same command must give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.base.errors import UsageError
from shoal.lab import launch as seam
from shoal.lab.cell import Cell, Launcher, Progress, execute
from shoal.lab.environment import code_digest
from shoal.lab.jobs import Outcome
from shoal.lab.report import Report
from shoal.lab.report_data import CellResult, condense

# Measured on the machine, hence never equal.
_MEASURED = ("wall_s", "cpu_s")


@dataclass(frozen=True)
class Comparison:
    """A cell, replayed: what differs, in words; nothing when it is the same."""

    arm: str
    seed: int
    differences: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.differences


def replay(
    report: Report,
    *,
    launcher: Launcher | None = None,
    arm: str | None = None,
    seed: int | None = None,
    progress: Callable[[Cell], Progress | None] = lambda cell: None,
) -> Iterator[Comparison]:
    """Replay every cell of a report, or those of one arm or seed."""
    chosen = [
        cell
        for cell in report.cells
        if arm in (None, cell.arm) and seed in (None, cell.seed) and not cell.error
    ]
    if not chosen:
        raise UsageError(
            f"replay: no finished run of arm {arm} and seed {seed}; the report has arms "
            f"{', '.join(report.arms)} and seeds {', '.join(map(str, report.seeds))}"
        )
    for before in chosen:
        if before.cell is None:
            raise UsageError(
                f"replay: arm {before.arm} was run with live Python objects "
                f"({', '.join(before.live)}), of which a report keeps no data (run the script "
                "again, or give Part(name, settings) and a system's name)"
            )
        cell = Cell.from_json(before.cell)
        run = execute(cell, launcher or seam.launch, progress(cell))
        after = condense(Outcome(cell, run), None)
        yield Comparison(before.arm, before.seed, tuple(differences(before, after)))


def code_changed(report: Report) -> bool:
    """Whether the code that makes numbers is another than the report's."""
    return report.environment.get("code") != code_digest()[:12]


def differences(before: CellResult, after: CellResult) -> Iterator[str]:
    """What two results of one cell disagree on, in words."""
    for name in ("trace_digest", "state_digest"):
        if getattr(before, name) != getattr(after, name):
            yield f"{name}: {getattr(before, name)[:12]} became {getattr(after, name)[:12]}"
    for name, value in before.totals.items():
        again = after.totals.get(name, math.nan)
        if name not in _MEASURED and not _equal(value, again):
            yield f"{name}: {value!r} became {again!r}"
    for name in before.curves.keys() | after.curves.keys():
        old, new = before.curves.get(name, []), after.curves.get(name, [])
        if len(old) == 1:
            new = new[-1:]  # a brief report keeps last points
        if len(old) != len(new):
            yield f"{name}: {len(old)} points became {len(new)}"
            continue
        for first, second in zip(old, new, strict=True):
            if not all(map(_equal, first, second)):
                yield f"{name} at {first[0]:g} s: {first[2]!r} became {second[2]!r}"
                break


def _equal(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))
