"""One iterative search of Kademlia: who is closest to a number, or who holds records under it.

`alpha` queries are under way at once; each answer names nodes that are closer. A node that has not
answered within the usual time is slow: another one is asked in its place, but its answer still
counts when it comes. So a silent node costs a few round trips, not its full timeout.
Source: Maymounkov and Mazieres 2002, "Kademlia", section 2.3.
"""

from __future__ import annotations

import math
from bisect import insort
from enum import IntEnum
from typing import Any, Protocol

from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.overlay.records import KEY_BYTES, Copy
from shoal.parts.overlay.routing_table import RoutingTable
from shoal.wire.message import message

_MOST_QUERIES_PER_K = 12
# How long a search for nodes waits for slow ones that would belong to its result, in patiences.
_GRACE = 3.0
# A clock of nanoseconds may show slightly less than the moment slept for.
_TICK_S = 1e-8


@message
class Find:
    """Whom do you know closest to this number, and (`wants`) what do you hold under it?"""

    number: bytes
    wants: bool


@message
class Found:
    """The closest peers, the closest first, and records."""

    peers: tuple[int, ...]
    copies: tuple[Copy, ...]


class Asker(Protocol):
    """What a search needs of the node that makes it."""

    peer: Peer
    table: RoutingTable

    @property
    def patience_s(self) -> float:
        """After what time an answer is late."""
        ...

    def number(self, peer: PeerId) -> int | None:
        """A peer's node number, None when there is no such peer."""
        ...

    async def ask(self, peer: PeerId, question: object) -> Any:
        """Its answer, None when there is none; keeps the table up to date."""
        ...

    def accepts(self, key: bytes, copy: Copy) -> bool:
        """Whether a record is intact and has not expired."""
        ...


class _State(IntEnum):
    NEW = 0
    ASKED = 1
    ANSWERED = 2
    SLOW = 3
    SUSPECT = 4
    FAILED = 5


class Lookup:
    """A search for a 256-bit number; `await run(group)`, then read the results.

    deadline: on the peer's clock; holders: 0 to find nodes, otherwise the search is for records and
    ends when so many nodes gave some. start: whom to ask besides the table's contacts.

    A hostile answer costs at most its turn: it names at most k peers, of which those are dropped
    that do not exist; node numbers follow from peers, so that nobody can claim to be close; no node
    is asked twice, and at most 12 k in all; records that are not intact are dropped.
    """

    def __init__(
        self, asker: Asker, number: int, *, k: int, alpha: int, deadline: float, holders: int = 0,
        start: tuple[PeerId, ...] = (),
    ) -> None:  # fmt: skip
        self.copies: dict[int, Copy] = {}
        """the newest record of each owner"""
        self.holders: list[PeerId] = []
        """who gave records, in the order of their answers"""
        self.queries = 0
        self.hops = 0
        """rounds of alpha queries until the first holder answered; 0 while there is none"""
        self._asker = asker
        self._key = number.to_bytes(KEY_BYTES, "big")
        self._question = Find(self._key, holders > 0)
        self._number = number
        self._k = k
        self._alpha = alpha
        self._deadline = deadline
        self._wanted = holders
        self._order: list[tuple[int, PeerId]] = []
        self._states: dict[PeerId, _State] = {asker.peer.id: _State.FAILED}
        self._late_s: dict[PeerId, float] = {}
        self._grace_s = math.inf
        self._done = False
        self._group: TaskGroup | None = None
        self._pacer: TaskHandle | None = None
        self._add(start)
        self._add(asker.table.closest(number, k))
        self._add(asker.table.suspects(number, k))

    async def run(self, group: TaskGroup) -> None:
        """Search until done or until the deadline. Queries still under way then go on in `group`:
        their answers keep the table up to date."""
        self._group = group
        self._advance()
        if self._done:
            return
        self._pacer = group.start(self._pace(), isolate=True)
        try:
            await self._pacer.join()
        finally:
            self._done = True
            self._pacer.cancel()

    @property
    def closest(self) -> list[PeerId]:
        """The k closest nodes that answered, the closest first."""
        answered = (peer for _, peer in self._order if self._states[peer] is _State.ANSWERED)
        return [peer for peer, _ in zip(answered, range(self._k), strict=False)]

    @property
    def nearest_without(self) -> PeerId | None:
        """The closest node that answered and holds nothing: where a copy helps the next search."""
        return next((peer for peer in self.closest if peer not in self.holders), None)

    def _add(self, peers: tuple[int, ...] | tuple[PeerId, ...] | list[PeerId]) -> None:
        asker, states = self._asker, self._states
        for peer in peers[: self._k]:
            if peer in states:
                continue
            peer = PeerId(peer)
            number = asker.number(peer)
            if number is None:
                continue
            suspect = asker.table.is_suspect(number)
            states[peer] = _State.SUSPECT if suspect else _State.NEW
            insort(self._order, (number ^ self._number, peer))

    async def _pace(self) -> None:
        """Whenever answers are late, go on without them."""
        peer = self._asker.peer
        while not self._done:
            now_s = peer.now()
            if now_s + _TICK_S >= self._deadline:
                return
            due_s = min(self._late_s.values(), default=now_s + self._asker.patience_s)
            await peer.sleep_until(min(due_s, self._deadline))
            limit_s = peer.now() + _TICK_S
            for late in [each for each, at_s in self._late_s.items() if at_s <= limit_s]:
                del self._late_s[late]
                self._states[late] = _State.SLOW
                number = self._asker.number(late)
                if number is not None:
                    self._asker.table.silent(number)
            self._advance()

    def _advance(self) -> None:
        """Start what may be started, and see whether the search is over."""
        assert self._group is not None
        while not self._done:
            if self._wanted and len(self.holders) >= self._wanted:
                break
            if len(self._late_s) >= self._alpha:
                return
            peer = self._next()
            if peer is not None and self.queries < _MOST_QUERIES_PER_K * self._k:
                self.queries += 1
                self._states[peer] = _State.ASKED
                self._late_s[peer] = self._asker.peer.now() + self._asker.patience_s
                self._group.start(self._query(peer, self.queries), isolate=True)
                continue
            if self._late_s:
                return
            if self.holders or (self._answered and not self._wanted):
                if self._wanted or not self._slow_inside():
                    break
                now_s = self._asker.peer.now()
                self._grace_s = min(self._grace_s, now_s + _GRACE * self._asker.patience_s)
                if now_s + _TICK_S >= self._grace_s:
                    break
                return
            # Nobody quick is left. Those who were silent before may be back.
            states = self._states
            again = [peer for peer, state in states.items() if state is _State.SUSPECT]
            for peer in again:
                states[peer] = _State.NEW
            if not again:
                if _State.SLOW in states.values():
                    return
                break
        self._done = True
        if self._pacer is not None:
            self._pacer.cancel()

    @property
    def _answered(self) -> bool:
        return _State.ANSWERED in self._states.values()

    def _slow_inside(self) -> bool:
        """Whether a node that is slow would be among the k closest if it answered."""
        answered = 0
        for _, peer in self._order:
            state = self._states[peer]
            if state is _State.SLOW:
                return True
            answered += state is _State.ANSWERED
            if answered == self._k:
                return False
        return False

    def _next(self) -> PeerId | None:
        """The closest node that was not asked yet, if it is among the k closest that count."""
        counted = 0
        for _, peer in self._order:
            state = self._states[peer]
            if state is _State.NEW:
                return peer
            if state <= _State.ANSWERED:
                counted += 1
                if counted == self._k:
                    return None
        return None

    async def _query(self, peer: PeerId, place: int) -> None:
        answer = await self._asker.ask(peer, self._question)
        if self._done:
            return
        self._late_s.pop(peer, None)
        if isinstance(answer, Found):
            self._states[peer] = _State.ANSWERED
            self._add(answer.peers)
            self._take(peer, answer.copies, place)
        else:
            self._states[peer] = _State.FAILED
        self._advance()

    def _take(self, peer: PeerId, copies: tuple[Copy, ...], place: int) -> None:
        good = False
        for copy in copies if self._wanted else ():
            if not self._asker.accepts(self._key, copy):
                continue
            good = True
            owner = copy.record.owner
            known = self.copies.get(owner)
            if known is None or copy.record.version > known.record.version:
                self.copies[owner] = copy
        if good:
            if not self.holders:
                self.hops = math.ceil(place / self._alpha)
            self.holders.append(peer)
