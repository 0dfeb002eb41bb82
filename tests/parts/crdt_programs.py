"""Peer programs over a signed CRDT store, for both engines; importable by a spawned process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from shoal.base import keyed
from shoal.kernel.peer import Peer
from shoal.kernel.tasks import TaskGroup
from shoal.parts.overlay.anti_entropy import AntiEntropy, Nodes, Pace
from shoal.parts.overlay.crdt import ExpiringMap, GCounter, LwwMap, OrSet, PNCounter
from shoal.parts.overlay.crdt_store import rules
from shoal.parts.overlay.dag import Content, Node, signed
from shoal.wire.identity import Identity
from shoal.wire.message import message


def identity_of(name: int | str) -> Identity:
    return Identity.from_seed(hashlib.sha256(str(name).encode()).digest())


async def write_some(peer: Peer, replica: AntiEntropy, number: int) -> None:
    """One random change of a random kind; adds to counters are acknowledged by a row."""
    author, draw = replica.author, peer.uniform("op", number)
    item = int(peer.uniform("item", number) * 20)
    if draw < 0.3:
        amount = 1 + int(peer.uniform("amount", number) * 5)
        await replica.write("hits", GCounter, lambda v, stamp: v.added(author, amount))
        peer.record("acknowledged", amount)
    elif draw < 0.45:
        await replica.write("level", PNCounter, lambda v, stamp: v.added(author, item - 10))
    elif draw < 0.65:
        value = None if draw < 0.5 else number
        await replica.write(
            "models", LwwMap, lambda v, stamp: v.written(author, stamp, f"m{item}", value)
        )
    elif draw < 0.95:

        def change(v: OrSet, stamp: tuple[int, int]) -> OrSet:
            few = len(v.items.get(item, ())) <= 16
            return v.removed(item) if draw > 0.85 and few else v.added(author, item)

        await replica.write("members", OrSet, change)
    else:
        await replica.write(
            "here", ExpiringMap,
            lambda v, stamp: v.held(author, stamp, number, expires_ns=stamp[0] + 10**9),
        )  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """Writes until `quiet_s`, then watches its digest until `end_s`.

    The key is kept in the store, and a new one made when there is none, so that a peer that lost
    its store is a new author.
    """

    ops: int
    quiet_s: float
    end_s: float
    pace: Pace = Pace()  # noqa: RUF009
    watch_s: float = 0.0
    open: bool = True
    ahead_s: float = 10.0
    stay_s: float = 0.0

    async def run(self, peer: Peer) -> None:
        seed = peer.store.get("key")
        if seed is None:
            start = f"{peer.id} {peer.now()}" if self.open else str(peer.id)
            seed = hashlib.sha256(start.encode()).digest()
            await peer.store.commit({"key": seed})
        identity = Identity.from_seed(seed)
        authors = None
        if not self.open:
            authors = frozenset(Identity.from_seed(_seed(p)).public for p in peer.roster)
        async with peer.tasks() as group:
            replica = AntiEntropy(
                peer, identity, rules("test", authors=authors, ahead_s=self.ahead_s),
                end_s=self.end_s, pace=self.pace,
            )  # fmt: skip
            peer.record("restored", len(replica.store.dag.log))
            replica.start(group)
            await self.write(peer, replica, group)
            await self.watch(peer, replica)
        self.report(peer, replica)

    async def write(self, peer: Peer, replica: AntiEntropy, group: TaskGroup) -> None:
        span_s = self.quiet_s / max(1, self.ops)
        first = max(0, int(peer.now() / span_s))
        for number in range(first, self.ops):
            await peer.sleep_until((number + peer.uniform("when", number)) * span_s)
            await write_some(peer, replica, number)

    async def watch(self, peer: Peer, replica: AntiEntropy) -> None:
        at = self.quiet_s
        while self.watch_s and at < self.end_s:
            await peer.sleep_until(at)
            peer.record("digest", _short(replica.digest))
            at += self.watch_s

    def report(self, peer: Peer, replica: AntiEntropy) -> None:
        dag = replica.store.dag
        peer.record("final", _short(replica.digest))
        peer.record("nodes", len(dag.log))
        peer.record("hits", replica.value("hits", GCounter).value)
        # Every value but the one that depends on the reader's clock, in a canonical form.
        shown = (
            replica.value("hits", GCounter).value, replica.value("level", PNCounter).value,
            sorted(replica.value("models", LwwMap).value.items()),
            sorted(replica.value("members", OrSet).value),
            sorted(replica.value("here", ExpiringMap).leases.items()),
        )  # fmt: skip
        peer.record("values", _short(hashlib.sha256(msgspec.msgpack.encode(shown)).digest()))
        peer.record("forged", sum(node.content.payload == FORGED for node in dag.log))
        peer.record("evil", sum(b"evil" in node.raw for node in dag.log))
        peer.record("forked", len(dag.forked))
        for reason, count in dag.refused.items():
            peer.record("refused", count, reason=reason)


FORGED = b"forged"


def _seed(peer: int) -> bytes:
    return hashlib.sha256(str(peer).encode()).digest()


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:6], "big")


@dataclass(frozen=True)
class Byzantine:
    """Sends nodes signed by a stranger, in others' names, edited, from the far future and of
    another store; one of its kind also writes two histories in its own name."""

    end_s: float
    equivocates: bool = False

    async def run(self, peer: Peer) -> None:
        me, stranger = Identity.from_seed(_seed(peer.id)), identity_of("stranger")
        victim = Identity.from_seed(_seed(0)).public
        number = 0
        heard: list[bytes] = []
        while peer.now() < self.end_s - 1.0:
            number += 1
            mail = await peer.recv(Nodes, deadline=peer.now() + 0.2)
            if mail is not None:
                heard = [*heard, *mail.message.nodes][-50:]
                continue
            now_ns = round(peer.now() * 1e9)
            payload = msgspec.msgpack.encode(("evil", "GCounter", GCounter({victim: 10**6})))
            evil = Content("test", victim, 0, (), (), now_ns, 0, payload)
            body = msgspec.msgpack.encode(evil)
            bad = [
                body + stranger.sign(body),
                signed(stranger, msgspec.structs.replace(evil, author=stranger.public)).raw,
                signed(me, msgspec.structs.replace(evil, author=me.public)).raw,
                signed(me, msgspec.structs.replace(evil, author=me.public, payload=FORGED)).raw,
                self.own(me, "other", now_ns, b"evil").raw,
                self.own(me, "test", now_ns + 10**12, b"evil").raw,
            ]
            for raw in heard[-5:]:
                place = int(peer.uniform("edit", number, len(bad)) * len(raw))
                bad.append(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            if self.equivocates:
                bad += [self.own(me, "test", 1 + k, b"history").raw for k in range(2)]
            others = [p for p in peer.roster if p != peer.id]
            to = peer.choice(others, "victim", number)
            await peer.send(to, Nodes(number, tuple(bad)))

    @staticmethod
    def own(me: Identity, store: str, time_ns: int, key: bytes) -> Node:
        payload = msgspec.msgpack.encode((key.decode(), "GCounter", GCounter({me.public: 1})))
        return signed(me, Content(store, me.public, 0, (), (), time_ns, 0, payload))


@message(tag=("number",))
class Written:
    number: int
    map: LwwMap


@dataclass(frozen=True)
class Broadcast:
    """The baseline: a last-writer-wins map, every write sent to everybody once and never again."""

    ops: int
    quiet_s: float
    end_s: float

    async def run(self, peer: Peer) -> None:
        author, span_s = keyed.word(str(peer.id)).to_bytes(8, "big"), self.quiet_s / self.ops
        held = LwwMap()
        for number in range(self.ops):
            until_s = (number + 1) * span_s
            delta = held.written(author, (round(peer.now() * 1e9), 0), f"m{number % 20}", peer.id)
            held = held.merge(delta)
            for other in peer.roster:
                if other != peer.id:
                    await peer.send(other, Written(number, delta))
            while (mail := await peer.recv(Written, deadline=until_s)) is not None:
                held = held.merge(mail.message.map)
        while (mail := await peer.recv(Written, deadline=self.end_s)) is not None:
            held = held.merge(mail.message.map)
        shown = sorted(held.value.items())
        peer.record("final", _short(hashlib.sha256(repr(shown).encode()).digest()))
