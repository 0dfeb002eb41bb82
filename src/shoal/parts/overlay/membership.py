"""A membership view that any two peers can merge in any order: a CRDT.

For every peer it holds the last round in which the peer was known to be active and its latest
membership entry, (counter, joined or left). Counters are written by their owner alone and only
grow. Merging takes the larger of both, so it is commutative, associative and idempotent, and peers
that have heard of the same changes hold equal views (Shapiro et al. 2011, state-based CRDTs;
De Vos et al. 2023, MoDeST, arXiv 2302.13837, section on membership).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.base.errors import DecodeError, UsageError

_ROW = np.dtype([("id", "<i8"), ("active", "<i4"), ("entry", "<i4")])
_CHECK_BYTES = 4
_CHECK_START = 0x9E3779B9
_MOST = (1 << 30) - 1


@dataclass(frozen=True, eq=False)
class Membership:
    """A view; every change makes a new one, so that one can be sent and kept at the same time.

    ids: peers in ascending order, int64 [k]; active: last round known active, int64 [k]; entry:
    2 * counter, plus 1 when the peer has left, int64 [k]: of two entries with one counter leaving
    wins. Rounds and counters stay below 2^30. Breaks if one peer's counter is written by two
    machines: the larger one silently wins.

    >>> a = Membership.of([0, 1, 2]).changed(2, counter=1, joined=False, round=5)
    >>> b = Membership.of([0, 1, 2]).seen([1], round=9)
    >>> a.merge(b) == b.merge(a), a.merge(b).candidates(round=10, window=5).tolist()
    (True, [1])
    """

    ids: NDArray[np.int64]
    active: NDArray[np.int64]
    entry: NDArray[np.int64]

    @classmethod
    def of(cls, ids: Iterable[int], round: int = 0) -> Membership:
        """Everybody joined with counter 0 and was active in `round`."""
        known = np.array(sorted(set(ids)), dtype=np.int64)
        return cls(known, np.full(len(known), round, np.int64), np.zeros(len(known), np.int64))

    def merge(self, other: Membership) -> Membership:
        """What both views know together."""
        if self.ids is other.ids or np.array_equal(self.ids, other.ids):
            active, entry = (
                np.maximum(self.active, other.active),
                np.maximum(self.entry, other.entry),
            )
            return Membership(self.ids, active, entry)
        ids = np.union1d(self.ids, other.ids)
        active = np.full(len(ids), -1, np.int64)
        entry = np.full(len(ids), -1, np.int64)
        for view in (self, other):
            place = np.searchsorted(ids, view.ids)
            active[place] = np.maximum(active[place], view.active)
            entry[place] = np.maximum(entry[place], view.entry)
        return Membership(ids, active, entry)

    def seen(self, ids: Iterable[int], round: int) -> Membership:
        """Those of `ids` that are known were active in `round`."""
        wanted = np.fromiter(ids, np.int64)
        place = np.searchsorted(self.ids, wanted)
        known = place < len(self.ids)
        place = place[known]
        place = place[self.ids[place] == wanted[known]]
        active = self.active.copy()
        active[place] = np.maximum(active[place], round)
        return Membership(self.ids, active, self.entry)

    def changed(self, peer: int, *, counter: int, joined: bool, round: int) -> Membership:
        """With a membership change that `peer` made; an older one than is known has no effect."""
        if not (0 <= counter <= _MOST and 0 <= round <= _MOST):
            raise UsageError(
                f"membership: counter={counter}, round={round}; need 0 to {_MOST} (the wire has 30 "
                "bits for each)"
            )
        one = np.array([peer], np.int64)
        entry = np.array([2 * counter + (not joined)], np.int64)
        return self.merge(Membership(one, np.array([round], np.int64), entry))

    def candidates(self, round: int, window: int) -> NDArray[np.int64]:
        """Ids [j] that have joined and were active `window` rounds before `round` or later."""
        return self.ids[(self.entry % 2 == 0) & (self.active >= round - window)]

    def state_of(self, peer: int) -> tuple[int, bool] | None:
        """(counter, joined) of a peer, None when it is unknown."""
        place = int(np.searchsorted(self.ids, peer))
        if place == len(self.ids) or self.ids[place] != peer:
            return None
        entry = int(self.entry[place])
        return entry // 2, entry % 2 == 0

    def __contains__(self, peer: int) -> bool:
        return self.state_of(peer) is not None

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Membership) and all(
            np.array_equal(a, b)
            for a, b in (
                (self.ids, other.ids), (self.active, other.active), (self.entry, other.entry)
            )
        )  # fmt: skip

    __hash__ = None  # type: ignore[assignment]

    # A wire segment: put it into a message as `Packed(view)`.

    def byte_count(self) -> int:
        """16 bytes per peer and a checksum."""
        return _CHECK_BYTES + len(self.ids) * _ROW.itemsize

    def pack(self) -> bytes:
        """Rows (id, active, entry), little-endian, then their CRC-32."""
        rows = np.empty(len(self.ids), _ROW)
        rows["id"], rows["active"], rows["entry"] = self.ids, self.active, self.entry
        data = rows.tobytes()
        return data + _check(data)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Membership:
        """Inverse of `pack`; DecodeError on anything else.

        A damaged view must not get in: what is merged once never goes away again.
        """
        data = bytes(data)
        body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
        if len(data) < _CHECK_BYTES or len(body) % _ROW.itemsize:
            raise DecodeError(f"membership: {len(data)} bytes are no view (16 per peer, and 4)")
        if _check(body) != check:
            raise DecodeError("membership: wrong checksum (the view was damaged on its way)")
        rows = np.frombuffer(body, _ROW)
        ids, active, entry = (rows[name].astype(np.int64) for name in ("id", "active", "entry"))
        if (np.diff(ids) <= 0).any() or (active < -1).any() or (entry < 0).any():
            raise DecodeError("membership: ids do not ascend, or a round or counter is negative")
        return cls(ids, active, entry)


def _check(data: bytes) -> bytes:
    # Not from zero: the first bytes of a view with small ids must not pass for an empty one.
    return zlib.crc32(data, _CHECK_START ^ len(data)).to_bytes(_CHECK_BYTES, "little")
