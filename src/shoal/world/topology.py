"""Who may talk to whom: the contract; graphs that implement it are in `parts/topology`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Topology(Protocol):
    """A graph on peers 0..n-1, possibly another one each round. Frozen, hashable settings."""

    @property
    def peers(self) -> int: ...

    def neighbors(self, peer: int, round: int = 0) -> tuple[int, ...]:
        """Whom `peer` may talk to, ascending, itself not included."""
        ...

    def sources(self, round: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(sources int64 [peers, k] padded with -1, weights [peers, k], own [peers]), float64.

        Whom each peer hears and with what mixing weight; weights + own sum to 1 in each row, and
        in each column unless the class says otherwise. `weights()` is the same as a sparse matrix.
        """
        ...

    def weights(self, round: int = 0) -> Tensor:
        """Mixing matrix, sparse CSR float64 [peers, peers]."""
        ...
