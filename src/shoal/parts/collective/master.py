"""The master of a group: one state machine that counts votes and moves no tensors.

A peer is registered by its first status and accepted by the next `update_topology` of all. Every
transition fires when all accepted peers have voted for it; a peer that drops out leaves the vote
set, and what the others wait for is looked at again at once. Of each label at most one operation
runs in a group:

    initiate   all have voted with equal signatures     -> started, with a number and a ring
    perform    all survivors have the result            -> committed
               a participant was lost, gave up, or its
               link carries nothing                     -> aborted: every survivor keeps its input

Deaths show as missing statuses; there is no other source. PCCL (arXiv 2505.14065), sections on the
master and its micro-consensus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from msgspec import structs

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId
from shoal.base.limits import check_positive
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskHandle
from shoal.parts.collective._divergence import Wait, diverged
from shoal.parts.collective._links import Link, Strikes, broken_link
from shoal.parts.collective._orders import Orders
from shoal.parts.collective._wire import (
    ABORTED,
    COMMITTED,
    DIVERGED,
    DONE,
    FAILED,
    FEW,
    INITIATE,
    MISMATCH,
    STARTED,
    Ruling,
    Status,
    Vote,
    Word,
)
from shoal.parts.collective.search import Search
from shoal.parts.collective.shared_state import Election, dissenters

_PATIENCE = 6.0
_GROUP_PATIENCE = 3.0
_FORGET = 0.05
_GROUP_FORGETS = 0.005


@dataclass(frozen=True)
class Master:
    """The program of the peer that keeps the group together; it takes no part in the work.

    heartbeat_s: how often it looks at the time, and how often peers report (their own setting);
    timeout_s: silence after which a peer is dropped, longer by six times the lateness that its
    reports had of late, or by three times the greatest that anybody's had in the last half minute,
    as on machines at full load; stalled_s: how long an
    operation may stand still at some peer before it is aborted even without evidence of the broken
    link; diverged_s: how long peers may wait for different things. linger_s: it ends this long
    after the last peer has gone, and at end_s at the latest. search_s: how long a better order is
    sought in the background after `optimize_topology`, where the quick one may not be the best (0:
    not at all); what is found is adopted by the next call if nobody came or went.

    When its own turn comes late, as on a machine at full load, silence is not held against the
    peers for that time. A crash of the master ends the group: peers raise MasterLost and begin
    anew from their own checkpoints.

    >>> Master(timeout_s=0.6).heartbeat_s
    0.1
    """

    heartbeat_s: float = 0.1
    timeout_s: float = 0.6
    stalled_s: float = 20.0
    diverged_s: float = 60.0
    linger_s: float = 2.0
    end_s: float = float("inf")
    search_s: float = 30.0

    def __post_init__(self) -> None:
        check_positive("master", self, "heartbeat_s", "timeout_s", "stalled_s", "diverged_s",
                       "linger_s", "end_s")  # fmt: skip
        if not self.search_s >= 0:
            raise UsageError(f"master: search_s={self.search_s}; need seconds, or 0 for no search")
        if self.timeout_s < 2 * self.heartbeat_s:
            raise UsageError(
                f"master: timeout_s={self.timeout_s} is less than two heartbeats of "
                f"{self.heartbeat_s} s (raise it, or one late status drops a peer)"
            )

    async def run(self, peer: Peer) -> None:
        state = State(self, peer.now(), lambda name, who: peer.record(name, who))
        async with peer.tasks() as tasks:
            search: TaskHandle | None = None
            tick_s = peer.now() + self.heartbeat_s
            while not state.over(peer.now()):
                envelope = await peer.recv(Status, deadline=tick_s)
                now = peer.now()
                if envelope is not None:
                    state.heard(int(envelope.source), envelope.message, now)
                # A deadline is met to the nanosecond only.
                if envelope is None or now >= tick_s:
                    state.tick(now, now - tick_s)
                    tick_s = now + self.heartbeat_s
                for to, ruling in state.rulings():
                    await peer.send(PeerId(to), ruling)
                if state.orders.open_question() is not None and (search is None or search.done):
                    search = tasks.start(self._search(peer, state))
            if search is not None:
                search.cancel()

    async def _search(self, peer: Peer, state: State) -> None:
        """Answer one question after the other, between reports."""
        while (asked := state.orders.open_question()) is not None:
            wanted = partial(state.orders.wants, asked)
            found = await Search(self.search_s).run(peer, asked.cost, asked.known, wanted)
            state.orders.answered(asked, found)


@dataclass
class _Member:
    """A registered peer, accepted or not: what it last said, and what it was told."""

    status: Status
    heard_s: float
    late_s: float = 0.0
    """the longest pause between its statuses beyond what is due, forgotten by a twentieth a time"""
    told_s: float = float("-inf")
    accepted: bool = False
    answered: int = 0
    answer: str = ""
    detail: bytes = b""
    words: dict[int, Word] = field(default_factory=dict)
    since_s: dict[tuple[str, int], float] = field(default_factory=dict)
    told: Ruling | None = None
    asked: bool = True
    number: int = 0

    @property
    def call(self) -> str:
        """The joint call that it waits in, unless it has been answered."""
        return self.status.call if self.status.turn > self.answered else ""

    def names(self, wait: tuple[str, int]) -> Wait:
        """The same for all who wait for the same, although they may count it otherwise."""
        return ("call", self.call) if wait[0] == "call" else wait

    def vote(self, label: int) -> Vote | None:
        return next((vote for vote in self.status.votes if vote.label == label), None)

    def opens(self, label: int) -> Vote | None:
        """Its vote to begin, unless that operation is decided or running."""
        vote, word = self.vote(label), self.words.get(label)
        fresh = vote is not None and (word is None or vote.serial > word.serial)
        return vote if fresh else None


class State:
    """The votes and what follows from them, without time or network of its own."""

    def __init__(self, settings: Master, now_s: float, record: Callable[[str, int], None]) -> None:
        self.members: dict[int, _Member] = {}
        self.order: list[int] = []
        """accepted peers of all groups in the order of their rings"""
        self.orders = Orders(settings.search_s > 0)
        self._epochs: dict[int, int] = {}
        """how often each group's ring has changed"""
        self._settings = settings
        self._record = record
        self._gone: dict[int, int] = {}
        self._refused: list[tuple[int, Ruling]] = []
        self._running: dict[tuple[int, int], Word] = {}
        self._operations = 0
        self._strikes = Strikes()
        self._elections: dict[int, Election] = {}
        self._last_s = now_s
        self._met = False
        self._group_late_s = 0.0
        """the longest pause of anybody's statuses, and of this master, that is not forgotten"""
        self._now_s = now_s

    # What happens.

    def over(self, now_s: float) -> bool:
        """Whether everybody has gone and nobody came for `linger_s`."""
        if self.members:
            self._last_s = now_s
        past = now_s >= self._settings.end_s
        return past or (self._met and now_s - self._last_s > self._settings.linger_s)

    def heard(self, source: int, status: Status, now_s: float) -> None:
        """A status arrived; older ones than the last are of no interest."""
        self._now_s = now_s
        member = self.members.get(source)
        if member is not None and status.session > member.status.session:
            # A new incarnation: the one before is dead.
            self._drop(source)
            member = None
        if member is None:
            # A peer with more than a first call behind it was let in by an earlier life of this
            # master, which knew what it waits for.
            begins = status.turn == 0 or (status.turn == 1 and status.call == "update_topology")
            known = status.session <= self._gone.get(source, -1)
            if known or status.leaving or not begins:
                self._refused.append((source, _unknown(status)))
                return
            member = self.members[source] = _Member(status, now_s)
            self._met = True
        elif status.session < member.status.session or status.number < member.status.number:
            return
        elif status.leaving:
            member.status = status
            self._drop(source)
            self._settle()
            return
        member.status = status
        pause_s = now_s - member.heard_s - self._settings.heartbeat_s
        member.late_s = max(pause_s, (1.0 - _FORGET) * member.late_s)
        self._group_late_s = max(pause_s, self._group_late_s)
        member.heard_s = now_s
        # Its reports come often, and most need no answer but the sign of life.
        member.asked = now_s - member.told_s > self._settings.heartbeat_s / 2
        self._settle()

    def tick(self, now_s: float, late_s: float) -> None:
        """Look at the time. `late_s`: how long this look was overdue."""
        self._now_s = now_s
        self._group_late_s = max(late_s, (1.0 - _GROUP_FORGETS) * self._group_late_s)
        for peer, member in list(self.members.items()):
            member.heard_s += max(0.0, late_s)
            # What held up one of them on a busy machine may hold up another one next.
            patience_s = self._settings.timeout_s + max(
                _PATIENCE * member.late_s, _GROUP_PATIENCE * self._group_late_s
            )
            if now_s - member.heard_s > patience_s:
                self._drop(peer)
        self._give_up_stalled()
        self._find_divergence()
        self._settle()

    def rulings(self) -> Iterator[tuple[int, Ruling]]:
        """What is to be sent: answers, and news for those whom they concern."""
        out, self._refused = self._refused, []
        yield from out
        for peer, member in self.members.items():
            ruling = self._ruling(peer, member)
            if member.asked or _is_news(ruling, member.told):
                member.asked = False
                member.told = ruling
                member.told_s = self._now_s
                member.number += 1
                yield peer, structs.replace(ruling, number=member.number)  # type: ignore[type-var]

    # Who is there.

    def _drop(self, peer: int) -> None:
        member = self.members.pop(peer)
        self._gone[peer] = member.status.session
        if not member.status.leaving:
            self._refused.append((peer, _unknown(member.status)))
        if member.accepted:
            self.order.remove(peer)
            self._changed(member.status.group)
            self._forget_empty(member.status.group)
            self._record("left" if member.status.leaving else "dropped", peer)
        self._strikes.forget(peer)

    def _changed(self, group: int) -> None:
        """A group has other members; other groups do not notice."""
        self.orders.changed(group)
        self._turned(group)

    def _turned(self, group: int) -> None:
        """A group's ring is another one."""
        self._epochs[group] = self._epochs.get(group, 0) + 1

    def _forget_empty(self, group: int) -> None:
        """Who comes after the last member finds no revision that somebody still has."""
        if not self._accepted(group):
            self._elections.pop(group, None)

    def _accepted(self, group: int | None = None) -> dict[int, _Member]:
        return {
            peer: self.members[peer]
            for peer in self.order
            if group is None or self.members[peer].status.group == group
        }

    def _groups(self) -> list[int]:
        return sorted({self.members[peer].status.group for peer in self.order})

    # What follows.

    def _settle(self) -> None:
        """Fire transitions until none is left."""
        fired = True
        while fired:
            fired = self._joint()
            for group in self._groups():
                fired |= self._operate(group)

    def _joint(self) -> bool:
        everybody = self._accepted()
        calls = {member.call for member in everybody.values()}
        if not everybody:
            return self._admit()
        if len(calls) == 1 and calls != {""}:
            (call,) = calls
            if call == "update_topology":
                return self._admit()
            if call == "peers_pending":
                waiting = len(self.members) > len(everybody)
                return self._answer(everybody, "ok", bytes([waiting]))
            if call == "measure":
                # All groups measure as often as the largest needs, whoever is lost meanwhile.
                most = max(len(self._accepted(group)) for group in self._groups())
                return self._answer(everybody, "ok", most.to_bytes(4, "little"))
            if call == "measured":
                self._optimise(everybody)
                return self._answer(everybody, "ok")
        for group in self._groups():
            members = self._accepted(group)
            calls = {member.call for member in members.values()}
            if calls == {"sync"}:
                return self._elect(group, members)
            if calls == {"synced"}:
                whole = all(member.status.detail == b"ok" for member in members.values())
                election = self._elections[group]
                self._elections[group] = election.committed() if whole else election.failed()
                return self._answer(members, "ok" if whole else "failed")
        return False

    def _answer(self, members: dict[int, _Member], answer: str, detail: bytes = b"") -> bool:
        for member in members.values():
            member.answered, member.answer = member.status.turn, answer
            member.detail = detail
        return bool(members)

    def _admit(self) -> bool:
        fresh = {
            peer: member
            for peer, member in sorted(self.members.items())
            if not member.accepted and member.call == "update_topology"
        }
        everybody = self._accepted()
        for peer, member in fresh.items():
            member.accepted = True
            self.order.append(peer)
            self._record("accepted", peer)
        for group in {member.status.group for member in fresh.values()}:
            self._changed(group)
        return self._answer({**everybody, **fresh}, "ok")

    def _operate(self, group: int) -> bool:
        members = self._accepted(group)
        labels = {vote.label for member in members.values() for vote in member.status.votes}
        labels |= {label for of, label in self._running if of == group}
        # One of them may drop a peer, of whom the next must not count the vote.
        fired = [self._step(group, label) for label in sorted(labels)]
        return any(fired)

    def _step(self, group: int, label: int) -> bool:
        members = self._accepted(group)
        word = self._running.get((group, label))
        if word is not None:
            return self._conclude(group, word, members)
        opening = {peer: member.opens(label) for peer, member in members.items()}
        votes = {peer: vote for peer, vote in opening.items() if vote is not None}
        if not votes or len(votes) < len(members):
            return False
        state = STARTED
        epoch = self._epochs[group]
        first = next(iter(votes.values()))
        differ = dissenters({peer: vote.signature for peer, vote in votes.items()})
        if differ:
            state = MISMATCH
        elif len(members) < 2:
            state = FEW
        elif all(_did(vote, first.after, epoch) for vote in votes.values()):
            state = COMMITTED
        ring = tuple(members)
        number = 0
        if state in (STARTED, COMMITTED):
            self._operations += 1
            number = self._operations
        if state == STARTED:
            self._running[group, label] = Word(label, 0, number, STARTED, ring)
        for peer, vote in votes.items():
            members[peer].words[label] = Word(
                label, vote.serial, number, state, ring, epoch,
                tuple((other, votes[other].signature) for other in differ),
            )  # fmt: skip
        return True

    def _conclude(self, group: int, word: Word, members: dict[int, _Member]) -> bool:
        alive = {
            peer: members[peer]
            for peer in word.ring
            if peer in members
            and (told := members[peer].words.get(word.label)) is not None
            and told.operation == word.operation
        }
        votes: dict[int, Vote] = {}
        gave_up = False
        for peer, member in alive.items():
            vote = member.vote(word.label)
            if vote is None or vote.serial != member.words[word.label].serial:
                gave_up = True
            else:
                if vote.operation != word.operation:
                    # Said before it knew of the operation; what it did without is of no use.
                    vote = Vote(vote.label, vote.serial, INITIATE, vote.signature)
                votes[peer] = vote
                gave_up |= vote.phase == FAILED
        if not gave_up and all(vote.phase == DONE for vote in votes.values()):
            return self._decide(group, word, alive, COMMITTED)
        if len(alive) == len(word.ring):
            broken = broken_link(word, votes)
            if broken is not None:
                self._decide(group, word, alive, ABORTED)
                self._strike(broken)
                return True
        if gave_up or len(alive) < len(word.ring):
            return self._decide(group, word, alive, ABORTED)
        return False

    def _decide(self, group: int, word: Word, alive: dict[int, _Member], state: int) -> bool:
        del self._running[group, word.label]
        for member in alive.values():
            serial = member.words[word.label].serial
            member.words[word.label] = Word(
                word.label, serial, word.operation, state, (), self._epochs[group]
            )
        if state == COMMITTED:
            self._strikes.clear(word.ring)
        return True

    # Links that carry nothing or damaged pieces, and waits that lead nowhere.

    def _strike(self, link: Link) -> None:
        """Lead the ring around a link; drop an end of one that stays in the way."""
        self._record("broken_link", link[1])
        group = self.members[link[1]].status.group
        ring, bad = self._strikes.strike(link, list(self._accepted(group)))
        self._reorder(group, ring)
        if bad is not None:
            self._drop(bad)

    def _reorder(self, group: int, ring: list[int]) -> None:
        others = [peer for peer in self.order if peer not in ring]
        self.order = others + ring
        self._turned(group)

    def _give_up_stalled(self) -> None:
        for (group, label), word in list(self._running.items()):
            members = self._accepted(group)
            for peer in word.ring:
                member = members.get(peer)
                vote = member.vote(label) if member is not None else None
                if member is None or vote is None:
                    continue
                if not vote.stalled:
                    member.since_s.pop(("stalled", label), None)
                    continue
                since = member.since_s.setdefault(("stalled", label), self._now_s)
                if self._now_s - since > self._settings.stalled_s:
                    alive = {
                        p: m for p, m in members.items()
                        if (w := m.words.get(label)) is not None and w.operation == word.operation
                    }  # fmt: skip
                    member.since_s.clear()
                    self._decide(group, word, alive, ABORTED)
                    break

    def _find_divergence(self) -> None:
        """Two accepted peers that have long waited for different things wait for ever."""
        old: dict[int, set[tuple[str, int]]] = {}
        for peer, member in self._accepted().items():
            waits = {("call", member.status.turn)} if member.call else set()
            waits |= {
                ("vote", vote.label) for vote in member.status.votes if member.opens(vote.label)
            }
            kept = {k: s for k, s in member.since_s.items() if k in waits or k[0] == "stalled"}
            member.since_s = {**dict.fromkeys(waits, self._now_s), **kept}
            limit = self._now_s - self._settings.diverged_s
            if found := {wait for wait in waits if member.since_s[wait] < limit}:
                old[peer] = found
        told = diverged(
            {peer: frozenset(map(self.members[peer].names, waits)) for peer, waits in old.items()},
            {peer: self.members[peer].status.group for peer in old},
        )
        for peer in sorted(told):
            member = self.members[peer]
            for kind, number in old[peer]:
                if kind == "call":
                    self._answer({peer: member}, "diverged")
                elif (vote := member.opens(number)) is not None:
                    member.words[number] = Word(number, vote.serial, 0, DIVERGED)

    # Shared state and topology.

    def _elect(self, group: int, members: dict[int, _Member]) -> bool:
        election = self._elections.get(group, Election())
        offers = {peer: member.status.detail for peer, member in members.items()}
        outcome = election.held(offers)
        self._elections[group] = outcome.election
        for peer, (answer, detail) in outcome.answers.items():
            self._answer({peer: members[peer]}, answer, detail)
        for peer in outcome.violators:
            self._record("violated_revision", peer)
            self.order.remove(peer)
            self.members[peer].accepted = False
            self._changed(group)
        self._forget_empty(group)
        return True

    def _optimise(self, members: dict[int, _Member]) -> None:
        for peer, member in members.items():
            self.orders.measured(peer, member.status.detail)
        for group in self._groups():
            sessions = tuple((peer, m.status.session) for peer, m in self._accepted(group).items())
            ring, adopted = self.orders.best(group, sessions)
            if adopted:
                self._record("adopted", group)
            self._reorder(group, ring)

    def _ruling(self, peer: int, member: _Member) -> Ruling:
        group = member.status.group
        ring = tuple(self._accepted(group)) if member.accepted else ()
        listed = {(vote.label, vote.serial) for vote in member.status.votes}
        words = tuple(w for w in member.words.values() if (w.label, w.serial) in listed)
        return Ruling(
            member.status.session, 0, True, member.accepted, self._epochs.get(group, 0), ring,
            len(self.order), member.answered, member.answer, member.detail, words,
        )  # fmt: skip


def _did(vote: Vote, after: int, epoch: int) -> bool:
    """Whether a peer has the result already, of the peers that are in the ring now."""
    return vote.phase == DONE and vote.after == after > 0 and vote.epoch == epoch


def _unknown(status: Status) -> Ruling:
    return Ruling(status.session, 0, False, False, 0, (), 0, 0, "", b"", ())


def _is_news(ruling: Ruling, told: Ruling | None) -> bool:
    """Whether it says more than what was told; that it repeats a word no longer is no news."""
    if told is None or any(word not in told.words for word in ruling.words):
        return True
    return structs.replace(ruling, words=told.words) != told  # type: ignore[type-var]
