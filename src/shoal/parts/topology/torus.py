"""The torus and the grid: peers in rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import networkx

from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, both_ways, check_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Torus(GraphTopology):
    """Peers in a rectangle, each hears the four beside it; `wrap` joins opposite borders.

    Peer i stands in row i // columns. rows None: the divisor of `peers` nearest below its square
    root, so that a prime number of peers gives a ring (or, without wrap, a line). The gap shrinks
    with 1 / peers, against 1 / peers^2 on a ring.

    >>> Torus(12).neighbors(0)
    (1, 3, 4, 8)
    >>> Torus(12, wrap=False).neighbors(0)
    (1, 4)
    """

    peers: int
    rows: int | None = None
    wrap: bool = True
    mixing: Mixing = "metropolis"

    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 12},
        {"peers": 12, "wrap": False},
        {"peers": 12, "wrap": False, "mixing": "uniform"},
        {"peers": 15, "rows": 5, "wrap": False, "mixing": "max_degree"},
        {"peers": 4},
        {"peers": 7},
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.rows is not None and (self.rows < 1 or self.peers % self.rows):
            raise UsageError(
                f"Torus: rows={self.rows} does not divide peers={self.peers}; need full rows "
                "(choose a divisor, or leave rows out)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows = self.rows
        if rows is None:
            rows = next(r for r in range(math.isqrt(self.peers), 0, -1) if self.peers % r == 0)
        return rows, self.peers // rows

    def arcs(self, period: int) -> NDArray[np.int64]:
        rows, columns = self.shape
        grid = networkx.grid_2d_graph(rows, columns, periodic=self.wrap)
        return both_ways((a * columns + b, c * columns + d) for (a, b), (c, d) in grid.edges())
