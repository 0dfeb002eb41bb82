"""The full graph: everybody hears everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shoal.base.errors import UsageError
from shoal.parts.topology.base import GraphTopology, Mixing, check_settings, circulant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Full(GraphTopology):
    """All pairs, weight 1 / peers: one round gives the exact average.

    Costs peers^2 messages a round, and as much memory for `sources` and `weights`: meant for
    hundreds of peers, as the yardstick of the others.

    >>> Full(4).weights().to_dense()[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    peers: int

    mixing: ClassVar[Mixing] = "metropolis"
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"peers": 8}, {"peers": 2}, {"peers": 1})

    def __post_init__(self) -> None:
        check_settings(self)

    def neighbors(self, peer: int, round: int = 0) -> tuple[int, ...]:
        """Everybody else; no graph of peers^2 edges is built for this."""
        if not 0 <= peer < self.peers:
            raise UsageError(f"Full: no peer {peer}; there are 0 to {self.peers - 1}")
        return (*range(peer), *range(peer + 1, self.peers))

    def arcs(self, period: int) -> NDArray[np.int64]:
        return circulant(self.peers, range(1, self.peers))
