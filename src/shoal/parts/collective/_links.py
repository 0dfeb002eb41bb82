"""Links of a ring that carry nothing or damage what they carry: found, led around, given up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shoal.parts.collective._wire import FAILED, INITIATE, Vote, Word
from shoal.parts.collective.tour import Tour

Link = tuple[int, int]
"""From a peer to its successor."""

_AVOID = 1e6
_MOST = 3
"""Strikes after which an end of a link that cannot be avoided is dropped."""


def broken_link(word: Word, votes: Mapping[int, Vote]) -> Link | None:
    """The link to a peer that gets nothing although its predecessor has sent: the others only wait;
    or else to one that gave up because its predecessor's pieces came damaged."""
    links = [(word.ring[place - 1], peer) for place, peer in enumerate(word.ring)]
    for before, peer in links:
        if peer in votes and before in votes:
            here, there = votes[peer], votes[before]
            if here.stalled and here.phase == INITIATE and there.sent > here.received:
                return before, peer
    for before, peer in links:
        if peer in votes and votes[peer].phase == FAILED:
            return before, peer
    return None


class Strikes:
    """What is held against links. A reduction that succeeds over a link clears it."""

    def __init__(self) -> None:
        self._count: dict[Link, int] = {}

    def clear(self, ring: Sequence[int]) -> None:
        """All of these links have carried a reduction."""
        for place, peer in enumerate(ring):
            self._count.pop((ring[place - 1], peer), None)

    def forget(self, peer: int) -> None:
        """It is gone."""
        self._count = {link: n for link, n in self._count.items() if peer not in link}

    def strike(self, link: Link, members: Sequence[int]) -> tuple[list[int], int | None]:
        """One more: (the ring that goes around as many as it can, whom to drop or None)."""
        self._count[link] = self._count.get(link, 0) + 1
        source, target = link
        cost = np.ones((len(members), len(members)))
        for a, b in self._count:
            if a in members and b in members:
                cost[members.index(a), members.index(b)] = _AVOID
        ring = [members[place] for place in Tour(starts=2).order(cost)]
        way = zip(ring, ring[1:] + ring[:1], strict=True)
        unavoidable = any(each in self._count for each in way)
        if sum(a == source for a, _ in self._count) >= _MOST:
            # Bad towards several others: the fault is not with one of the links.
            return ring, source
        if unavoidable and self._count[link] >= _MOST:
            count = {end: sum(end in each for each in self._count) for end in link}
            return ring, source if count[source] > count[target] else target
        return ring, None
