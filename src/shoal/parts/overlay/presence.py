"""What one peer of a sampled group knows: who is there, which round it is, who answers.

The common ground of methods that draw a sample per round without a coordinator: a membership view
that travels with messages, advertisements of joining and leaving, answers to pings, and SAMPLE.
Source: De Vos et al. 2023, MoDeST (arXiv 2302.13837), section on membership and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from shoal.base.errors import WireError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.overlay.live_sample import Answers, LiveSample, Ping, answer, hash_order, without
from shoal.parts.overlay.membership import Membership
from shoal.wire.message import Packed, message

_REMEMBERED = 21


@message
class Change:
    """A membership advertisement of its sender."""

    counter: int
    joined: bool
    round: int


class Presence:
    """A peer's own view, round estimate and membership counter, and the messages that keep them.

    members: who is in the first view; sampler: how pings are sent; inactivity_rounds: who was not
    active for longer is no candidate; ping_patience: once the slowest answers of two samples are
    known (`answered`), a ping waits for this multiple of the slowest of them, at most the sampler's
    own timeout (0 = always that); rounds: estimates beyond are damaged, and not believed;
    end_s: when to stop listening. Start `answer_pings` and `take_changes` as tasks.

    Records "met" (a peer's id) whenever it hears of a peer that it did not know, and "ping_wait_s"
    when a sample took more than one wave of pings. Assumes that at most one incarnation of a peer
    lives at a time.
    """

    def __init__(
        self, peer: Peer, members: Iterable[int], *, sampler: LiveSample, inactivity_rounds: int,
        rounds: int, end_s: float, ping_patience: float = 0.0,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.view = Membership.of(members)
        self.founder = peer.id in self.view
        self.round = 0
        self.counter = 0
        self.heard_s = peer.now()
        """when this peer was last asked or told something"""
        self.round_s: list[float] = []
        """the latest estimates of what a round takes"""
        self._sampler = sampler
        self._inactivity_rounds = inactivity_rounds
        self._ping_patience = ping_patience
        self._answered_s: list[float] = []
        self._rounds = rounds
        self._end_s = end_s
        self._pending: dict[PeerId, tuple[int, int]] = {}
        self._searches = self._adverts = 0
        self._news: tuple[int, float] | None = None

    def learn(self, round: int) -> None:
        """Somebody knows of this round; the estimate never goes down."""
        if not self.round < round < self._rounds:
            return
        now = self.peer.now()
        if self._news is not None:
            self.round_s.append((now - self._news[1]) / (round - self._news[0]))
            del self.round_s[:-_REMEMBERED]
        self._news = (round, now)
        self.round = round
        self._flush()

    def read(self, packed: Packed) -> bool:
        """Merge a view that came with a message; whether it was readable."""
        content: Any = packed.content
        if not isinstance(content, Membership):
            try:
                content = Membership.unpack(content)
            except WireError:
                return False
        self.heard_s = self.peer.now()
        self._merge(self.view.merge(content))
        own = self.view.state_of(self.peer.id)
        if own is not None and (own[0] > self.counter or not own[1]):
            # An earlier incarnation, whose store is lost, had counted further.
            self.counter = own[0] + 1
            self._enter(True)
        return True

    @property
    def ping_timeout_s(self) -> float:
        """How long to wait for the answer to a ping."""
        most = self._sampler.timeout_s
        if not self._ping_patience or len(self._answered_s) < 2:
            return most
        return min(most, self._ping_patience * max(self._answered_s))

    def answered(self, seconds: float) -> None:
        """The slowest answer that somebody's sample waited for; inf when one was missing."""
        if 0.0 < seconds < math.inf:
            self._answered_s.append(seconds)
            del self._answered_s[:-_REMEMBERED]

    def active(self, peer: PeerId, round: int) -> None:
        """A peer was seen to be active in a round."""
        self.view = self.view.seen((peer,), round)

    async def advertise(self, joined: bool, to: int) -> None:
        """Tell `to` random peers of the roster, whatever the view says of them."""
        self._enter(joined)
        self._adverts += 1
        salt = int(self.peer.uniform("advert", self.counter, self._adverts) * (1 << 53))
        others = without(hash_order(np.array(self.peer.roster, np.int64), salt), (self.peer.id,))
        change = Change(self.counter, joined, self.round)
        for other in others[:to]:
            await self.peer.send(PeerId(other), change)

    def order(self, label: int) -> list[int]:
        """All candidates for a round, in hash order."""
        known = self.view.candidates(label, self._inactivity_rounds)
        return hash_order(known, "sample", label).tolist()

    async def sample(self, label: int, count: int, excluded: Collection[int] = ()) -> Answers:
        """SAMPLE(label, count): the first live candidates that are not excluded."""
        self._flush()
        self.view = self.view.seen((self.peer.id,), self.round)
        self._searches += 1
        found = await self._sampler(
            self.peer, without(self.order(label), excluded), count, number=self._searches,
            round=self.round, counter=self.counter, timeout_s=self.ping_timeout_s,
        )  # fmt: skip
        if len(found.live) < count:
            # Everybody too slow looks like everybody dead: be patient again.
            self._answered_s.clear()
        for pong in found.pongs.values():
            self.learn(pong.round)
        self.view = self.view.seen(found.pongs, self.round)
        if found.waves > 1:
            self.peer.record("ping_wait_s", found.waited_s)
        return found

    async def answer_pings(self) -> None:
        """Until the end: say that one is there."""
        while (envelope := await self.peer.recv(Ping, deadline=self._end_s)) is not None:
            ping, source = envelope.message, envelope.source
            self.heard_s = self.peer.now()
            self.learn(ping.round)
            self.active(source, self.round)
            await answer(self.peer, source, ping, round=self.round, counter=self.counter)

    async def take_changes(self) -> None:
        """Until the end: note who joins and leaves. A leaver goes at once, a joiner waits for the
        next round, so that the sample of the running one stays what it is."""
        while (envelope := await self.peer.recv(Change, deadline=self._end_s)) is not None:
            change, source = envelope.message, envelope.source
            if not (0 <= change.round < self._rounds and 0 <= change.counter < 1 << 29):
                continue
            self.learn(change.round)
            round = self.round
            known = self.view.state_of(source)
            if known is not None and change.counter < known[0]:
                continue
            if change.joined:
                if known is None and source not in self._pending:
                    self.peer.record("met", source)
                self._pending[source] = (change.counter, round)
            else:
                self._pending.pop(source, None)
                self._merge(
                    self.view.changed(source, counter=change.counter, joined=False, round=round)
                )

    def _enter(self, joined: bool) -> None:
        """This peer's own entry, as it is now."""
        self.view = self.view.changed(
            self.peer.id, counter=self.counter, joined=joined, round=self.round
        )

    def _flush(self) -> None:
        for peer, (counter, round) in self._pending.items():
            self._merge(self.view.changed(peer, counter=counter, joined=True, round=round))
        self._pending.clear()

    def _merge(self, view: Membership) -> None:
        if len(view) > len(self.view):
            for peer in sorted(set(view.ids.tolist()) - set(self.view.ids.tolist())):
                if peer not in self._pending and peer != self.peer.id:
                    self.peer.record("met", peer)
        self.view = view
