"""Lattica's experiments on models: a swarm that follows a registry, against a server and copies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import torch

from shoal.base.errors import Cancelled, PeerError
from shoal.kernel.peer import Envelope, Peer
from shoal.parts.overlay.anti_entropy import Pace
from shoal.parts.overlay.block_exchange import ExchangeSettings, Have, Want
from shoal.parts.overlay.content import Cid, Manifest
from shoal.parts.overlay.kademlia import KademliaSettings
from shoal.parts.overlay.node import Node, NodeSettings
from shoal.parts.overlay.rpc import Request, Rpc, RpcSettings
from shoal.systems.network._lattica_state import EVIL, identity_of, lie, short
from shoal.wire.message import Packed

BLOCK_BYTES = 1 << 18
_LANES = 2
_PATIENT = RpcSettings(piece_bytes=1 << 17, window_bytes=1 << 19, retry_s=600.0, retry_most_s=600.0)
"""Of a server whose line is busy for minutes: on links without loss nothing needs to go twice."""


@lru_cache(maxsize=8)
def version(number: int, size: int, block_bytes: int) -> bytes:
    """A model's bytes; each version changes every tenth block of the one before."""
    if number == 0:
        return hashlib.shake_128(b"lattica model").digest(size)
    blob = bytearray(version(number - 1, size, block_bytes))
    for at in range(number % 10 * block_bytes, size, 10 * block_bytes):
        blob[at] ^= number & 255 or 1
    return bytes(blob)


def start_s(number: int, peers: int, size: int, bytes_per_s: float) -> float:
    """When a version is published: after one server would have fed everybody with the last one."""
    return 3.0 + number * 1.1 * (peers - 1) * size / bytes_per_s


async def swarm(peer: Peer, size: int, bytes_per_s: float, block_bytes: int) -> None:
    """Peer 0 publishes two versions in the registry; the others watch and fetch what changed."""
    settings = NodeSettings(
        exchange=ExchangeSettings(in_flight_bytes=16 * block_bytes, timeout_s=60.0),
        block_bytes=block_bytes,
    )
    keys = [identity_of(p).public for p in peer.roster]
    peers = len(peer.roster)
    async with Node(
        peer, identity_of(peer.id), bootstrap=[0], key_of=lambda p: keys[p], settings=settings
    ) as node:
        seen: Cid | None = None
        for number in (0, 1):
            at_s = start_s(number, peers, size, bytes_per_s)
            end_s = start_s(number + 1, peers, size, bytes_per_s)
            await peer.sleep_until(at_s)
            if peer.id == 0:
                await node.publish("model", version(number, size, block_bytes), deadline=end_s)
            else:
                seen = await node.newer("model", seen, deadline=end_s)
                assert seen is not None, "the registry is on every peer long before"
                blob = await node.get(seen, deadline=end_s)
                right = blob == version(number, size, block_bytes)
                told(peer, number, at_s, len(blob), right)
            await peer.sleep_until(end_s)


def told(peer: Peer, number: int, began_s: float, size: int, right: bool) -> None:
    """A version is here, whole."""
    label = str(number)
    peer.record("blob_bytes", size, version=label)
    peer.record("took_s", peer.now() - began_s, version=label)
    peer.record("right", float(right), version=label)


async def server(peer: Peer, size: int, bytes_per_s: float, block_bytes: int) -> None:
    """The baseline: everybody downloads every version, block by block, from peer 0."""
    rpc, peers = Rpc(peer, _PATIENT), len(peer.roster)

    async def block(request: Request) -> memoryview:
        number, place = request.payload[0], int.from_bytes(request.payload[1:], "big")
        blob = memoryview(version(number, size, block_bytes))
        return blob[place * block_bytes : (place + 1) * block_bytes]

    rpc.serve("model.block", block)
    async with peer.tasks() as group:
        rpc.start(group)
        for number in (0, 1):
            at_s = start_s(number, peers, size, bytes_per_s)
            end_s = start_s(number + 1, peers, size, bytes_per_s)
            await peer.sleep_until(at_s)
            if peer.id:
                got = await _download(peer, rpc, number, -(-size // block_bytes), end_s)
                told(peer, number, at_s, len(got), got == version(number, size, block_bytes))
            await peer.sleep_until(max(peer.now(), end_s))
        rpc.stop()


async def _download(peer: Peer, rpc: Rpc, number: int, blocks: int, end_s: float) -> bytes:
    got: dict[int, bytes] = {}
    left = iter(range(blocks))

    async def lane() -> None:
        for place in left:
            wanted = bytes([number]) + place.to_bytes(4, "big")
            got[place] = await rpc.call(0, "model.block", wanted, deadline=2 * end_s)

    async with peer.tasks() as group:
        for _ in range(_LANES):
            group.start(lane())
    return b"".join(got[place] for place in range(blocks))


async def copies(peer: Peer, size: int, bytes_per_s: float, block_bytes: int) -> None:
    """The baseline: peer 0 sends every version as a whole to everybody."""
    rpc, peers = Rpc(peer, _PATIENT), len(peer.roster)

    async def take(request: Request) -> bytes:
        number = request.payload[0]
        right = request.payload[1:] == version(number, size, block_bytes)
        told(peer, number, start_s(number, peers, size, bytes_per_s), size, right)
        return b""

    rpc.serve("model.take", take)
    async with peer.tasks() as group:
        rpc.start(group)
        for number in (0, 1):
            end_s = start_s(number + 1, peers, size, bytes_per_s)
            await peer.sleep_until(start_s(number, peers, size, bytes_per_s))
            if peer.id == 0:
                copy = bytes([number]) + version(number, size, block_bytes)

                async def send(to: int, copy: bytes = copy, end_s: float = end_s) -> None:
                    await rpc.call(to, "model.take", copy, deadline=2 * end_s)

                async with peer.tasks() as sending:
                    for to in range(1, peers):
                        sending.start(send(to))
            await peer.sleep_until(max(peer.now(), end_s))
        rpc.stop()


# Everything at once, as a user would have it: what fault lists are tried on.

SMALL = NodeSettings(
    dht=KademliaSettings(
        k=8, query_timeout_s=0.5, patience_s=0.2, refresh_s=2.0, republish_s=2.0, lifetime_s=120.0,
        cache_s=3.0,
    ),
    exchange=ExchangeSettings(timeout_s=1.0, poll_s=0.25, in_flight_bytes=1 << 15),
    pace=Pace(period_s=0.5, gossip_s=0.2), block_bytes=1 << 10, join_s=2.0,
)  # fmt: skip
PARAMS = 2_000
VERSIONS = 3
WORK_S, QUIET_S = 9.0, 21.0
_GAP_S = 2.5


def model(number: int) -> torch.Tensor:
    """The parameters of a version; versions share most of their blocks."""
    params = torch.arange(PARAMS, dtype=torch.float32, device="cpu")
    params[:: PARAMS // 2] += number
    return params


def packed(number: int) -> bytes:
    return bytes([number]) + model(number).numpy().tobytes()


async def everything(peer: Peer, liars: int) -> None:
    """Peer 0 publishes models, all follow; everybody writes shared state, stores a record, looks
    up others' and calls them. The last `liars` forge deltas and serve damaged blocks."""
    roster = peer.roster
    keys = [identity_of(p).public for p in roster]
    lying = peer.id >= len(roster) - liars
    node = Node(
        peer, identity_of(peer.id), bootstrap=roster[:2], key_of=lambda p: keys[p], settings=SMALL
    )
    peer.record("params", torch.zeros(PARAMS))
    async with node, peer.tasks() as group:
        _serve(peer, node, lying)
        group.start(_follow(peer, node), isolate=True)
        if lying:
            group.start(lie(peer, WORK_S, equivocates=False), isolate=True)
        else:
            group.start(_write(peer, node), isolate=True)
        for phase, at_s in (("during", 2.0), ("after", WORK_S + 6.0)):
            if peer.now() < at_s:
                await peer.sleep_until(at_s + peer.uniform("look", phase))
                await _look(peer, node, phase)
        if peer.now() < QUIET_S:
            await peer.sleep_until(QUIET_S)
        if not lying:
            dag = node.state.replica.store.dag
            peer.record("final", short(node.state.digest))
            peer.record("forged", sum(EVIL in each.raw for each in dag.log))


def _serve(peer: Peer, node: Node, lying: bool) -> None:
    async def add(request: Request) -> bytes:
        return request.payload + b"!"

    async def damaged(envelope: Envelope[Want]) -> Have:
        answer = await node.exchange.answer(envelope)
        data = bytearray(bytes(answer.block.content))  # type: ignore[arg-type]
        if envelope.message.place >= 0 and data:
            data[len(data) // 2] ^= 4
        return Have(answer.have, answer.peers, Packed(bytes(data)))

    node.serve("text.add", add)
    if lying:
        peer.serve(Want, damaged)


async def _follow(peer: Peer, node: Node) -> None:
    seen: Cid | None = None
    roots = {Manifest.split(packed(n), SMALL.block_bytes)[0].cid: n for n in range(VERSIONS)}
    if peer.id == 0:
        for number in range(VERSIONS):
            if peer.now() <= 1.0 + number * _GAP_S:
                await peer.sleep_until(1.0 + number * _GAP_S)
                peer.record("params", model(number))
            await node.publish("model", packed(number), deadline=peer.now() + 2.0)
        return
    end_s = QUIET_S - 0.5
    while peer.now() < end_s and (cid := await node.newer("model", seen, deadline=end_s)):
        try:
            blob = await node.get(cid, deadline=min(peer.now() + 6.0, end_s))
        except PeerError as error:
            peer.record("unfetched", 1.0, error=type(error).__name__)
            await peer.sleep_until(peer.now() + 0.2)
            continue
        number = roots.get(cid, -1)
        right = number >= 0 and blob == packed(number)
        peer.record("verified", float(right))
        seen = cid
        peer.record("version", number)
        peer.record("params", model(number))


async def _write(peer: Peer, node: Node) -> None:
    number = int(peer.now() / 0.8)
    while (at_s := (number + peer.uniform("write", number)) * 0.8) < WORK_S:
        number += 1
        if at_s < peer.now():
            continue
        await peer.sleep_until(at_s)
        draw = peer.uniform("change", number)
        if draw < 0.4:
            await node.state["members"].add(int(draw * 20))
        elif draw < 0.6:
            await node.state["members"].remove(int(draw * 10))
        elif draw < 0.8:
            await node.state["votes"].count(1)
        else:
            await node.state["notes"].write(f"n{number % 5}", number)


async def _look(peer: Peer, node: Node, phase: str) -> None:
    others = [p for p in peer.roster if p != peer.id]
    deadline = peer.now() + 4.0
    await node.store(b"key %d" % peer.id, b"value %d" % peer.id, lifetime_s=60.0,
                     deadline=peer.now() + 2.0)  # fmt: skip
    # Long enough for the others to have stored theirs.
    await peer.sleep_until(peer.now() + 1.5)
    other = peer.choice(others, "other", phase)
    await _noted(peer, phase, "said", lambda: _said(node, other, deadline))
    found = await node.load(b"key %d" % other, deadline=peer.now() + 3.0)
    right = {(other, b""): b"value %d" % other}
    peer.record("found", float(found == right), phase=phase, other=str(other))
    peer.record("invented", float(bool(found) and found != right))


async def _said(node: Node, other: int, deadline: float) -> bool:
    return await node.call(other, "text.add", b"hello", deadline=deadline) == b"hello!"


async def _noted(peer: Peer, phase: str, name: str, what: Callable[[], object]) -> None:
    """Record whether a call gave the right answer, or which error it gave."""
    try:
        peer.record(name, float(bool(await what())), phase=phase)  # type: ignore[misc]
    except Cancelled:
        raise
    except PeerError as error:
        peer.record(f"not {name}", 1.0, phase=phase, error=type(error).__name__)
