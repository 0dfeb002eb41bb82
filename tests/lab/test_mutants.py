"""Five planted defects: `explore` finds each and shrinks it; the correct program passes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest

from shoal.base import keyed
from shoal.engine.event.simulation import Simulation
from shoal.kernel.peer import Peer
from shoal.lab.explore import explore, replay
from shoal.wire.message import message
from shoal.world.device import Device
from shoal.world.links import Links
from shoal.world.network import Network
from shoal.world.record import Run


def seal(*numbers: int) -> int:
    return keyed.fold(0, *numbers) >> 32


@message(tag=("number",))
class Item:
    number: int
    check: int


@message(tag=("number",))
class Ack:
    number: int
    check: int


@message
class Count:
    value: int


@dataclass(frozen=True)
class Courier:
    """Each peer hands numbered items to the next one, again and again until it hears an ack.

    bug: "", or the defect to plant: "double count", "old round", "lost ack", "torn store".
    """

    bug: str = ""
    end_s: float = 5.0
    patience_s: float = 0.2

    async def run(self, peer: Peer) -> None:
        if peer.store.get("born") is None:
            peer.record("reset", 1)
            await peer.store.commit({"born": Count(1)})
        if peer.store.get("next") != peer.store.get("copy"):
            peer.record("torn", 1)
        async with peer.tasks() as group:
            group.start(self.receive(peer))
            group.start(self.deliver(peer))

    async def receive(self, peer: Peer) -> None:
        while (found := await peer.recv(Item, deadline=self.end_s + 1.0)) is not None:
            number = found.message.number
            if found.message.check != seal(1, number):
                continue
            seen = peer.store.get("seen")
            if self.bug == "double count" or seen is None or number >= seen.value:
                await peer.store.commit({"seen": Count(number + 1)})
                peer.record("item", number, source=str(found.source))
            await peer.send(found.source, Ack(number, seal(2, number)))

    async def deliver(self, peer: Peer) -> None:
        to = (peer.id + 1) % len(peer.roster)
        stored = peer.store.get("next")
        number = stored.value if stored is not None and self.bug != "old round" else 0
        while peer.now() < self.end_s:
            peer.record("sent", number)
            acknowledged = await self.try_item(peer, to, number)
            if acknowledged or self.bug == "lost ack":
                peer.record("claimed", number)
                number += 1
                await self.save(peer, number)
            await peer.sleep_until(peer.now() + 0.05)

    async def try_item(self, peer: Peer, to: int, number: int) -> bool:
        await peer.send(to, Item(number, seal(1, number)))  # type: ignore[arg-type]
        deadline = peer.now() + self.patience_s
        found = await peer.recv(Ack, tag=(number,), deadline=deadline)
        if found is None and peer.now() < deadline - 1e-6:
            peer.record("early", number)
        return found is not None and found.message.check == seal(2, number)

    async def save(self, peer: Peer, number: int) -> None:
        if self.bug == "torn store":
            await peer.store.commit({"next": Count(number)})
            await peer.store.commit({"copy": Count(number)})
        else:
            await peer.store.commit({"next": Count(number), "copy": Count(number)})


def counts_once(run: Run) -> str | None:
    """No item enters a total twice, except after a disk was lost."""
    for peer in range(run.peers):
        seen: set[float] = set()
        for row in run.rows:
            if row.peer != peer:
                continue
            if row.name == "reset":
                seen.clear()
            elif row.name == "item":
                if row.value in seen:
                    return f"peer {peer} counted item {row.value:.0f} twice"
                seen.add(row.value)
    return None


def goes_forward(run: Run) -> str | None:
    """Nobody returns to an earlier number, except after its disk was lost."""
    for peer in range(run.peers):
        latest = -1.0
        for row in run.rows:
            if row.peer == peer and row.name == "reset":
                latest = -1.0
            if row.peer == peer and row.name == "sent":
                if row.value < latest:
                    return f"peer {peer} sent {row.value:.0f} after {latest:.0f}"
                latest = row.value
    return None


def claims_are_true(run: Run) -> str | None:
    """What a sender holds for delivered was counted by the receiver."""
    counted: dict[int, set[float]] = defaultdict(set)
    for row in run.series("item"):
        counted[int(dict(row.labels)["source"])].add(row.value)
    for row in run.series("claimed"):
        if row.value not in counted[row.peer]:
            return f"peer {row.peer} claims item {row.value:.0f}, which nobody counted"
    return None


def commits_whole(run: Run) -> str | None:
    return "half a commit was found at a start" if run.series("torn") else None


def waits_to_the_end(run: Run) -> str | None:
    return "a wait ended before its deadline" if run.series("early") else None


INVARIANTS = (counts_once, goes_forward, claims_are_true, commits_whole, waits_to_the_end)
NETWORK = Network(4, links=Links(latency_s=0.03, jitter_s=0.01), device=Device(store_s=0.01))
HORIZON_S = 30.0


def search(bug: str, **settings: Any) -> Any:
    return explore(
        lambda: Courier(bug), NETWORK, horizon_s=HORIZON_S, invariants=INVARIANTS, **settings
    )


def stale_fire(self: Simulation, wait: Any, local_ns: int) -> None:
    """A kernel whose timers know the task but not the wait for which they were set."""
    current = wait.task.wait
    if current is not None and not current.done:
        current.expire()


def test_correct_program_passes_all_seeds() -> None:
    found = search("", seeds=120)
    assert [failure.problem for failure in found.failures] == []
    assert found.seeds == 120
    assert found.traces > 110


@pytest.mark.parametrize(
    ("bug", "invariant"),
    [
        ("double count", "counts_once"),
        ("old round", "goes_forward"),
        ("lost ack", "claims_are_true"),
        ("torn store", "commits_whole"),
    ],
)
def test_program_defect_is_found_and_shrunk(bug: str, invariant: str) -> None:
    # A torn store shows only when a crash meets the 10 ms between two commits.
    found = search(bug, seeds=300, most_failures=1)
    (failure,) = found.failures
    assert failure.problem.where == invariant
    assert 1 <= len(failure.minimal) <= 2
    assert set(failure.minimal[0].who) <= set(range(4))
    again = replay(
        lambda: Courier(bug), NETWORK, failure.to_data(), horizon_s=HORIZON_S, invariants=INVARIANTS
    )
    assert again is not None
    assert again.where == invariant
    mended = replay(Courier, NETWORK, failure.to_data(), horizon_s=HORIZON_S, invariants=INVARIANTS)
    assert mended is None


def test_stale_wake_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Simulation, "_fire", stale_fire)
    found = search("", seeds=120, most_failures=1)
    (failure,) = found.failures
    assert failure.problem.where == "waits_to_the_end"
    assert len(failure.minimal) <= 2
