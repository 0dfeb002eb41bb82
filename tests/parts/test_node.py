"""The fabric in one hand: what a user does with it, its errors, and a store that is full."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from crdt_programs import identity_of

from shoal.base.errors import (
    DeadlineExceeded,
    DecodeError,
    PeerUnreachable,
    ProgramError,
    UsageError,
)
from shoal.engine.event import EventSettings, simulate
from shoal.kernel.peer import Peer
from shoal.parts.overlay.content import Cid
from shoal.parts.overlay.crdt import LwwMap
from shoal.parts.overlay.crdt_store import CrdtStore, rules
from shoal.parts.overlay.dag import Rules, signed
from shoal.parts.overlay.node import Node, NodeSettings
from shoal.parts.overlay.rpc import Request
from shoal.world.faults import Crash
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run

SMALL = NodeSettings(block_bytes=1000)


@dataclass(frozen=True)
class Fabric:
    body: Callable[[Peer, Node], Awaitable[None]]
    end_s: float = 20.0
    settings: NodeSettings = SMALL

    async def run(self, peer: Peer) -> None:
        async def add(request: Request) -> bytes:
            return request.payload + b"!"

        node = Node(
            peer, identity_of(peer.id), bootstrap=[0], settings=self.settings,
            key_of=lambda p: identity_of(p).public,
        )  # fmt: skip
        async with node:
            node.serve("text.add", add)
            await self.body(peer, node)
            await peer.sleep_until(max(self.end_s, peer.now()))


def run(body: Callable[[Peer, Node], Awaitable[None]], peers: int = 5, **more: Any) -> Run:
    network = Network(peers, links=Links(latency_s=0.02), faults=more.pop("faults", ()))
    made = simulate(Fabric(body, **more), network, settings=EventSettings(horizon_s=100.0))
    assert made.finished
    return made


def values(made: Run, name: str) -> list[float]:
    return [row.value for row in made.series(name)]


def test_calls_content_records_and_state_work_together() -> None:
    async def body(peer: Peer, node: Node) -> None:
        await peer.sleep_until(2.0)
        other = (peer.id + 1) % 5
        said = await node.call(other, "text.add", b"ho", deadline=4.0)
        await node.state["members"].add(peer.id)
        await node.state["votes"].count(peer.id)
        await node.store(b"key", b"of %d" % peer.id, subkey=b"a", lifetime_s=60.0, deadline=6.0)
        await node.store(b"key", b"short", subkey=b"b", lifetime_s=4.0, deadline=6.0)
        if peer.id == 1:
            await node.state["notes"].write("blob", str(await node.put(b"x" * 5500)))
        await peer.sleep_until(8.0)
        found = await node.load(b"key", deadline=12.0, holders=3)
        blob = await node.get(str(node.state["notes"].map["blob"]), deadline=15.0)
        right = (
            said == b"ho!", node.state["members"].members == set(range(5)),
            node.state["votes"].total == 10, blob == b"x" * 5500,
            found == {(p, b"a"): b"of %d" % p for p in range(5)},
        )  # fmt: skip
        peer.record("right", float(all(right)), which=str(right))

    made = run(body)
    assert [(row.value, row.labels) for row in made.series("right") if not row.value] == []
    assert len(values(made, "right")) == 5


def test_workers_follow_a_trainer_and_fetch_what_changed() -> None:
    same = hashlib.shake_128(b"model").digest(9000)
    versions = [bytes([n]) * 1000 + same for n in range(3)]

    async def body(peer: Peer, node: Node) -> None:
        if peer.id == 0:
            for number, blob in enumerate(versions):
                await peer.sleep_until(2.0 + 5.0 * number)
                await node.publish("model", blob, deadline=peer.now() + 2.0)
            return
        seen: Cid | None = None
        while (seen_now := await node.newer("model", seen, deadline=18.0)) is not None:
            old, seen = seen, seen_now
            blob = await node.get(seen, deadline=18.0)
            peer.record("version", versions.index(blob))
            if old is not None:
                node.drop(old)

    made = run(body)
    for peer in range(1, 5):
        assert [row.value for row in made.series("version", peer)] == [0.0, 1.0, 2.0]
        # All of the first version, and of the others the one block that differs.
        assert sum(row.value for row in made.series("fetched_bytes", peer)) == 12_000


def test_nonsense_in_the_registry_is_no_version() -> None:
    """Any author can write there: a follower waits on, and asks nobody who does not exist."""

    async def body(peer: Peer, node: Node) -> None:
        registry = node.state["registry"]
        if peer.id == 0:
            for text in (5, "", "0", "0 what", "\u00b2 bx", "0 b" + "a" * 58):
                await registry.write("model", text)
                await peer.sleep_until(peer.now() + 0.7)
            cid = await node.put(b"x" * 900, deadline=peer.now() + 2.0)
            for source in ("9" * 5000, "77", "-1", "\u00b2", "0"):
                await registry.write(f"of {source[:9]}", f"{source} {cid}")
            await registry.write("model", f"77 {cid}")
        elif peer.id == 1:
            cid = await node.newer("model", None, deadline=18.0)
            assert cid is not None
            peer.record("blob", await node.get(cid, deadline=18.0) == b"x" * 900)
            for source in ("9" * 9, "77", "-1", "\u00b2", "0"):
                assert await node.newer(f"of {source}", None, deadline=18.0) == cid
            peer.record("done", 1.0)

    made = run(body)
    assert values(made, "blob") == values(made, "done") == [1.0]


def test_errors_say_what_was_tried() -> None:
    async def body(peer: Peer, node: Node) -> None:
        if peer.id:
            return
        await peer.sleep_until(3.0)
        with pytest.raises(PeerUnreachable, match="tried: its connection"):
            await node.call(4, "text.add", b"", deadline=5.0)
        with pytest.raises(DecodeError, match="base32"):
            await node.get("no identifier", deadline=6.0)
        with pytest.raises(UsageError, match="no blob"):
            await node.get(Cid.of(b"a block"), deadline=6.0)
        with pytest.raises(DeadlineExceeded, match="manifest"):
            await node.get(Cid.of(b"nobody's", 0x300000), deadline=7.0)
        with pytest.raises(UsageError, match="has expired before"):
            await node.store(b"key", b"value", lifetime_s=0.0, deadline=8.0)
        peer.record("done", 1.0)

    assert values(run(body, faults=(Crash(who=(4,), at=1.0),)), "done") == [1.0]
    with pytest.raises(ProgramError, match="async with"):
        _ = Node.__dict__["_group"].fget(object.__new__(_Bare))


class _Bare(Node):
    _tasks = None


async def write_much(node: Node) -> None:
    for number in range(20):
        await node.state["notes"].write(f"n{number}", "x" * 100)


def test_a_store_that_is_full_says_so_and_what_to_do() -> None:
    async def body(peer: Peer, node: Node) -> None:
        dag = node.state.replica.store.dag
        dag.rules = replace(dag.rules, store_bytes=3_000, node_bytes=1_000)
        if peer.id:
            return
        with pytest.raises(UsageError, match=r"limit 3000 .*another name"):
            await write_much(node)
        peer.record("held", dag.held_bytes)

    held = values(run(body, peers=2), "held")
    assert 2_000 < held[0] <= 3_000


def test_a_replica_takes_nothing_beyond_its_limit() -> None:
    me = identity_of(1)
    one, other = CrdtStore(rules("s")), CrdtStore(rules("s", store_bytes=1_000, node_bytes=600))
    outcomes = []
    for number in range(6):
        content = one.change(
            me.public, "k", LwwMap, lambda v, s: v.written(me.public, s, "e", "y" * 100), number + 1
        )
        node = signed(me, content)
        one.dag.add(node.raw, 10)
        outcomes.append(other.dag.add(node.raw, 10))
    assert outcomes[0] == "accepted"
    assert "store full" in outcomes
    assert other.dag.held_bytes <= 1_000
    with pytest.raises(UsageError, match="no room for one node"):
        Rules("s", node_bytes=100, store_bytes=99)
