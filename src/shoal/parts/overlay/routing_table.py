"""Kademlia's view of the network: node numbers, the XOR metric, and k-buckets of contacts.

Source: Maymounkov and Mazieres 2002, "Kademlia", sections 2.1, 2.2 and 4.1, with 256-bit numbers.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from shoal.base.errors import UsageError
from shoal.base.ids import PeerId

BITS = 256


def number_of(data: bytes) -> int:
    """The place of some bytes in the space of 256-bit numbers: their SHA-256, big-endian.

    >>> hex(number_of(b"abc"))[:10]
    '0xba7816bf'
    """
    return int.from_bytes(hashlib.sha256(data).digest(), "big")


@lru_cache(maxsize=1 << 17)
def number_of_peer(peer: int) -> int:
    """The node number of a peer that is known by its id alone, as in simulations.

    Nobody can choose it, but whoever can choose an id can try ids until the number suits: with
    identities the number is that of the public key.
    """
    return number_of(peer.to_bytes(8, "big", signed=True))


class RoutingTable:
    """Up to k contacts for every distance from 2^i to 2^(i+1), least recently heard first.

    own: the number of the node whose table it is. A contact that did not answer is a suspect: it
    keeps its place, because the fault may be on this side, but is shown to nobody until it is heard
    again. Who comes to a full bucket waits among at most k spares for a place: contacts leave only
    by `evict`, which is for those that failed a ping, so that strangers cannot push out nodes that
    are known to live (section 4.1; the eclipse attack).

    >>> table = RoutingTable(0, k=2)
    >>> [table.heard(number, PeerId(number)) for number in (4, 5, 6)]
    [None, None, 4]
    >>> table.closest(7, 1), table.evict(4), table.closest(7, 1)
    ([5], 6, [6])
    """

    def __init__(self, own: int, k: int) -> None:
        if k < 1:
            raise UsageError(f"RoutingTable: k={k}; need at least 1")
        self.own = own
        self.k = k
        self.buckets: dict[int, dict[int, PeerId]] = {}
        """by the bit length of the distance; each by node number, least recently heard first"""
        self._spares: dict[int, dict[int, PeerId]] = {}
        self._responsive: dict[int, PeerId] = {}

    def index(self, number: int) -> int:
        """Which bucket a number belongs to: 1 to 256, 0 for the own one."""
        return (number ^ self.own).bit_length()

    def heard(self, number: int, peer: PeerId) -> int | None:
        """A message came from a node; when its bucket is full, the number of whom to ping.

        That is a suspect if there is one, otherwise the contact that was silent for longest.
        """
        index = (number ^ self.own).bit_length()
        if not index:
            return None
        bucket = self.buckets.get(index)
        if bucket is None:
            bucket = self.buckets[index] = {}
        if bucket.pop(number, None) is not None or len(bucket) < self.k:
            bucket[number] = peer
            self._responsive[number] = peer
            if spares := self._spares.get(index):
                spares.pop(number, None)
            return None
        spares = self._spares.setdefault(index, {})
        spares.pop(number, None)
        spares[number] = peer
        if len(spares) > self.k:
            del spares[next(iter(spares))]
        return self.weakest(index)

    def weakest(self, index: int) -> int | None:
        """Whom to ping so that a spare may come in; None while nobody waits."""
        if not self._spares.get(index):
            return None
        bucket = self.buckets[index]
        return next((n for n in bucket if n not in self._responsive), next(iter(bucket)))

    def silent(self, number: int) -> None:
        """A node did not answer: it becomes a suspect."""
        self._responsive.pop(number, None)

    def evict(self, number: int) -> int | None:
        """Give the place of a contact that failed a ping to the spare heard last: its number.

        Without a spare it keeps the place: a node that is cut off must not forget everybody.
        """
        index = self.index(number)
        spares, bucket = self._spares.get(index), self.buckets.get(index, {})
        self._responsive.pop(number, None)
        if not spares or number not in bucket:
            return None
        del bucket[number]
        new, peer = spares.popitem()
        bucket[new] = self._responsive[new] = peer
        return new

    def closest(self, number: int, count: int) -> list[PeerId]:
        """The `count` responsive contacts that are closest to a number, the closest first."""
        known = self._responsive
        return [known[each] for each in sorted(known, key=number.__xor__)[:count]]

    def suspects(self, number: int, count: int) -> list[PeerId]:
        """The same of the contacts that did not answer last time."""
        silent = {
            each: peer
            for bucket in self.buckets.values()
            for each, peer in bucket.items()
            if each not in self._responsive
        }
        return [silent[each] for each in sorted(silent, key=number.__xor__)[:count]]

    def is_suspect(self, number: int) -> bool:
        """Whether it is a contact that did not answer."""
        return number not in self._responsive and number in self.buckets.get(self.index(number), ())

    def __len__(self) -> int:
        """How many responsive contacts there are."""
        return len(self._responsive)
