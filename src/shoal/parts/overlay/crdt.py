"""Values that replicas change alone and merge in any order: state-based CRDTs with deltas.

Every value is a message of plain data. A change returns a *delta*: a small value of the same class,
which `merge` puts into any replica's value, once or many times, in any order. `merge` is
commutative, associative and idempotent for all values, also for those that a liar made, so that
replicas with the same deltas hold the same value.

`fault(author, stamp)` says what is wrong with a delta that `author` signed under `stamp`, or None:
an author writes counters, registers and leases in its own name only.

What stays behind when things are removed:

- `OrSet` keeps no tombstones. What was seen and is gone is told from what was not seen by a vector
  with one number per author (add tags are numbered by their author without gaps).
- `LwwMap` keeps a stamp without a value per deleted key: bounded by the number of distinct keys.
- `ExpiringMap` forgets an entry at its expiry (`pruned`): bounded by the number of live authors.

Sources: Shapiro et al. 2011, A comprehensive study of CRDTs; Almeida, Shoker and Baquero 2018,
Delta state replicated data types, figures 2, 8 and 10 (counters, causal context, add-wins set).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from shoal.base.errors import UsageError
from shoal.parts.overlay.hybrid_clock import Stamp
from shoal.wire.message import message

Plain = str | int | float | bool | None
"""What registers hold; None stands for nothing. Bytes go as text, such as hex."""
Element = str | int
"""What sets hold."""
Dot = tuple[bytes, int]
"""An add tag: its author, and the how-many-th add of that author in this set, from 1."""

_MOST = (1 << 62) - 1
_MOST_DOTS = 4096

_encode = msgspec.msgpack.Encoder().encode


@message
class GCounter:
    """A counter that only grows: every author's own total; the value is their sum.

    Breaks when one author's total is written from two places that do not know of each other.

    >>> a, b = GCounter().added(b"a", 2), GCounter().added(b"b", 3)
    >>> a.merge(b).merge(a).value
    5
    """

    totals: dict[bytes, int] = {}  # noqa: RUF012

    @property
    def value(self) -> int:
        """The sum of all increments."""
        return sum(self.totals.values())

    def added(self, author: bytes, amount: int = 1) -> GCounter:
        """The delta of one increment; UsageError below zero."""
        if amount < 0:
            raise UsageError(f"GCounter: amount={amount}; it only grows (use PNCounter)")
        return GCounter({author: self.totals.get(author, 0) + amount})

    def merge(self, other: GCounter) -> GCounter:
        """The larger total of every author."""
        return GCounter(_larger(self.totals, other.totals))

    def fault(self, author: bytes, stamp: Stamp) -> str | None:
        """Why `author` may not have made this delta."""
        return _foreign_totals(self.totals, author)


@message
class PNCounter:
    """A counter that goes up and down: two that only grow.

    >>> c = PNCounter().added(b"a", 5)
    >>> c.merge(c.added(b"b", -2)).value
    3
    """

    up: dict[bytes, int] = {}  # noqa: RUF012
    down: dict[bytes, int] = {}  # noqa: RUF012

    @property
    def value(self) -> int:
        """All increments minus all decrements."""
        return sum(self.up.values()) - sum(self.down.values())

    def added(self, author: bytes, amount: int = 1) -> PNCounter:
        """The delta of one increment, or of a decrement when `amount` is negative."""
        if amount < 0:
            return PNCounter({}, {author: self.down.get(author, 0) - amount})
        return PNCounter({author: self.up.get(author, 0) + amount})

    def merge(self, other: PNCounter) -> PNCounter:
        """The larger totals of every author."""
        return PNCounter(_larger(self.up, other.up), _larger(self.down, other.down))

    def fault(self, author: bytes, stamp: Stamp) -> str | None:
        """Why `author` may not have made this delta."""
        return _foreign_totals(self.up, author) or _foreign_totals(self.down, author)


@message
class LwwRegister:
    """One value; of two writes the one with the larger stamp stays, of equal stamps the one of the
    larger author, and of a liar's two writes under one stamp the larger encoding.

    >>> early = LwwRegister().written(b"a", (100, 0), "old")
    >>> late = LwwRegister().written(b"b", (101, 0), "new")
    >>> late.merge(early).value, early.merge(late).value
    ('new', 'new')
    """

    time_ns: int = -(1 << 62)
    count: int = 0
    author: bytes = b""
    value: Plain = None

    def written(self, author: bytes, stamp: Stamp, value: Plain) -> LwwRegister:
        """The delta of a write under a stamp larger than all that its author has seen."""
        return LwwRegister(*stamp, author, value)

    def merge(self, other: LwwRegister) -> LwwRegister:
        """The later write."""
        mine, theirs = self._order(), other._order()
        if mine == theirs:
            return self if _encode(self.value) >= _encode(other.value) else other
        return self if mine > theirs else other

    def fault(self, author: bytes, stamp: Stamp) -> str | None:
        """Why `author` may not have made this delta."""
        if self.author != author:
            return "a write in another author's name"
        if (self.time_ns, self.count) != stamp:
            return "a write under another stamp than its node's"
        return None

    def _order(self) -> tuple[int, int, bytes]:
        return self.time_ns, self.count, self.author


@message
class LwwMap:
    """A dictionary of registers. Deleting writes None, so that an older write stays away.

    >>> m = LwwMap().written(b"a", (1, 0), "model", "v1")
    >>> m = m.merge(m.written(b"b", (2, 0), "model", "v2"))
    >>> m.value, m.merge(m.written(b"a", (3, 0), "model", None)).value
    ({'model': 'v2'}, {})
    """

    entries: dict[str, LwwRegister] = {}  # noqa: RUF012

    @property
    def value(self) -> dict[str, Plain]:
        """What is there, by key in ascending order."""
        return {
            key: entry.value
            for key, entry in sorted(self.entries.items())
            if entry.value is not None
        }

    def written(self, author: bytes, stamp: Stamp, key: str, value: Plain) -> LwwMap:
        """The delta of one write; None deletes."""
        return LwwMap({key: LwwRegister(*stamp, author, value)})

    def merge(self, other: LwwMap) -> LwwMap:
        """The later write of every key."""
        merged = dict(self.entries)
        for key, entry in other.entries.items():
            known = merged.get(key)
            merged[key] = entry if known is None else known.merge(entry)
        return LwwMap(merged)

    def fault(self, author: bytes, stamp: Stamp) -> str | None:
        """Why `author` may not have made this delta."""
        faults = (entry.fault(author, stamp) for entry in self.entries.values())
        return next(filter(None, faults), None)


@message
class OrSet:
    """A set in which an add wins over a removal that did not see it (observed-remove).

    items: add tags by element, ascending; seen: per author, all its tags up to this number were
    seen; apart: tags that were seen beyond these. A removal deletes the tags that it saw; an add
    that runs beside it has a new tag, which stays.

    >>> base = OrSet().added(b"a", "x")
    >>> removal, again = base.removed("x"), base.added(b"b", "x")
    >>> sorted(base.merge(removal).value), sorted(base.merge(removal).merge(again).value)
    ([], ['x'])
    """

    items: dict[Element, tuple[Dot, ...]] = {}  # noqa: RUF012
    seen: dict[bytes, int] = {}  # noqa: RUF012
    apart: tuple[Dot, ...] = ()

    @property
    def value(self) -> frozenset[Element]:
        """The elements."""
        return frozenset(self.items)

    def __contains__(self, element: Element) -> bool:
        return element in self.items

    def added(self, author: bytes, element: Element) -> OrSet:
        """The delta of an add: a new tag, in place of the author's earlier ones of the element."""
        last = self.seen.get(author, 0)
        last = max([last, *(number for by, number in self.apart if by == author)])
        own = [dot for dot in self.items.get(element, ()) if dot[0] == author]
        new = (author, last + 1)
        return OrSet({element: (new,)}, *_compact({}, {*own, new}))

    def removed(self, element: Element) -> OrSet:
        """The delta of a removal: all tags of the element that are seen here."""
        return OrSet({}, *_compact({}, set(self.items.get(element, ()))))

    def merge(self, other: OrSet) -> OrSet:
        """Tags that both have, or that one has and the other never saw."""
        items = _kept(self, other)
        for element, dots in _kept(other, self).items():
            mine = items.get(element)
            if mine != dots:
                items[element] = dots if mine is None else tuple(sorted({*mine, *dots}))
        context = _larger(self.seen, other.seen)
        return OrSet(items, *_compact(context, {*self.apart, *other.apart}))

    def adds(self) -> list[Dot]:
        """The tags that this delta brings."""
        return [dot for dots in self.items.values() for dot in dots]

    def removes(self) -> list[Dot]:
        """The tags that this delta takes away, ascending. They are few in any honest delta."""
        every = {(author, n) for author, last in self.seen.items() for n in range(1, last + 1)}
        return sorted((every | set(self.apart)).difference(self.adds()))

    def fault(self, author: bytes, stamp: Stamp) -> str | None:
        """Why `author` may not have made this delta. Whether it has seen the tags of others that it
        removes is for the store to say, which knows who added them."""
        if sum(self.seen.values()) + len(self.apart) > _MOST_DOTS:
            return f"a delta over more than {_MOST_DOTS} tags"
        if not all(1 <= number <= _MOST for _, number in (*self.adds(), *self.apart)):
            return "a tag without a number"
        if any(number < 1 for number in self.seen.values()):
            return "an author without tags"
        if any(dot[0] != author for dot in self.adds()):
            return "a tag in another author's name"
        if not all(_has(self, dot) for dot in self.adds()):
            return "a tag that its own delta has not seen"
        return None


@message
class Lease:
    """What one author holds under a shared key, until it expires.

    until_ns: not forgotten before, the latest expiry that its author ever gave."""

    time_ns: int
    count: int
    expires_ns: int
    until_ns: int
    value: Plain

    def merge(self, other: Lease) -> Lease:
        """The later write, kept as long as either."""
        later = max(self, other, key=Lease._order)
        until_ns = max(self.until_ns, other.until_ns)
        return Lease(later.time_ns, later.count, later.expires_ns, until_ns, later.value)

    def _order(self) -> tuple[int, int, int, bytes]:
        return self.time_ns, self.count, self.expires_ns, _encode(self.value)


@message
class ExpiringMap:
    """Under one shared key, one value per author, each with its own expiry.

    The shape of provider records, votes and "I am here": authors do not overwrite each other, and
    what nobody renews goes away. Breaks when clocks differ by as much as a lease lasts.

    >>> m = ExpiringMap().held(b"a", (10, 0), "here", expires_ns=50)
    >>> m = m.merge(ExpiringMap().held(b"b", (11, 0), "here too", expires_ns=90))
    >>> m.value(40), m.value(60)
    ({b'a': 'here', b'b': 'here too'}, {b'b': 'here too'})
    """

    leases: dict[bytes, Lease] = {}  # noqa: RUF012

    def value(self, now_ns: int) -> dict[bytes, Plain]:
        """What has not expired, by author in ascending order."""
        return {
            author: lease.value
            for author, lease in sorted(self.leases.items())
            if lease.expires_ns > now_ns and lease.value is not None
        }

    def held(
        self, author: bytes, stamp: Stamp, value: Plain, *, expires_ns: int
    ) -> ExpiringMap:  # fmt: skip
        """The delta by which an author puts or renews its value; None takes it back."""
        known = self.leases.get(author)
        until_ns = expires_ns if known is None else max(known.until_ns, expires_ns)
        return ExpiringMap({author: Lease(*stamp, expires_ns, until_ns, value)})

    def merge(self, other: ExpiringMap) -> ExpiringMap:
        """The later lease of every author."""
        merged = dict(self.leases)
        for author, lease in other.leases.items():
            known = merged.get(author)
            merged[author] = lease if known is None else known.merge(lease)
        return ExpiringMap(merged)

    def pruned(self, now_ns: int) -> ExpiringMap:
        """Without what can no longer show. An author's leases must arrive in their order, as they
        do from a signed store: an earlier one that comes later would otherwise show again."""
        return ExpiringMap(
            {author: lease for author, lease in self.leases.items() if lease.until_ns > now_ns}
        )

    def fault(self, author: bytes, stamp: Stamp) -> str | None:
        """Why `author` may not have made this delta."""
        for holder, lease in self.leases.items():
            if holder != author:
                return "a lease in another author's name"
            if (lease.time_ns, lease.count) != stamp:
                return "a lease under another stamp than its node's"
            if lease.until_ns < lease.expires_ns:
                return "a lease to be forgotten before it expires"
        return None


Value = GCounter | PNCounter | LwwRegister | LwwMap | OrSet | ExpiringMap


def _larger(left: Mapping[bytes, int], right: Mapping[bytes, int]) -> dict[bytes, int]:
    merged = dict(left)
    for author, number in right.items():
        if number > merged.get(author, -1):
            merged[author] = number
    return merged


def _foreign_totals(totals: Mapping[bytes, int], author: bytes) -> str | None:
    if any(key != author for key in totals):
        return "a total in another author's name"
    if not all(0 <= total <= _MOST for total in totals.values()):
        return f"a total outside of 0 to {_MOST}"
    return None


def _has(value: OrSet, dot: Dot) -> bool:
    return dot[1] <= value.seen.get(dot[0], 0) or dot in value.apart


def _kept(one: OrSet, other: OrSet) -> dict[Element, tuple[Dot, ...]]:
    """The tags of `one` that `other` has too or never saw."""
    if not other.seen and not other.apart:
        return dict(one.items)
    seen, apart, theirs = other.seen, frozenset(other.apart), other.items
    kept: dict[Element, tuple[Dot, ...]] = {}
    for element, dots in one.items.items():
        stay = dots
        for dot in dots:
            if (dot[1] <= seen.get(dot[0], 0) or dot in apart) and dot not in theirs.get(
                element, ()
            ):
                stay = tuple(each for each in stay if each != dot)
        if stay:
            kept[element] = stay
    return kept


def _compact(
    seen: dict[bytes, int], apart: Iterable[Dot]
) -> tuple[dict[bytes, int], tuple[Dot, ...]]:
    """A context in its only form: as much as possible in the vector."""
    rest: list[Dot] = []
    for author, number in sorted(apart):
        last = seen.get(author, 0)
        if number == last + 1:
            seen[author] = number
        elif number > last:
            rest.append((author, number))
    return seen, tuple(rest)
