"""A long search for the order of a ring, beside the master's other work.

The quick tour of a topology optimisation must not keep everybody waiting; this goes on from it.
It runs in slices of some ten milliseconds on the device of the master's peer (a thread of its own
on real engines, virtual time in simulation), so that reports are heard between any two of them. A
slice gets tensors and gives tensors: nothing that the master holds is ever touched from outside.

The "moonshot" of PCCL (arXiv 2505.14065), section on topology optimisation; perturbations by the
double bridge of Martin, Otto and Felten (1991), which keeps directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.kernel.peer import Cost, Peer
from shoal.parts.collective.tour import (
    Matrix,
    Order,
    Slice,
    Steps,
    cheapest,
    descent,
    from_zero,
    tour_cost,
)

ELEMENT_S = 1e-8
"""Virtual seconds per element of a slice, about what a core takes."""


@dataclass(frozen=True)
class Search:
    """Looks for a cheaper tour than a known one for at most `seconds`.

    Up to `exact` peers it finds the cheapest; above that it perturbs the best tour known and
    improves the outcome (iterated local search), until `kicks` times the number of peers in a row
    came to nothing. Equal seeds give equal tours wherever time does not run out.

    >>> Search(seconds=5.0).exact
    20
    """

    seconds: float = 30.0
    exact: int = 20
    kicks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and 1 <= self.exact <= 20 and self.kicks >= 1):
            raise UsageError(
                f"search: seconds={self.seconds}, exact={self.exact}, kicks={self.kicks}; need "
                "seconds > 0, exact from 1 to 20 (memory doubles with each peer) and kicks >= 1"
            )

    async def run(
        self, peer: Peer, cost: Matrix, known: Order, wanted: Callable[[], bool]
    ) -> Order | None:
        """The best tour found in time, at least as good as `known`; None when there is none.

        cost [peers, peers]: the search's own, which nobody writes. It ends within a slice after
        `wanted()` has become False.
        """
        until_s = peer.now() + self.seconds
        best: list[Order] = []
        exact = len(cost) <= self.exact
        steps = cheapest(cost) if exact else self.perturbed(cost, known, best.append)
        found: Any = None
        while True:
            try:
                piece = steps.send(found)
            except StopIteration as stop:
                return stop.value
            if not wanted() or peer.now() >= until_s:
                return best[-1] if best else None
            found = await _done(peer, piece)

    def perturbed(self, cost: Matrix, known: Order, keep: Callable[[Order], None]) -> Steps:
        """Iterated local search from a known tour, as slices; every better one is told."""
        best = yield from descent(cost, known, keep)
        least, failed, number = tour_cost(cost, best), 0, 0
        while failed < self.kicks * len(cost):
            order = yield from descent(cost, _double_bridge(best, self.seed, number))
            number += 1
            total = tour_cost(cost, order)
            if total < least:
                best, least, failed = order, total, 0
                keep(from_zero(best))
            else:
                failed += 1
        return from_zero(best)


async def _done(peer: Peer, piece: Slice) -> Any:
    seconds = ELEMENT_S * piece.elements
    return await peer.compute(
        piece.function, *piece.args, static=piece.static, cost=Cost(seconds=seconds), batch="never"
    )


def _double_bridge(order: Order, seed: int, number: int) -> Order:
    """a b c d -> a d c b, cut at three places drawn by key: four edges change, which no single
    exchange takes back."""
    places = range(1, len(order))
    drawn = sorted(places, key=lambda place: keyed.uniform(seed, "kick", number, place))[:3]
    i, j, k = sorted(drawn)
    return order[:i] + order[k:] + order[j:k] + order[i:j]
