"""Who shares masks with whom, and how many neighbours are enough.

Peers stand on a ring in a random order; each shares masks with the `degree` nearest, half of them
on either side, and gives them shares of its secrets, of which `threshold` open one. A sum stays
secret as long as

- nobody has `threshold` corrupt neighbours (or, where the hub may lie about who dropped out, as
  many as would let it collect shares of both secrets of one peer: 2 threshold > degree + corrupt),
- and the honest peers that took part are connected: to cut a ring of this kind, two runs of
  degree / 2 peers each must all be corrupt or gone.

It can be opened as long as everybody has `threshold` neighbours left. The corrupt and the dropped
are fixed before the order is drawn, so these are tails of hypergeometric laws, and union bounds
over peers and over pairs of runs.

A hub that lies says who dropped out when it knows the order, so that it may cut the ring where
corrupt peers happen to stand close together. Where all clients go by one set of survivors (see
`signed_round`), the first promise is enough to say what it can learn then: sums over disjoint sets
of clients, each with `Needed.honest` honest ones or more. For whoever answers has `threshold`
neighbours in the set with which it shares masks, all but the corrupt ones honest, and nobody's own
mask is opened without the answer of such a neighbour. Nor may whoever chooses the corrupt choose
the order: it follows from the run's seed.

Bell, Bonawitz, Gascon, Lepoint and Raykova 2020, sections 3 and 4 (Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead, doi 10.1145/3372297.3417885; ePrint 2020/704).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from scipy import stats
from scipy.special import gammaln

from shoal.base import keyed
from shoal.base.errors import UsageError


@dataclass(frozen=True)
class Assumed:
    """What is assumed of the peers, and with which certainty the two promises hold.

    corrupt: part of the peers that collude with the hub; dropout: part that may drop out, in all
    phases together. A sum leaks with a chance of at most 2^-sigma, and cannot be opened with a
    chance of at most 2^-eta. lying: the hub may tell each peer something else, of who dropped out
    and of others' keys; False: it follows the protocol and only looks.

    >>> Assumed(corrupt=0.05, dropout=0.33, eta=20, lying=False).needed(1000)
    Needed(degree=72, threshold=24, honest=2)
    """

    corrupt: float = 0.2
    dropout: float = 0.2
    sigma: float = 40.0
    eta: float = 30.0
    lying: bool = True

    def __post_init__(self) -> None:
        parts = self.corrupt, self.dropout
        if not (min(parts) >= 0 and sum(parts) < 1 and self.sigma > 0 and self.eta > 0):
            raise UsageError(
                f"Assumed: corrupt={self.corrupt}, dropout={self.dropout}, sigma={self.sigma}, "
                f"eta={self.eta}; need parts of at least 0 that leave somebody, and positive "
                "exponents"
            )

    def needed(self, peers: int) -> Needed:
        """The smallest degree that keeps both promises among so many peers, and its threshold."""
        return _needed(self, peers)

    def gone(self, peers: int) -> tuple[int, int]:
        """(corrupt, dropped) of so many peers, whole ones."""
        # A product that is whole but for rounding must not lose one.
        return int(self.corrupt * peers + 1e-9), int(self.dropout * peers + 1e-9)


@dataclass(frozen=True)
class Needed:
    """degree: neighbours of each peer; threshold: shares that open a secret, one less tells
    nothing; honest: how many honest peers there are at least in any sum that a hub that lies can
    open, where clients go by one set of survivors."""

    degree: int
    threshold: int
    honest: int


@lru_cache(maxsize=256)
def _needed(assumed: Assumed, peers: int) -> Needed:
    corrupt, _ = assumed.gone(peers)
    most = 0
    for degree in [*range(2, peers - 1, 2), peers - 1]:
        if degree < 2 or log2_cut(assumed, peers, degree) > -(assumed.sigma + 1):
            continue
        # How many corrupt neighbours anybody may have; it grows with the degree.
        while _log2_tail(peers, corrupt, degree, most) > -(assumed.sigma + 1):
            most += 1
        # The fewest shares that corrupt neighbours do not have.
        threshold = max(2, (degree + most) // 2 + 1 if assumed.lying else most + 1)
        if threshold <= degree and (log2_closed(assumed, peers, degree, threshold) <= -assumed.eta):
            return Needed(degree, threshold, threshold - most + 1)
    raise UsageError(
        f"Assumed: {peers} peers, of whom {assumed.corrupt:.0%} are corrupt and "
        f"{assumed.dropout:.0%} drop out; no degree keeps both promises (assume less, or have "
        "more peers, at least 3)"
    )


def _log2_tail(peers: int, marked: int, degree: int, most: int) -> float:
    """log2 of a bound on the chance that any peer has more than `most` marked neighbours."""
    tail = float(stats.hypergeom.sf(most, peers - 1, min(marked, peers - 1), degree))
    return math.log2(peers * tail) if tail > 0 else -math.inf


def log2_closed(assumed: Assumed, peers: int, degree: int, threshold: int) -> float:
    """log2 of a bound on the chance that a secret cannot be opened: too few neighbours are left."""
    _, dropped = assumed.gone(peers)
    return _log2_tail(peers, dropped, degree, degree - threshold)


def log2_cut(assumed: Assumed, peers: int, degree: int) -> float:
    """log2 of a bound on the chance that the honest peers that are left are not connected."""
    gone = sum(assumed.gone(peers))
    if degree >= peers - 1 or degree > gone:
        return -math.inf
    pairs = math.log(peers) + math.log(peers - degree - 1) - math.log(2)

    def log_choose(n: int) -> float:
        return float(gammaln(n + 1) - gammaln(n - degree + 1))

    return (pairs + log_choose(gone) - log_choose(peers)) / math.log(2)


@dataclass(frozen=True)
class MaskGraph:
    """The neighbours of one round.

    peers: who takes part, ascending. key: words from which everybody draws the same order, so that
    nobody chooses it. degree: even, or that of the complete graph.

    >>> graph = MaskGraph((2, 3, 5, 7, 11, 13), degree=2, threshold=2, key=(7, "graph"))
    >>> graph.neighbors(5), all(5 in graph.neighbors(j) for j in graph.neighbors(5))
    ((3, 11), True)
    """

    peers: tuple[int, ...]
    degree: int
    threshold: int
    key: tuple[int | str, ...]

    def __post_init__(self) -> None:
        n, k = len(self.peers), self.degree
        if list(self.peers) != sorted(set(self.peers)):
            raise UsageError(f"MaskGraph: peers={self.peers}; need each once, in rising order")
        if not (2 <= k < n and (k % 2 == 0 or k == n - 1) and 2 <= self.threshold <= k):
            raise UsageError(
                f"MaskGraph: degree={k}, threshold={self.threshold} for {n} peers; need an even "
                "degree below their number, or all others, and a threshold from 2 to the degree"
            )

    @classmethod
    def of(cls, peers: Sequence[int], assumed: Assumed, *key: int | str) -> MaskGraph:
        """With the degree and threshold that the assumptions need."""
        needed = assumed.needed(len(peers))
        return cls(tuple(peers), needed.degree, needed.threshold, key)

    @cached_property
    def _neighbors(self) -> dict[int, tuple[int, ...]]:
        n, half = len(self.peers), self.degree // 2
        if self.degree == n - 1:
            return {p: tuple([q for q in self.peers if q != p]) for p in self.peers}
        ring = sorted(self.peers, key=lambda peer: keyed.fold(0, *self.key, peer))
        around = [step for step in range(-half, half + 1) if step]
        return {
            peer: tuple(sorted(ring[(place + step) % n] for step in around))
            for place, peer in enumerate(ring)
        }

    @cached_property
    def witnesses(self) -> tuple[int, ...]:
        """Whose word on the survivors counts, ascending: `degree` of the peers. Two sets that
        `threshold` of them vouch for have an honest one in common, as for anybody's neighbours."""
        drawn = sorted(self.peers, key=lambda peer: keyed.fold(0, *self.key, "witness", peer))
        return tuple(sorted(drawn[: self.degree]))

    def neighbors(self, peer: int) -> tuple[int, ...]:
        """With whom a peer shares masks, ascending; a neighbour has this peer as one, too."""
        return self._neighbors[peer]
