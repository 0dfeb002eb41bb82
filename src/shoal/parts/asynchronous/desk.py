"""The server's books: which works were taken, what they are waiting for, and what became of them.

Nothing here waits or sends; the books change by calls and are written to the durable store by
`items`. A work is settled once. Its verdict is one of

- "taken": it is kept until a version uses it;
- "duplicate": it was settled before;
- "stale": more versions old than the rule admits;
- "unknown": of no version, number, client or store that there is;
- "broken": not as many numbers as the model has, or not all of them finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from shoal.base.errors import UsageError
from shoal.parts.asynchronous._messages import Call
from shoal.parts.asynchronous.rule import Delta
from shoal.parts.asynchronous.staleness import Staleness
from shoal.parts.asynchronous.versions import Versions
from shoal.tensor.types import Vector

TAKEN, DUPLICATE, STALE, UNKNOWN, BROKEN = "taken", "duplicate", "stale", "unknown", "broken"


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A kept work without its vector, and where in the store that is."""

    slot: int
    client: int
    number: int
    version: int
    steps: int
    weight: float
    arrived_s: float


class Books(msgspec.Struct, frozen=True, array_like=True):
    """What the durable store holds of the books.

    settled: client -> number of its last work that was settled; sent: client -> (number, steps) of
    the model that it was last given; counts: by what became of works.
    """

    settled: dict[int, int]
    sent: dict[int, tuple[int, int]]
    kept: tuple[Place, ...]
    counts: dict[str, int]
    finished: bool


class Desk:
    """Books of one server for these clients.

    >>> import torch
    >>> from shoal.wire.message import Packed
    >>> desk = Desk(Versions(torch.zeros(1), origin=1), [4], Staleness())
    >>> call = Call(1, True, False, 1, 0, 5, 1.0, Packed(b""))
    >>> desk.receive(4, call, torch.ones(1), 0.0)[0], desk.receive(4, call, torch.ones(1), 0.1)[0]
    ('taken', 'duplicate')
    """

    def __init__(self, versions: Versions, clients: Sequence[int], staleness: Staleness) -> None:
        self.versions = versions
        self.staleness = staleness
        self.settled = dict.fromkeys(clients, 0)
        self.sent: dict[int, tuple[int, int]] = {}
        self.kept: dict[int, Delta] = {}
        """by slot, in the order in which they came"""
        self.counts: Counter[str] = Counter()
        self.finished = False
        self._unwritten: set[int] = set()

    def receive(
        self, client: int, call: Call, vector: Vector | None, now_s: float
    ) -> tuple[str, Delta | None]:
        """The verdict on a work that came in, and the work if it was taken.

        vector: None = it could not be unpacked.
        """
        versions, last = self.versions, self.settled.get(client)
        if last is None or call.origin != versions.origin or call.number > last + 1:
            return self._refused(UNKNOWN), None
        if call.number <= last:
            self.counts[DUPLICATE] += call.number > 0
            return (DUPLICATE if call.number > 0 else self._refused(UNKNOWN)), None
        self.settled[client] = call.number
        self.counts["settled"] += 1
        verdict = self._verdict(call, vector)
        self.counts[verdict] += 1
        if verdict != TAKEN or vector is None:
            return verdict, None
        delta = Delta(
            versions.origin, client, call.number, call.version, call.steps, call.weight, now_s,
            vector,
        )  # fmt: skip
        slot = next(slot for slot in range(len(self.kept) + 1) if slot not in self.kept)
        self.kept[slot] = delta
        self._unwritten.add(slot)
        return TAKEN, delta

    def _verdict(self, call: Call, vector: Vector | None) -> str:
        versions = self.versions
        if not versions.knows(call.origin, call.version) or call.steps < 1:
            return UNKNOWN
        if vector is None or vector.shape != versions.params.shape:
            return BROKEN
        if not 0 <= call.weight < float("inf") or not bool(vector.isfinite().all()):
            return BROKEN
        return TAKEN if self.staleness.admits(versions.version - call.version) else STALE

    def _refused(self, reason: str) -> str:
        self.counts["refused"] += 1
        return reason

    def use(self, deltas: Iterable[Delta], became: str = "applied") -> None:
        """These works are kept no longer; UsageError for one that is not kept."""
        places = {id(delta): slot for slot, delta in self.kept.items()}
        for delta in deltas:
            slot = places.pop(id(delta), None)
            if slot is None:
                raise UsageError(
                    f"desk: work {delta.name} is not kept (an action may use a work once, and only "
                    "one that was taken)"
                )
            del self.kept[slot]
            self._unwritten.discard(slot)
            self.counts[became] += 1

    def balanced(self) -> bool:
        """Whether every work that was settled is accounted for."""
        counts = self.counts
        left = counts[STALE] + counts[UNKNOWN] + counts[BROKEN]
        used = counts["applied"] + counts["dropped"] + len(self.kept)
        return counts["settled"] == counts[TAKEN] + left and counts[TAKEN] == used

    def items(self) -> dict[str, Any]:
        """What the store lacks since the last call."""
        places = tuple(
            Place(slot, d.client, d.number, d.version, d.steps, d.weight, d.arrived_s)
            for slot, d in self.kept.items()
        )
        books = Books(self.settled, self.sent, places, dict(self.counts), self.finished)
        items: dict[str, Any] = {"books": msgspec.json.encode(books)}
        items.update((f"kept/{slot}", self.kept[slot].vector) for slot in sorted(self._unwritten))
        self._unwritten.clear()
        return items

    def load(self, stored: Callable[[str], Any], place: Callable[[Vector], Vector]) -> None:
        """Go on from what a store holds; `place` puts vectors where the model is."""
        books = msgspec.json.decode(stored("books"), type=Books)
        self.settled.update(books.settled)
        self.sent.update(books.sent)
        self.counts.update(books.counts)
        self.finished = books.finished
        for each in books.kept:
            self.kept[each.slot] = Delta(
                self.versions.origin, each.client, each.number, each.version, each.steps,
                each.weight, each.arrived_s, place(stored(f"kept/{each.slot}")),
            )  # fmt: skip
