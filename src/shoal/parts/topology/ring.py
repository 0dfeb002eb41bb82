"""The ring: every peer hears its two neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shoal.parts.topology.base import GraphTopology, Mixing, check_settings, circulant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Ring(GraphTopology):
    """Peers in a circle, each with its two neighbours and weight 1/3 on all three.

    lambda_2 = 1/3 + 2/3 cos(2 pi / peers): the gap shrinks with the square of the number of peers,
    so differences outlive any affordable number of rounds beyond about a hundred of them.

    >>> Ring(5).neighbors(0)
    (1, 4)
    """

    peers: int

    mixing: ClassVar[Mixing] = "metropolis"
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"peers": 12}, {"peers": 3}, {"peers": 2}, {"peers": 1},
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)

    def arcs(self, period: int) -> NDArray[np.int64]:
        return circulant(self.peers, (1, -1))
