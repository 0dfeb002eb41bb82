"""The order of each group's ring: measured links, a quick tour, a search that goes on from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shoal.parts.collective.tour import Matrix, Order, Tour, link_cost, tour_cost

Members = tuple[tuple[int, int], ...]
"""(peer, session) of a group's members: another session is another member."""


@dataclass(frozen=True, eq=False)
class Question:
    """Whether there is a better ring than `known` for a group, its members in the order of the
    rows of `cost`."""

    group: int
    members: Members
    cost: Matrix
    known: Order


class Orders:
    """What a master knows of its groups' rings. searches: whether to ask for better ones."""

    def __init__(self, searches: bool) -> None:
        self._searches = searches
        self._rates: dict[tuple[int, int], float] = {}
        self._questions: dict[int, Question] = {}
        self._found: dict[int, Question] = {}
        """questions with the best order found in place of the known one"""

    def measured(self, peer: int, detail: bytes) -> None:
        """A peer's rows of (target, bit/s), as bytes of float64."""
        for target, rate in np.frombuffer(detail, np.float64).reshape(-1, 2):
            self._rates[peer, int(target)] = float(rate)

    def best(self, group: int, members: Members) -> tuple[list[int], bool]:
        """A ring of a group's members, and whether a search has found it: the quick tour, the ring
        as it is, or what came of the question of the last call if nobody came or went; whichever is
        best by now."""
        now = [peer for peer, _ in members]
        # Sorted, so that equal rates give equal rings whatever was before.
        members = tuple(sorted(members))
        peers = [peer for peer, _ in members]
        rates = [[self._rates.get((a, b), 0.0) for b in peers] for a in peers]
        cost = link_cost(np.array(rates).reshape(len(peers), len(peers)))
        np.fill_diagonal(cost, 0.0)
        quick = Tour()
        ways = [quick.order(cost), tuple(map(peers.index, now))]
        found = self._found.pop(group, None)
        if found is not None and found.members == members:
            ways.append(found.known)
        totals = [tour_cost(cost, way) for way in ways]
        best = totals.index(min(totals))
        self._questions.pop(group, None)
        if len(peers) > quick.exact and self._searches:
            self._questions[group] = Question(group, members, cost, ways[best])
        return [peers[place] for place in ways[best]], best == 2

    def changed(self, group: int) -> None:
        """Somebody came or went: what was asked is of no use any more."""
        self._questions.pop(group, None)
        self._found.pop(group, None)

    def open_question(self) -> Question | None:
        """What is to be searched for next."""
        return min(self._questions.values(), key=lambda asked: asked.group, default=None)

    def wants(self, asked: Question) -> bool:
        """Whether an answer is still of use."""
        return self._questions.get(asked.group) is asked

    def answered(self, asked: Question, found: Order | None) -> None:
        """A search has ended."""
        if self.wants(asked):
            del self._questions[asked.group]
            if found is not None:
                self._found[asked.group] = replace(asked, known=found)
