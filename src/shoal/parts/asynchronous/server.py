"""The server's side as a peer program: hear, decide, make a version, commit, and only then answer.

Calls are handled one at a time. What a call leads to (a work taken, a new version, what the rule
remembers) is committed in one go before anybody is told, so that a server that crashes in between
has either done all of it or nothing, and clients who ask again find out which.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shoal.base.ids import PeerId
from shoal.kernel.peer import Cost, Envelope, Peer
from shoal.parts.asynchronous._messages import Answer, Bye, Call, Finished
from shoal.parts.asynchronous.desk import BROKEN, Desk
from shoal.parts.asynchronous.rule import Action, Advance, Delta, Drop, Moment, Rule
from shoal.parts.asynchronous.versions import Versions
from shoal.tensor import tree
from shoal.tensor.types import Index, Vector, Weight

if TYPE_CHECKING:
    from shoal.parts.asynchronous.learning import Learning

FAREWELLS = 3
"""How often a client that does not answer is told that it is over."""
_TIE_S = 1e-9


def advance(
    params: Vector, state: Any, vectors: tuple[Tensor, ...], weights: Weight, clients: Index,
    rule: Rule,
) -> tuple[Vector, Any]:  # fmt: skip
    """`rule.step` on the vectors of one version."""
    stacked = torch.stack(vectors) if vectors else params.new_empty((0, *params.shape))
    return rule.step(params, state, stacked, weights, clients)


class Server:
    """One life of the server."""

    def __init__(self, learning: Learning, peer: Peer) -> None:
        self.learning = learning
        self.peer = peer
        self.terms = learning.terms
        self.clients = learning.clients(peer.roster)
        self.versions_due = learning.workload.rounds
        self.end_s = float("inf")
        if learning.workload.seconds is not None:
            self.end_s = learning.workload.seconds
        self.state = learning.rule.init(learning.initial, self.clients)
        self.course = learning.rule.course(self.clients)
        self.waiting: set[int] = set()
        """clients who asked and were given nothing yet"""
        self.vain: set[int] = set()
        """clients whose last work was broken"""
        self.heard_s = peer.now()
        self._stale = True
        """whether the store lacks something"""
        self._written: list[Tensor | None] = []
        """leaves of the rule's state as the store holds them"""
        self._answers: list[tuple[int, Answer]] = []
        self._rows: list[tuple[str, float, dict[str, str]]] = []

    @property
    def over(self) -> bool:
        """Whether all versions are made."""
        return self.versions_due is not None and self.versions.version >= self.versions_due

    @property
    def moment(self) -> Moment:
        return Moment(self.peer.now(), self.versions.version)

    async def run(self) -> None:
        """Until the horizon, or until nothing has come for a long time; then say goodbye."""
        peer = self.peer
        await self._begin()
        while not self.over and not self.desk.finished:
            idle_s = self.heard_s + 2.0 * self.terms.give_up_s
            until_s = min(self.course.due_s, self.end_s, idle_s)
            envelope = None
            # What is due comes before mail that has been waiting.
            if self.course.due_s > peer.now():
                envelope = await peer.recv(Call, deadline=until_s)
            if envelope is not None:
                for each in await self._with_ties(envelope):
                    await self._hear(each)
            elif self.course.due_s <= until_s:
                await self._carry_out(self.course.timed(Moment(until_s, self.versions.version)))
                await self._settle()
            else:
                break
        await self._finish()

    # A life begins.

    async def _begin(self) -> None:
        workload, peer = self.learning.workload, self.peer
        stored = peer.store.get
        fresh = stored("books") is None
        if fresh:
            # No two stores of a run begin at the same moment, and 0 stands for "unknown".
            origin = 1 + max(0, round(peer.now() * 1e9))
            self.versions = Versions(self.learning.initial, origin)
        else:
            self.versions = Versions.load(stored, workload.there)
        self.desk = Desk(self.versions, self.clients, self.learning.rule.staleness)
        if not fresh:
            self.desk.load(stored, workload.there)
            leaves, structure = tree.flatten(self.state)
            found = [workload.there(stored(f"rule/{i}")) for i in range(len(leaves))]
            self.state = tree.unflatten(structure, found)
            self._written = list(found)
            kept = sorted(self.desk.kept.values(), key=lambda each: each.arrived_s)
            self.course.load(stored("course"), kept)
        peer.enter_round(self.versions.version)
        await self._settle()

    # Calls.

    async def _with_ties(self, envelope: Envelope[Call]) -> list[Envelope[Call]]:
        """The call with those of the same moment, in the order of clients, if the terms ask so."""
        if not self.terms.ties:
            return [envelope]
        found, peer = [envelope], self.peer
        now_s = peer.now()
        await peer.sleep_until(now_s + _TIE_S)
        while (more := await peer.recv(Call, deadline=now_s)) is not None:
            found.append(more)
        return sorted(found, key=lambda each: each.source)

    async def _hear(self, envelope: Envelope[Call]) -> None:
        call, client = envelope.message, int(envelope.source)
        if self.over or client not in self.desk.settled:
            return
        now_s, verdict = self.peer.now(), ""
        idle = client in self.waiting
        if call.work:
            vector = self.learning.opened(call.payload)
            verdict, delta = self.desk.receive(client, call, vector, now_s)
            idle = verdict == BROKEN
            (self.vain.add if idle else self.vain.discard)(client)
            self._stale |= self.desk.settled[client] == call.number and verdict != "duplicate"
            if delta is not None:
                await self._carry_out(self.course.arrived(delta, self.moment))
        if not idle and client not in self.vain:
            # Who only waits for others, and says so again, is no sign of progress; nor is work on
            # a model from which everybody's numbers go to infinity.
            self.heard_s = now_s
        if call.asks and self._wants(client, call):
            await self._asked(client, call, verdict)
        if call.work and not self._answered(client):
            self._answer(client, call.number, verdict)
        await self._settle()

    def _wants(self, client: int, call: Call) -> bool:
        """Whether the client lacks a model; one whose later request was answered does not."""
        last = self.desk.settled[client]
        if call.origin != self.versions.origin or call.number == 0:
            return True
        return call.number == last if call.work else call.number > last

    async def _asked(self, client: int, call: Call, verdict: str) -> None:
        number = self.desk.settled[client] + 1
        sent = self.desk.sent.get(client)
        if sent is not None and sent[0] == number:
            # It was lost, or crossed the question: the same again, with the newest model.
            self._give(client, sent[1], call.number, verdict)
            return
        if client not in self.waiting:
            self.waiting.add(client)
            await self._carry_out(self.course.asked(client, self.moment))
        if not self._answered(client):
            self._answer(client, call.number, verdict or "held")

    # Actions.

    async def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Advance):
                if not self.over:
                    await self._advance(action)
            elif isinstance(action, Drop):
                self.desk.use([action.delta], "dropped")
                self._row("dropped", action.delta.number, [action.delta], reason=action.reason)
            else:
                self._give(action.client, action.steps, self.desk.settled[action.client], "")

    async def _advance(self, action: Advance) -> None:
        peer, versions = self.peer, self.versions
        deltas = list(action.deltas)
        place = self.learning.workload.there
        weights = place(torch.tensor(list(action.weights), dtype=torch.float64, device="cpu"))
        who = place(torch.tensor([d.client for d in deltas], dtype=torch.int64, device="cpu"))
        vectors = tuple(delta.vector for delta in deltas)
        # Every number is read once: bound by memory.
        cost = Cost(bytes=float(sum(vector.nbytes for vector in (versions.params, *vectors))))
        params, state = await peer.compute(
            advance, versions.params, self.state, vectors, weights, who,
            static=(self.learning.rule,), cost=cost, batch="never",
        )  # fmt: skip
        self._stale = True
        if not bool(params.isfinite().all()):
            # Each was finite, their sum is not: nobody may learn from such a model.
            self.desk.use(deltas, "dropped")
            self._row("dropped", len(deltas), deltas, reason="overflow")
            return
        late = [versions.version - delta.version for delta in deltas]
        self.state = state
        versions.advance(params)
        self.desk.use(deltas)
        self._row("applied", versions.version, deltas, late=" ".join(map(str, late)))
        if late:
            self._row("staleness", sum(late) / len(late))
        if versions.version % self.learning.workload.report_every == 0 or self.over:
            # The round that ends with this version.
            peer.record("params", params)
        if not self.over:
            peer.enter_round(versions.version)

    # What happens together: the commit first.

    def _give(self, client: int, steps: int, about: int, verdict: str) -> None:
        number = self.desk.settled[client] + 1
        self.waiting.discard(client)
        self.desk.sent[client] = (number, steps)
        self._answers = [each for each in self._answers if each[0] != client]
        self._answer(client, about, verdict, steps, given=True)

    def _answer(
        self, client: int, about: int, verdict: str, steps: int = 0, *, given: bool = False
    ) -> None:
        versions = self.versions
        answer = Answer(
            about, verdict, self.desk.settled[client] + 1, versions.origin, versions.version,
            steps, versions.params if given else None,
        )  # fmt: skip
        self._answers.append((client, answer))

    def _answered(self, client: int) -> bool:
        return any(each[0] == client for each in self._answers)

    def _row(self, name: str, value: float, deltas: Iterable[Delta] = (), **labels: str) -> None:
        names = " ".join(delta.name for delta in deltas)
        self._rows.append((name, float(value), {**labels, "works": names} if names else labels))

    async def _settle(self) -> None:
        """Commit, then report, then answer."""
        if self._stale:
            await self.peer.store.commit(self._items())
            self._stale = False
        rows, self._rows = self._rows, []
        for name, value, labels in rows:
            self.peer.record(name, value, **labels)
        answers, self._answers = self._answers, []
        if self.over:
            # Everybody is told so in a moment.
            return
        for client, answer in answers:
            await self.peer.send(PeerId(client), answer)

    def _items(self) -> dict[str, Any]:
        leaves, _ = tree.flatten(self.state)
        known = self._written or [None] * len(leaves)
        items: dict[str, Any] = {
            f"rule/{i}": leaf
            for i, (leaf, old) in enumerate(zip(leaves, known, strict=True))
            if leaf is not old
        }
        self._written = list(leaves)
        return {
            **items, **self.desk.items(), **self.versions.items(), "course": self.course.save(),
        }  # fmt: skip

    # The end.

    async def _finish(self) -> None:
        """Report how it went, and tell every client, until it has said that it knows."""
        peer, versions, desk = self.peer, self.versions, self.desk
        if not desk.finished:
            desk.finished = self._stale = True
        await self._settle()
        for name in ("settled", "taken", "applied", "dropped", "stale", "broken", "unknown",
                     "duplicate", "refused"):  # fmt: skip
            peer.record(f"works_{name}", desk.counts[name])
        names = " ".join(delta.name for delta in desk.kept.values())
        peer.record("works_kept", len(desk.kept), works=names, origin=str(versions.origin))
        if not self.over or versions.version == 0:
            peer.record("params", versions.params)
        left = set(self.clients)
        farewell = Finished(versions.version, versions.params)
        for _ in range(FAREWELLS):
            for client in sorted(left):
                await peer.send(PeerId(client), farewell)
            until_s = peer.now() + self.terms.patience_s
            while left and (bye := await peer.recv(Bye, deadline=until_s)) is not None:
                left.discard(int(bye.source))
            if not left:
                return
