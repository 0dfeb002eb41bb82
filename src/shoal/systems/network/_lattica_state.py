"""Lattica's experiments on state: replicas among liars, a table that loses a fifth of its nodes."""

from __future__ import annotations

import hashlib

import msgspec

from shoal.base import keyed
from shoal.kernel.peer import Peer
from shoal.parts.overlay.anti_entropy import AntiEntropy, Nodes, Pace
from shoal.parts.overlay.crdt import GCounter, LwwMap, OrSet, PNCounter
from shoal.parts.overlay.crdt_store import rules
from shoal.parts.overlay.dag import Content, signed
from shoal.parts.overlay.kademlia import Kademlia
from shoal.wire.identity import Identity
from shoal.wire.message import message

WATCH_S = 0.25
SETTLE_S = 25.0
PERIOD_S = 1.0
STORE = "lattica"
EVIL = b"evil"
KEYS = 300
_ITEMS = 20
_JOIN_S, _STORED_S, _LOOK_S, GONE_S, _AFTER_S, _END_S = 4.0, 10.0, 24.0, 43.0, 46.0, 64.0


def identity_of(peer: int) -> Identity:
    """Everybody's key pair follows from the number, so that everybody knows the public keys."""
    return Identity.from_seed(hashlib.sha256(b"lattica %d" % peer).digest())


def short(data: bytes) -> int:
    """The first 48 bits, as a number that a float holds exactly."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big")


# Replicas.


async def replicate(peer: Peer, ops: int, quiet_s: float, liars: int) -> None:
    """Write `ops` random changes until `quiet_s`, and watch the digest; the last peers lie."""
    end_s = quiet_s + SETTLE_S
    if peer.id >= len(peer.roster) - liars:
        await lie(peer, end_s - 1.0, equivocates=peer.id == peer.roster[-1])
        return
    authors = frozenset(identity_of(p).public for p in peer.roster)
    replica = AntiEntropy(
        peer, identity_of(peer.id), rules(STORE, authors=authors), end_s=end_s,
        pace=Pace(period_s=PERIOD_S),
    )  # fmt: skip
    async with peer.tasks() as group:
        replica.start(group)
        span_s = quiet_s / ops
        for number in range(ops):
            await peer.sleep_until((number + peer.uniform("when", number)) * span_s)
            await write_some(peer, replica, number)
        at_s = quiet_s
        while at_s < end_s:
            await peer.sleep_until(at_s)
            peer.record("digest", short(replica.digest))
            at_s += WATCH_S
    report(peer, replica)


async def write_some(peer: Peer, replica: AntiEntropy, number: int) -> None:
    """One random change of a random kind."""
    me, draw = replica.author, peer.uniform("op", number)
    item = int(peer.uniform("item", number) * _ITEMS)
    if draw < 0.3:
        await replica.write("hits", GCounter, lambda v, stamp: v.added(me, 1 + item))
    elif draw < 0.45:
        await replica.write("level", PNCounter, lambda v, stamp: v.added(me, item - 10))
    elif draw < 0.65:
        value = None if draw < 0.5 else number
        await replica.write("models", LwwMap, lambda v, s: v.written(me, s, f"m{item}", value))
    else:

        def change(v: OrSet, stamp: tuple[int, int]) -> OrSet:
            few = len(v.items.get(item, ())) <= 16
            return v.removed(item) if draw > 0.85 and few else v.added(me, item)

        await replica.write("members", OrSet, change)


def report(peer: Peer, replica: AntiEntropy) -> None:
    """What this replica ends with, and how much of it is forged."""
    dag = replica.store.dag
    peer.record("final", short(replica.digest))
    peer.record("deltas", len(dag.log))
    peer.record("forged", sum(EVIL in node.raw for node in dag.log))
    peer.record("refused", sum(dag.refused.values()))


async def lie(peer: Peer, end_s: float, *, equivocates: bool) -> None:
    """Send deltas signed by a stranger, in others' names, edited, from the far future and of
    another store; who equivocates also writes two histories in its own name."""
    me, stranger = identity_of(peer.id), Identity.from_seed(bytes(32))
    victim = identity_of(0).public
    others = [p for p in peer.roster if p != peer.id]
    number, heard = 0, []

    def evil(store: str, author: Identity, time_ns: int, totals: dict[bytes, int]) -> Content:
        payload = msgspec.msgpack.encode((EVIL.decode(), "GCounter", GCounter(totals)))
        return Content(store, author.public, 0, (), (), time_ns, 0, payload)

    while peer.now() < end_s:
        number += 1
        mail = await peer.recv(Nodes, deadline=peer.now() + 0.2)
        if mail is not None:
            heard = [*heard, *mail.message.nodes][-50:]
            continue
        now_ns = round(peer.now() * 1e9)
        body = msgspec.msgpack.encode(
            msgspec.structs.replace(evil(STORE, me, now_ns, {}), author=victim)
        )
        bad = [
            body + stranger.sign(body),
            signed(stranger, evil(STORE, stranger, now_ns, {stranger.public: 1})).raw,
            signed(me, evil(STORE, me, now_ns, {victim: 10**6})).raw,
            signed(me, evil("another", me, now_ns, {me.public: 1})).raw,
            signed(me, evil(STORE, me, now_ns + 10**12, {me.public: 1})).raw,
        ]
        for raw in heard[-5:]:
            place = int(peer.uniform("edit", number, len(bad)) * len(raw))
            bad.append(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        if equivocates:
            for history in range(2):
                payload = msgspec.msgpack.encode(("h", "GCounter", GCounter({me.public: 1})))
                bad.append(signed(me, Content(
                    STORE, me.public, 0, (), (), 1 + history, 0, payload
                )).raw)  # fmt: skip
        await peer.send(peer.choice(others, "victim", number), Nodes(number, tuple(bad)))


@message(tag=("number",))
class Written:
    """A change of the baseline's map, told once."""

    number: int
    map: LwwMap


async def broadcast(peer: Peer, ops: int, quiet_s: float) -> None:
    """The baseline: a last-writer-wins map, every write told to everybody once and never again."""
    me, span_s = keyed.word(str(peer.id)).to_bytes(8, "big"), quiet_s / ops
    held, end_s = LwwMap(), quiet_s + SETTLE_S
    others = [p for p in peer.roster if p != peer.id]

    async def take(until_s: float) -> None:
        nonlocal held
        while (mail := await peer.recv(Written, deadline=until_s)) is not None:
            held = held.merge(mail.message.map)

    for number in range(ops):
        await take((number + peer.uniform("when", number)) * span_s)
        item = int(peer.uniform("item", number) * _ITEMS)
        delta = held.written(me, (round(peer.now() * 1e9), 0), f"m{item}", number)
        held = held.merge(delta)
        for other in others:
            await peer.send(other, Written(number, delta))
    await take(quiet_s)
    at_s = quiet_s
    while at_s < end_s:
        peer.record("digest", short(repr(sorted(held.value.items())).encode()))
        at_s += 1.0
        await take(at_s)
    peer.record("final", short(repr(sorted(held.value.items())).encode()))


# The hash table.


async def look_up(peer: Peer) -> None:
    """Join, store a value each, search before and after the departure; records "found", "hops" and
    "get_s" with the phase."""
    peers = len(peer.roster)
    getters = [p for p in peer.roster if p % 5][:KEYS]
    dht = Kademlia(peer)
    async with peer.tasks() as group:
        dht.start(group)
        await peer.sleep_until(_JOIN_S * peer.id / peers)
        known = peer.roster[: peer.id] or peer.roster[1:]
        contacts = [peer.choice(known, "contact", turn) for turn in range(3)]
        await dht.join(contacts, deadline=peer.now() + 10.0)
        spread = peer.id / peers
        if peer.id < KEYS:
            await peer.sleep_until(_STORED_S + 8.0 * spread)
            await dht.put(b"key %d" % peer.id, b"value %d" % peer.id, deadline=peer.now() + 10.0)
        for phase, at_s in (("before", _LOOK_S), ("after", _AFTER_S)):
            await peer.sleep_until(at_s + 10.0 * spread)
            if peer.id not in getters:
                continue
            number = peer.choice(range(min(KEYS, peers)), "search", phase)
            began_s = peer.now()
            found = await dht.get(b"key %d" % number, deadline=began_s + 10.0)
            right = found.newest == b"value %d" % number
            peer.record("found", float(right), phase=phase)
            peer.record("get_s", peer.now() - began_s, phase=phase)
            if right:
                peer.record("hops", found.hops, phase=phase)
        await peer.sleep_until(_END_S)
        dht.stop()
