"""One member of a group: it agrees with the others on what each iteration applies, and applies it.

The group is a replicated log (Ongaro and Ousterhout 2014) with one entry per iteration. Peer
`term % peers` is the sequencer of a term: it gathers the members' numbers and says which of them
count. An entry is applied at once, and is there for good when most of the group have it; a member's
numbers for the next iteration say so. So at most the last entry is not for good yet, and is undone
if another sequencer, which most of the group follow, ordered something else. Nobody keeps anything
for after a crash: who starts again holds nothing, has no vote, and is let in as a newcomer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shoal.base.errors import DecodeError, PeerError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Peer
from shoal.parts.zeroth_order.replay import Entry, unpack
from shoal.systems.compression import _just_one_byte_wire as wire
from shoal.systems.compression._just_one_byte_order import Sequencer
from shoal.systems.compression._just_one_byte_replica import Replica, entries_of
from shoal.systems.compression._just_one_byte_wire import (
    Ask,
    Beat,
    Drifted,
    Offer,
    Ordered,
    Vote,
    Want,
    Whole,
)

if TYPE_CHECKING:
    from shoal.kernel.peer import Envelope
    from shoal.systems.compression.just_one_byte import Bound

ANEW = -1
"""In place of an iteration: the weights, and the last entry."""


class Node:
    """What a peer holds, and how it follows; how it leads is in `Sequencer`."""

    def __init__(self, program: Bound, peer: Peer) -> None:
        self.program = program
        self.settings = program.settings
        self.peer = peer
        self.peers = len(peer.roster)
        self.replica = Replica(program, peer)
        self.last = program.iterations
        self.term = 0
        self.held = -1
        """the term in which the last entry was accepted"""
        self.holds = False
        """whether it has what a member has; without, it has no vote"""
        self.won = -1
        """the term that it is the sequencer of"""
        self.done = False
        self.heard_s = peer.now()
        self.stale = False
        """whether its weights are others than most hold"""
        self.attempts = 0
        self.sequencer = Sequencer(self)

    # Life.

    async def live(self) -> None:
        """Found the group or be let in; then apply entries until the last one."""
        peer = self.peer
        peer.serve(Beat, self._on_beat)
        peer.serve(Ask, self._on_ask)
        peer.serve(Want, self._on_want)
        peer.serve(Drifted, self._on_drifted)
        peer.enter_round(0)
        founder = peer.id < self.program.founders and peer.now() <= self.settings.founding_s
        if founder and peer.store.get("born") is None:
            await peer.store.commit({"born": b"1"})
            self.holds = True
            self.won = 0 if peer.id == 0 else -1
            # The first point of every curve: the model before anything is applied.
            peer.record("params", self.replica.params)
            await self.replica.estimate()
        else:
            await self._join()
        while self.holds and not self.done and not self.hopeless():
            if self.won == self.term:
                await self.sequencer.lead()
            else:
                await self._follow()
        self.replica.tell(self.done)
        if self.done:
            await self._linger()

    def hopeless(self) -> bool:
        """Whether nothing has happened for so long that nothing will."""
        return self.peer.now() - self.replica.progress_s > self.settings.give_up_s

    async def leave(self) -> None:
        """Say that this peer goes, so that nobody waits for it."""
        if self.holds and not self.done:
            await self.say(self._sequencer_id(), Beat(self.term, True, True))

    async def say(self, to: int, told: Any) -> None:
        if to != self.peer.id:
            await self.peer.send(PeerId(to), told)

    def _sequencer_id(self) -> int:
        return self.term % self.peers

    async def _join(self) -> None:
        """As a newcomer: ask one after the other, until the sequencer has let this peer in."""
        peer, born, target = self.peer, int(self.peer.now() * 1e6), 0
        while not self.hopeless():
            answer = None if target == peer.id else await self._request(target, born)
            if answer is not None and answer.iteration >= 0 and await self._take(answer):
                self.holds = True
                return
            if answer is None or answer.term % self.peers == peer.id:
                target = (target + 1) % self.peers
            else:
                target = answer.term % self.peers
            await peer.sleep_until(peer.now() + self.settings.retry_s / 2)

    async def _linger(self) -> None:
        """Tell those who have not heard it that the run is over."""
        over_s = self.peer.now() + self.settings.silence_s
        told = Ordered(self.term, self.last, b"")
        while (envelope := await self.peer.recv(Offer, deadline=over_s)) is not None:
            await self.say(envelope.source, told)

    # Following.

    async def _follow(self) -> None:
        """Offer, apply what is ordered, offer again; look after the sequencer."""
        await self._send_offer()
        while not self.done and self.won != self.term and not self.hopeless():
            retry_s = self.peer.now() + self.settings.retry_s
            envelope = await self.peer.recv(Ordered, deadline=retry_s)
            if envelope is None:
                if self._silent() and await self._election():
                    return
                await self._fetch(self._sequencer_id())
            elif not (told := envelope.message).entry:
                # Over, as the sender knows: what it has is for good, whatever its term.
                await self._fetch(envelope.source)
            elif told.term < self.term:
                continue
            else:
                if self.stale:
                    await self._fetch(envelope.source)
                if not await self._ordered(told):
                    await self._fetch(envelope.source)
            await self._send_offer()

    async def _send_offer(self) -> None:
        if self.done or self.won == self.term:
            return
        own = self.replica
        offer = Offer(self.term, own.end, self.held, own.codes, own.digest())
        await self.say(self._sequencer_id(), offer)

    async def _ordered(self, told: Ordered) -> bool:
        """Whether this peer now holds what the sequencer does."""
        group = self._group_before(told.iteration)
        if group is None:
            return False
        try:
            entries = entries_of(told.entry, group, self.program.number_bytes)
        except DecodeError:
            return False
        return await self._accept(told.term, told.iteration, entries)

    def _group_before(self, iteration: int) -> tuple[int, ...] | None:
        if self.replica.log.first <= iteration <= self.replica.log.end:
            return self.replica.log.group_before(iteration)
        return None

    async def _accept(self, term: int, iteration: int, entries: Sequence[Entry]) -> bool:
        """Make the log that of a term's sequencer, whose entries from an iteration on these are."""
        self.term, self.heard_s = term, self.peer.now()
        end, over = self.replica.log.end, iteration + len(entries)
        if iteration > end or (iteration == end > self.replica.log.first and self.held != term):
            return False
        if self.held < term and self.replica.log.entries:
            known = entries[end - 1 - iteration] if iteration < end <= over else None
            if known != self.replica.log.entries[-1] and (iteration < end):
                # Another sequencer ordered something else, or nothing, after what is for good.
                if self.replica.before is None or over < end - 1:
                    return False
                self.replica.undo()
                end -= 1
                if over == end:
                    await self.replica.estimate()
        fresh = entries[end - iteration :]
        if fresh:
            await self.replica.extend(fresh)
        self.held = term
        return True

    async def _fetch(self, source: int) -> None:
        """Get what this peer may have missed."""
        answer = None if source == self.peer.id else await self._request(source, -1)
        if answer is not None:
            if answer.iteration >= 0:
                await self._take(answer)
            elif answer.term > self.term:
                self.term = answer.term

    async def _request(self, source: int, born: int) -> Whole | None:
        start = max(self.replica.log.end - 1, self.replica.log.first) if born < 0 else 0
        start = ANEW if self.stale else start
        wanted = Want(self.term, start, born)
        deadline = self.peer.now() + self.settings.retry_s
        try:
            answer = await self.peer.request(PeerId(source), wanted, deadline=deadline)
        except PeerError:
            return None
        return answer if isinstance(answer, Whole) else None

    async def _take(self, whole: Whole) -> bool:
        """Take over entries, or weights and entries; whether that worked."""
        # What is over is for good, whatever this peer has promised since.
        term = max(self.term, whole.term) if whole.done else whole.term
        if term < self.term:
            return False
        before = wire.group_of(whole.before)
        if "params" in whole.weights:
            self.replica.begin_at(whole.iteration, before, whole.weights["params"])
            self.held, self.stale = term, False
        try:
            entries = unpack(bytes(whole.log.pack()), before, self.program.number_bytes)
        except DecodeError:
            return False
        if not entries and self.replica.log.end == whole.iteration:
            await self.replica.estimate()
        taken = await self._accept(term, whole.iteration, entries)
        if taken and whole.done:
            self.done = self.replica.log.end == self.last
        return taken

    # Another sequencer.

    def _silent(self) -> bool:
        patience = 1.0 + self.peer.uniform("patience", self.attempts)
        return self.peer.now() - self.heard_s > self.settings.silence_s * patience

    async def _election(self) -> bool:
        """Ask the group whether it would follow, and if most would, to do so."""
        peer, group = self.peer, self.replica.log.group
        self.attempts += 1
        target = self.term + 1
        target += (peer.id - target) % self.peers
        for trial in (True, False):
            if self.term >= target:
                return False
            if not trial:
                self.term = target
            ask = Ask(target, self.replica.log.end, self.held, trial, self.term)
            for other in group if peer.id in group else peer.roster:
                await self.say(other, ask)
            votes = {int(peer.id)} & set(group)
            deadline = peer.now() + self.settings.retry_s
            while 2 * len(votes) <= len(group):
                envelope = await peer.recv(Vote, deadline=deadline)
                if envelope is None or self.term > target:
                    return False
                vote = envelope.message
                if (vote.term, vote.trial) == (target, trial):
                    votes |= {int(envelope.source)} & set(group)
        self.won = target
        peer.record("sequencer", target)
        return True

    async def _on_ask(self, envelope: Envelope[Ask]) -> None:
        ask, source = envelope.message, envelope.source
        if not self.holds:
            return
        if self.done:
            await self.say(source, Ordered(self.term, self.last, b""))
            return
        if self.won == self.term:
            await self.sequencer.asked(source)
            self.term = max(self.term, ask.own)
            return
        quiet = self.peer.now() - self.heard_s > self.settings.silence_s
        if quiet and ask.term > self.term and (ask.held, ask.iteration) >= (
            self.held, self.replica.log.end,
        ):  # fmt: skip
            if not ask.trial:
                self.term, self.heard_s = ask.term, self.peer.now()
            await self.say(source, Vote(ask.term, ask.trial))

    async def _on_beat(self, envelope: Envelope[Beat]) -> None:
        beat, source = envelope.message, envelope.source
        if not self.holds:
            return
        if beat.back:
            self.sequencer.heard_from(source, beat.leaving)
            self.term = max(self.term, beat.term)
            return
        if beat.term >= self.term:
            self.term, self.heard_s = beat.term, self.peer.now()
        await self.say(source, Beat(self.term, True, False))

    async def _on_drifted(self, envelope: Envelope[Drifted]) -> None:
        told = envelope.message
        if told.term == self.term and self.holds:
            self.stale = True
            self.peer.record("drifted", told.iteration)

    async def _on_want(self, envelope: Envelope[Want]) -> Whole:
        want, source = envelope.message, envelope.source
        leads = self.holds and self.won == self.term
        if not (self.done or leads):
            return wire.nothing(self.term)
        if self.done or self.sequencer.lets_in(source, want.born):
            return self.whole(want.iteration, newcomer=want.born >= 0)
        return wire.nothing(self.term)

    def whole(self, start: int, *, newcomer: bool = False) -> Whole:
        """Entries from an iteration on; the weights before the last one where these are less."""
        cheaper = newcomer and self.settings.newcomers == "weights"
        if newcomer and self.settings.newcomers == "auto":
            cheaper = len(self.replica.log.pack()) > self.replica.params.nbytes
        if self.replica.log.first <= start <= self.replica.log.end and not (
            cheaper and self.replica.log.entries
        ):
            return wire.whole(self.replica.log, self.term, start, {}, self.done)
        if self.replica.before is None:
            return wire.nothing(self.term)
        weights = {"params": self.replica.before}
        return wire.whole(self.replica.log, self.term, self.replica.log.end - 1, weights, self.done)
