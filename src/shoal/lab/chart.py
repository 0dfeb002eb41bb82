"""Pictures that a card makes of its runs: curves, bars, grids of shares, and spans of time.

A card holds a `Chart`: a function from the runs to named points. A report keeps the points
(`Drawn`), so that it can be drawn again without the runs (`chart_picture`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.base.errors import UsageError
from shoal.lab.values import near

if TYPE_CHECKING:
    from shoal.lab.rows import Rows

KINDS = ("curves", "points", "bars", "grid", "spans")
Points = Mapping[str, Sequence[tuple[Any, float]]]
"""Of curves, points and bars: line -> (x, y) points. Of a grid: row -> (column, value) pairs. Of
spans: row -> (begin, end) pairs."""


@dataclass(frozen=True)
class Chart:
    """A picture of what `points(rows)` returns; a module-level function of the runs.

    kind: "curves" (steps: a value holds until the next), "points" (what was measured at a few
    places, joined by straight lines), "bars" (x are names or whole numbers), "grid" (a share of 0
    to 1 in every cell) or "spans" (a row of bars from begin to end, as in a Gantt chart); x, y:
    what the axes show.
    """

    title: str
    kind: str
    points: Callable[[Rows], Points]
    x: str = ""
    y: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"chart {self.title!r}: kind = {self.kind!r}; {near(self.kind, KINDS)}"
            )

    def drawn(self, rows: Rows) -> Drawn:
        """The points, as data."""
        lines = {
            name: [(x, float(y)) for x, y in points] for name, points in self.points(rows).items()
        }
        return Drawn(self.title, self.kind, self.x, self.y, lines)


@dataclass(frozen=True)
class Drawn:
    """A chart's points, as a report keeps them."""

    title: str
    kind: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[Any, float]]]
