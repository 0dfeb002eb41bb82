"""A program that uses the hash table as a user would, for tests under faults and on sockets."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.kernel.peer import Peer
from shoal.parts.overlay.kademlia import Kademlia, KademliaSettings, Values
from shoal.world.record import Run

SHORT = KademliaSettings(
    k=8, query_timeout_s=0.5, patience_s=0.2, refresh_s=1.5, republish_s=1.5, lifetime_s=60.0,
    cache_s=3.0,
)  # fmt: skip


def key_of(number: int) -> bytes:
    return b"key %d" % number


def value_of(number: int) -> bytes:
    return b"value %d" % number


@dataclass(frozen=True)
class Table:
    """Peers join one after the other, each stores a value, and at given times each gets some.

    get_at_s: when searches begin, as seconds after the last peer joined; getters: every how many-th
    peer searches; searches: how many each makes then. Records per phase "found", "wrong", "hops",
    "get_s" and "queries", and "kept" and "contacts" once.
    """

    peers: int
    settings: KademliaSettings = field(default_factory=KademliaSettings)
    join_gap_s: float = 0.02
    put_at_s: float = 5.0
    get_at_s: tuple[float, ...] = (10.0,)
    getters: tuple[int, ...] = ()
    writers: int = 300
    searches: int = 1
    gap_s: float = 0.01
    timeout_s: float = 10.0
    linger_s: float = 5.0

    async def run(self, peer: Peer) -> None:
        dht = Kademlia(peer, self.settings)
        start_s = self.join_gap_s * self.peers
        async with peer.tasks() as group:
            dht.start(group)
            await self._join(peer, dht)
            if peer.id < self.writers:
                # Also after a restart: a value belongs to whoever wrote it.
                await self._wait(peer, start_s + self.put_at_s + self.gap_s * peer.id)
                kept = await dht.put(
                    key_of(peer.id), value_of(peer.id), deadline=peer.now() + self.timeout_s
                )
                peer.record("kept", kept)
            for phase, at_s in enumerate(self.get_at_s):
                await self._wait(peer, start_s + at_s + self.gap_s * peer.id)
                if phase == 0:
                    peer.record("contacts", len(dht.table))
                if not self.getters or peer.id in self.getters:
                    await self._search(peer, dht, phase)
            # Answer the others until all are done.
            end_s = start_s + self.get_at_s[-1] + self.gap_s * self.peers + self.linger_s
            await self._wait(peer, end_s)
            dht.stop()

    async def _join(self, peer: Peer, dht: Kademlia) -> None:
        await self._wait(peer, self.join_gap_s * peer.id)
        if self.peers == 1:
            return
        known = range(peer.id) if peer.id else range(1, self.peers)
        contacts = [peer.choice(known, "contact", turn) for turn in range(3)]
        await dht.join(contacts, deadline=peer.now() + self.timeout_s)

    async def _search(self, peer: Peer, dht: Kademlia, phase: int) -> None:
        for turn in range(self.searches):
            number = peer.choice(range(min(self.writers, self.peers)), "search", phase, turn)
            began_s = peer.now()
            found = await dht.get(key_of(number), deadline=began_s + self.timeout_s)
            label = str(phase)
            peer.record("found", float(bool(found)), phase=label)
            peer.record("wrong", float(not _is_true(found, number)), phase=label)
            peer.record("get_s", peer.now() - began_s, phase=label)
            peer.record("queries", found.queries, phase=label)
            if found:
                peer.record("hops", found.hops, phase=label)

    async def _wait(self, peer: Peer, until_s: float) -> None:
        if until_s > peer.now():
            await peer.sleep_until(until_s)


def _is_true(found: Values, number: int) -> bool:
    return all(
        (owner, value) == (number, value_of(number)) for owner, value in found.values.items()
    )


def in_phase(run: Run, name: str, phase: int) -> list[float]:
    """A metric's values in one phase, ascending."""
    wanted = ("phase", str(phase))
    return sorted(row.value for row in run.series(name) if wanted in row.labels)


def at(values: list[float], share: float) -> float:
    """A quantile of ascending values."""
    return values[min(len(values) - 1, int(share * len(values)))]


# Invariants, for `shoal.lab.explore`.


def nothing_is_invented(run: Run) -> str | None:
    """No search returns a value that nobody stored under the key."""
    wrong = [row for row in run.series("wrong") if row.value]
    return f"peer {wrong[0].peer} got a wrong value at {wrong[0].time_s} s" if wrong else None


def what_is_stored_is_found_after_faults(run: Run) -> str | None:
    """In the last phase, long after the last fault, every search finds what its owner keeps.

    Rows with phase "0" are made while faults act, and say nothing about this.
    """
    rows = [row for row in run.series("found") if ("phase", "1") in row.labels]
    missed = [row for row in rows if not row.value]
    return f"peer {missed[0].peer} missed a value at {missed[0].time_s} s" if missed else None
