"""The sequencer of a term: whose numbers count in each iteration, and who is a member."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from shoal.parts.zeroth_order.replay import Entry
from shoal.systems.compression import _just_one_byte_wire as wire
from shoal.systems.compression._just_one_byte_wire import (
    Beat,
    Drifted,
    Offer,
    Ordered,
)

if TYPE_CHECKING:
    from shoal.systems.compression._just_one_byte_peer import Node


class Sequencer:
    """What a peer knows of the others while it leads.

    The group changes by one member per entry, and only between entries that most of the group hold,
    so that any two majorities, of groups that follow each other, share a member.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.heard_s: dict[int, float] = {}
        self.told_s: dict[int, float] = {}
        self.waiting: dict[int, int] = {}
        """who wants to be let in, and when its life began (-1: it holds what it held)"""
        self.let_in: dict[int, int] = {}
        self.leaving: set[int] = set()

    async def lead(self) -> None:
        """Order entries, until the last one or until somebody else does."""
        node, term = self.node, self.node.term
        now = node.peer.now()
        self.heard_s = dict.fromkeys(node.replica.log.group, now)
        self.let_in.clear()
        if node.replica.log.entries and node.held != term:
            # What an earlier sequencer ordered last may not be for good: order it anew.
            node.held = term
            await self._repeat(node.replica.log.group)
        async with node.peer.tasks() as group:
            beats = group.start(self._beats(term))
            await self._order(term)
            beats.cancel()

    async def _order(self, term: int) -> None:
        node = self.node
        while node.term == term and not node.hopeless():
            now = node.replica.log.end
            offers = await self._collect(term, now)
            if offers is None:
                return
            if now == node.last:
                node.done = True
                for member in node.replica.log.group:
                    await self._say(member, Ordered(term, now, b""))
                return
            await self._check(offers)
            before = node.replica.log.group
            group = self._next_group(before)
            machines = tuple(sorted(m for m in offers if m in group))
            entry = Entry(group, machines, b"".join(offers[m].codes for m in machines))
            ordered = Ordered(term, now, entry.pack(before))
            for member in group:
                await self._say(member, ordered)
            await node.replica.extend([entry])
            node.held = term
            for member in set(group) - set(before):
                self.let_in[member] = self.waiting.pop(member, -1)

    async def _collect(self, term: int, now: int) -> dict[int, Offer] | None:
        """Numbers for an iteration: of all, or of most and who else came within `wait_s`."""
        node, settings = self.node, self.node.settings
        peer, group = node.peer, node.replica.log.group
        own = Offer(term, now, node.held, node.replica.codes, node.replica.digest())
        offers = {int(peer.id): own} if peer.id in group else {}
        most_s = None
        while node.term == term:
            missing = [m for m in group if m not in offers and m not in self.leaving]
            most = 2 * len(offers) > len(group)
            if most and not missing:
                return offers
            if most and most_s is None:
                most_s = peer.now()
            wait_s = settings.retry_s if most_s is None else most_s + settings.wait_s - peer.now()
            envelope = await peer.recv(Offer, deadline=peer.now() + max(0.0, wait_s))
            if envelope is None:
                if most:
                    return offers if node.term == term else None
                if node.hopeless():
                    return None
                await self._repeat(missing)
                continue
            offer, source = envelope.message, int(envelope.source)
            self.heard_s[source] = peer.now()
            node.term = max(node.term, offer.term)
            if source in group and self._fits(offer, term, now):
                offers[source] = offer
        return None

    def _fits(self, offer: Offer, term: int, now: int) -> bool:
        node = self.node
        if (offer.term, offer.iteration) != (term, now):
            return False
        if node.replica.log.entries and offer.held != term:
            return False
        return len(offer.codes) == (node.program.number_bytes if now < node.last else 0)

    async def _check(self, offers: dict[int, Offer]) -> None:
        """Compare the weights of those who gave a digest; who differs from most gets theirs."""
        node = self.node
        found = Counter(offer.digest for offer in offers.values() if offer.digest)
        if len(found) < 2:
            return
        common = max(found, key=lambda digest: (found[digest], digest))
        if wire.digest(node.replica.params) != common:
            node.peer.record("drifted", 1.0)
            node.replica.heal()
        for member, offer in offers.items():
            if offer.digest not in (0, common) and member != node.peer.id:
                await self._say(member, Drifted(node.term, node.replica.log.end))

    def _next_group(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """The group with one member less or one more, if somebody went or wants to come."""
        node = self.node
        now = node.peer.now()
        for member in group:
            silent = now - self.heard_s.setdefault(member, now) > node.settings.silence_s
            # A newcomer that is in the group is one that has forgotten all: it must be let in anew,
            # for what it promised and acknowledged before counts no more.
            forgot = self.waiting.get(member, -1) >= 0
            if member != node.peer.id and (silent or forgot or member in self.leaving):
                self.leaving.discard(member)
                return tuple(m for m in group if m != member)
        for newcomer in self.waiting:
            if newcomer not in group:
                self.heard_s[newcomer] = now
                return tuple(sorted((*group, newcomer)))
        return group

    async def _repeat(self, members: tuple[int, ...] | list[int]) -> None:
        """Tell the last entry again."""
        node = self.node
        if node.replica.log.entries:
            before = node.replica.log.group_before(node.replica.log.end - 1)
            entry = node.replica.log.entries[-1].pack(before)
            ordered = Ordered(node.term, node.replica.log.end - 1, entry)
            for member in members:
                await self._say(member, ordered)

    async def _beats(self, term: int) -> None:
        """Signs of life to those who have not heard or said anything for a while."""
        node, peer = self.node, self.node.peer
        pause_s = node.settings.silence_s / 4
        while True:
            await peer.sleep_until(peer.now() + pause_s)
            now = peer.now()
            for member in node.replica.log.group:
                told = now - self.told_s.get(member, -1e9) < pause_s
                heard = now - self.heard_s.get(member, now) < 2 * pause_s
                if not (told and heard):
                    await self._say(member, Beat(term, False, False))

    async def _say(self, to: int, told: Ordered | Beat | Drifted) -> None:
        self.told_s[to] = self.node.peer.now()
        await self.node.say(to, told)

    # What others say.

    def heard_from(self, source: int, leaving: bool) -> None:
        """A member is alive, or goes."""
        self.heard_s[source] = self.node.peer.now()
        if leaving:
            self.leaving.add(source)

    async def asked(self, source: int) -> None:
        """Somebody looks for a sequencer: it is here."""
        if source in self.node.replica.log.group:
            await self._say(source, Beat(self.node.term, False, False))
        else:
            self.waiting.setdefault(source, -1)

    def lets_in(self, source: int, born: int) -> bool:
        """Whether a peer may have the log: a member, or a newcomer that was let in."""
        if born < 0:
            if source not in self.node.replica.log.group:
                self.waiting.setdefault(source, -1)
            return True
        if source in self.node.replica.log.group and self.let_in.get(source) == born:
            return True
        self.waiting[source] = born
        return False
