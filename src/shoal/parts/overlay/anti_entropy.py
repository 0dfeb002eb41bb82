"""Keeps a store of signed CRDT values equal on all replicas, over links that lose messages.

Three things run beside a program. Gossip: what is new goes once to a few random neighbours, several
times a second. Anti-entropy: every period a replica sends what it has (digest, heads, largest seq
per author) to a random neighbour; if the digests differ, both send what the other lacks. Repair: a
replica that holds nodes with missing ancestors asks whoever sent such a node.

Everything is bounded: a message by `message_bytes`, what one request brings by `answer_bytes`, how
often a neighbour is answered by `answers` per period.
Source: Demers et al. 1987, Epidemic algorithms for replicated database maintenance (rumour
mongering and push-pull anti-entropy); Yang et al. 2025, Lattica (arXiv 2510.00183).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from shoal.base.errors import ProgramError, UsageError
from shoal.base.ids import PeerId
from shoal.kernel.peer import Envelope, Peer
from shoal.kernel.tasks import TaskGroup, TaskHandle
from shoal.parts.overlay.crdt import Value
from shoal.parts.overlay.crdt_store import CrdtStore
from shoal.parts.overlay.dag import ID_BYTES, Node, Rules, chosen, signed
from shoal.parts.overlay.hybrid_clock import Stamp
from shoal.wire.identity import Identity
from shoal.wire.message import message

V = TypeVar("V", bound=Value)


@message(tag=("number",))
class Have:
    """What the sender has. answer: it asks for the like in return; complete: the frontier names all
    of its authors; wanted: ids that it knows of and has not."""

    number: int
    answer: bool
    digest: bytes
    heads: tuple[bytes, ...]
    frontier: dict[bytes, int]
    complete: bool
    wanted: tuple[bytes, ...]


@message(tag=("number",))
class Nodes:
    """Signed nodes, ancestors first."""

    number: int
    nodes: tuple[bytes, ...]


@dataclass(frozen=True)
class Pace:
    """How often and how much.

    period_s: between two exchanges with a random neighbour; gossip_s: between two rounds of gossip
    (0 = none); fanout: to how many neighbours each; message_bytes: nodes in one message;
    answer_bytes: nodes that one `Have` brings; answers: `Have`s of one neighbour that are answered
    in a period; named: most heads and authors in one `Have`, beyond which it names some of them,
    other ones every time.
    """

    period_s: float = 1.0
    gossip_s: float = 0.25
    fanout: int = 2
    message_bytes: int = 1 << 16
    answer_bytes: int = 1 << 18
    answers: int = 16
    named: int = 1024

    def __post_init__(self) -> None:
        if not self.period_s > 0 or self.gossip_s < 0:
            raise UsageError(
                f"Pace: period_s={self.period_s}, gossip_s={self.gossip_s}; need a positive period "
                "and no negative time"
            )
        for name in ("fanout", "message_bytes", "answer_bytes", "answers", "named"):
            if getattr(self, name) < 1:
                raise UsageError(f"Pace: {name}={getattr(self, name)}; need at least 1")


class AntiEntropy:
    """One peer's replica, as a service: `start` it in a task group, then `write` and read `store`.

        async with peer.tasks() as group:
            replica = AntiEntropy(peer, identity, rules("registry"), end_s=60.0)
            replica.start(group)
            await replica.write("hits", GCounter, lambda hits, stamp: hits.added(replica.author))

    end_s: when the service ends. What `write` returned is durable, and no node leaves before it is:
    a peer that restarts finds all of its own nodes and goes on behind them. A received node becomes
    durable with the next own one or within a period. All of it lies in `peer.store` under
    "crdt/...", in pieces that are never changed.

    A key must not outlive its store: a peer that lost its store and signs on with the old key
    writes a second history and is marked for it (take a new key then). One service per peer, since
    mail is told apart by kind. Without neighbours it waits for others to call.
    """

    def __init__(
        self, peer: Peer, identity: Identity, rules: Rules, *, end_s: float,
        pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.identity = identity
        self.author = identity.public
        self.store = CrdtStore(rules)
        self.pace = pace or Pace()
        self.exchanges = 0
        """how many exchanges this incarnation has begun"""
        self._end_s = end_s
        self._group: TaskGroup | None = None
        self._last: TaskHandle | None = None
        self._tasks: list[TaskHandle] = []
        self._pieces = self._durable = self._sent = 0
        self._fresh: list[bytes] = []
        self._answered: dict[PeerId, int] = {}
        self._asked: PeerId | None = None
        self._load()

    @property
    def digest(self) -> bytes:
        """Equal on two replicas exactly when they hold the same nodes, hence the same values."""
        return self.store.dag.digest

    def value(self, key: str, kind: type[V]) -> V:
        """The present value under a key."""
        return self.store.value(key, kind)

    def start(self, group: TaskGroup) -> None:
        """Begin to exchange; the tasks end at `end_s`, or with `stop`."""
        self._group = group
        for task in (self._exchange(), self._gossip(), self._take_have(), self._take_nodes()):
            self._tasks.append(group.start(task))

    def stop(self) -> None:
        """Exchange no more, so that the group can end."""
        for task in self._tasks:
            task.cancel()

    async def write(self, key: str, kind: type[V], delta: Callable[[V, Stamp], V]) -> Node:
        """Sign and keep `delta(value, stamp)`; returns when it is durable here.

        Writes of several tasks take turns. A peer that crashes meanwhile may have kept it or not.
        """

        async def one() -> Node:
            content = self.store.change(self.author, key, kind, delta, self._now_ns())
            node = signed(self.identity, content)
            size, most = len(node.raw), self.store.dag.rules.node_bytes
            if size > most:
                raise UsageError(
                    f"write {key!r}: a node of {size} bytes; limit {most} (put large content "
                    "elsewhere and its hash here)"
                )
            held, limit = self.store.dag.held_bytes, self.store.dag.rules.store_bytes
            if held + size > limit:
                raise UsageError(
                    f"write {key!r}: the store holds {held} bytes of changes; limit {limit} (write "
                    "what is current into a store of another name, or raise Rules.store_bytes on "
                    "all replicas)"
                )
            await self._commit(node.raw)
            outcome = self.store.dag.add(node.raw, None)
            if outcome != "accepted":
                raise UsageError(f"write {key!r}: {outcome} (own rules refuse the delta)")
            self._fresh.append(node.raw)
            return node

        return await self._in_turn(one)

    # Durability.

    async def _in_turn(self, step: Callable[[], object]) -> Node:
        """One write after another: each signs the next seq on top of what is durable."""
        if self._group is None:
            raise ProgramError("write before start (start the service in a task group first)")
        before = self._last

        async def turn() -> Node:
            if before is not None and not before.done:
                await _ended(before)
            return await step()  # type: ignore[misc]

        self._last = handle = self._group.start(turn(), isolate=True)
        made = await handle.join()
        if made is None:
            raise ProgramError("write: the service was stopped meanwhile (nothing was promised)")
        return made

    async def _commit(self, own: bytes = b"") -> bool:
        """Make an own node durable, with all that was accepted since the last time."""
        end = len(self.store.dag.log)
        raws = [node.raw for node in self.store.dag.log[self._durable : end]]
        if own:
            raws.append(own)
        if raws:
            name = f"crdt/{self.store.dag.rules.store}/{self._pieces}"
            await self.peer.store.commit({name: msgspec.msgpack.encode(raws)})
            self._pieces += 1
            # An own node joins the log behind what came during the commit, and is written again
            # with the next piece: twice is harmless.
            self._durable = end
        return True

    def _load(self) -> None:
        name = f"crdt/{self.store.dag.rules.store}"
        while (piece := self.peer.store.get(f"{name}/{self._pieces}")) is not None:
            for raw in msgspec.msgpack.decode(piece, type=list[bytes]):
                self.store.dag.add(raw, None)
            self._pieces += 1
        self._durable = len(self.store.dag.log)

    # Sending.

    async def _exchange(self) -> None:
        """Every period, at a moment of this peer's own: a random neighbour, and the disk."""
        period_s = self.pace.period_s
        at = self.peer.now() + period_s * self.peer.uniform("anti-entropy", "phase")
        while at < self._end_s:
            await self.peer.sleep_until(at)
            self.exchanges += 1
            self._answered.clear()
            for other in self._some(1):
                await self.peer.send(other, self._have(answer=True))
            if self._durable < len(self.store.dag.log):
                await self._in_turn(self._commit)
            at = max(at + period_s, self.peer.now())

    async def _gossip(self) -> None:
        gossip_s = self.pace.gossip_s
        at = self.peer.now() + gossip_s * self.peer.uniform("gossip", "phase")
        while gossip_s and at < self._end_s:
            await self.peer.sleep_until(at)
            if self._fresh:
                fresh, self._fresh = self._fresh, []
                for other in self._some(self.pace.fanout):
                    await self._send_nodes(other, fresh)
            asked, self._asked = self._asked, None
            if asked is not None and self.store.dag.missing():
                await self.peer.send(asked, self._have(answer=False))
            at = max(at + gossip_s, self.peer.now())
        self._fresh.clear()

    def _some(self, count: int) -> list[PeerId]:
        """Different random neighbours."""
        left = [peer for peer in self.peer.neighbors if peer != self.peer.id]
        out: list[PeerId] = []
        while left and len(out) < count:
            self._sent += 1
            # The moment is part of the key: after a restart the numbers begin again.
            other = self.peer.choice(left, "anti-entropy", self._sent, self._now_ns())
            left.remove(other)
            out.append(other)
        return out

    def _have(self, answer: bool, heads: tuple[bytes, ...] = ()) -> Have:
        """heads: of the neighbour, so that those unknown here are asked for."""
        dag, named = self.store.dag, self.pace.named
        wanted = [id for id in heads if dag.find(id) is None and len(id) == ID_BYTES]
        wanted += dag.missing()
        frontier = dag.frontier
        complete = len(frontier) <= named
        authors = frontier if complete else self._part(sorted(frontier))
        return Have(
            self._number(), answer, dag.digest, tuple(self._part(dag.heads)),
            {author: frontier[author] for author in authors}, complete,
            tuple(self._part(list(dict.fromkeys(wanted)))),
        )  # fmt: skip

    def _part(self, names: list[bytes]) -> list[bytes]:
        """At most `Pace.named` of them, from a random place on."""
        named = self.pace.named
        if len(names) <= named:
            return names
        first = int(self.peer.uniform("anti-entropy", "part", self._number()) * len(names))
        return (names + names)[first : first + named]

    def _number(self) -> int:
        # A tag for each message, so that the loss of one says nothing of the next.
        self._sent += 1
        return self._sent

    async def _send_nodes(self, other: PeerId, raws: list[bytes]) -> None:
        batch: list[bytes] = []
        size = 0
        for raw in raws:
            if batch and size + len(raw) > self.pace.message_bytes:
                await self.peer.send(other, Nodes(self._number(), tuple(batch)))
                batch, size = [], 0
            batch.append(raw)
            size += len(raw)
        if batch:
            await self.peer.send(other, Nodes(self._number(), tuple(batch)))

    # Receiving.

    async def _take_have(self) -> None:
        while (envelope := await self.peer.recv(Have, deadline=self._end_s)) is not None:
            await self._answer(envelope)

    async def _answer(self, envelope: Envelope[Have]) -> None:
        have, source, dag = envelope.message, envelope.source, self.store.dag
        if have.digest == dag.digest or self._answered.get(source, 0) >= self.pace.answers:
            return
        self._answered[source] = self._answered.get(source, 0) + 1
        # Heads of ours that they name need no sending; of a fork they may lack the shorter branch.
        ours = [id for id in dag.heads if id not in have.heads] if dag.forked else []
        asked = [*have.wanted[: self.pace.named], *ours]
        raws = chosen(
            dag, asked, have.frontier, most_bytes=self.pace.answer_bytes, unknown=have.complete
        )
        await self._send_nodes(source, raws)
        if have.answer:
            await self.peer.send(source, self._have(answer=False, heads=have.heads))

    async def _take_nodes(self) -> None:
        while (envelope := await self.peer.recv(Nodes, deadline=self._end_s)) is not None:
            dag, now_ns = self.store.dag, self._now_ns()
            known = len(dag.log)
            waited = dag.pending
            for raw in envelope.message.nodes:
                dag.add(raw, now_ns)
            self._fresh += [node.raw for node in dag.log[known:]]
            if dag.pending > waited:
                self._asked = envelope.source

    def _now_ns(self) -> int:
        return round(self.peer.now() * 1e9)


async def _ended(handle: TaskHandle) -> None:
    """Wait for a task whose failure is another's business."""
    try:
        await handle.join()
    except Exception:  # its own caller is told
        return
