"""Who hears whom in a round: data, not code, so every engine means the same by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shoal.base.ids import PeerId
from shoal.tensor.types import Index, Mask, Weight


@dataclass(frozen=True)
class Hop:
    """One wave of messages in which receivers hear their sources.

    sources:   int64 [receivers, k], -1 = padding; own row not included
    weights:   float [receivers, k] what each source counts; None = let the aggregator decide
    own:       float [receivers] what the own vector counts; weights and own sum to 1 when
               present. A lost or absent source's weight goes to `own`.
    receivers: int64 [receivers], ascending, or None = all peers: with a hub just the hub
    taken:     bool [receivers, k] or None = all. Everybody sends to all who have it as a source; a
               receiver waits for and uses only the taken ones ("the first n - f to arrive").
    """

    sources: Index
    weights: Weight | None = None
    own: Weight | None = None
    receivers: Index | None = None
    taken: Mask | None = None

    def same(self, other: Hop) -> bool:
        """Whether both hold the very same tensors, so that what was made from one serves both."""
        return all(a is b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))


class Exchange(Protocol):
    """A communication step. Frozen settings; `hops` is a function of (round, seed) alone."""

    @property
    def hub(self) -> PeerId | None:
        """With a hub, `apply` runs there only and its parameters go down to the active peers."""
        ...

    @property
    def peers(self) -> int: ...

    def active(self, round: int, seed: int) -> Mask:
        """bool [peers]: who takes part in this round."""
        ...

    def hops(self, round: int, seed: int) -> tuple[Hop, ...]:
        """The waves of a round. Waves after the first send the combined vector of the last."""
        ...
