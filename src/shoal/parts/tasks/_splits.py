"""Who gets which samples: splits of a table of labels over peers.

Every split returns one array of positions per peer and is a function of its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.base import keyed
from shoal.base.errors import UsageError
from shoal.rounds.task import Shard

SPLITS = ("iid", "dirichlet", "classes", "sizes", "uneven")


@dataclass(frozen=True)
class Split:
    """How training samples are shared out.

    kind: `iid` (equal parts, classes balanced), `dirichlet` (each class is shared out in
    proportions drawn from Dirichlet(alpha): Hsu, Qi and Brown 2019, section 3), `classes` (sorted
    by label, cut into `peers * classes_per_peer` pieces, dealt out: McMahan et al. 2017, section
    3), `sizes` (iid in content, sizes log-normal with `spread`), `uneven` (each peer has
    `classes_per_peer` classes or up to twice as many less one, drawn by seed such that all classes
    have about as many owners, who share them in log-normal parts; after the class partition of Li
    et al. 2024, arXiv 2309.14675).
    samples_per_peer: exactly so many for each peer; with_replacement: drawn by key from the whole
    table, so that any number of peers can be served. holders: only these peers get data.
    """

    kind: str = "iid"
    alpha: float = 0.5
    classes_per_peer: int = 2
    spread: float = 1.0
    samples_per_peer: int | None = None
    with_replacement: bool = False
    holders: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in SPLITS:
            raise UsageError(f"split = {self.kind!r}; need one of {', '.join(SPLITS)}")
        if not self.alpha > 0 or not self.spread >= 0 or self.classes_per_peer < 1:
            raise UsageError(
                f"split: alpha={self.alpha}, spread={self.spread}, "
                f"classes_per_peer={self.classes_per_peer}; need alpha > 0, spread >= 0 and at "
                "least one class per peer"
            )
        if self.samples_per_peer is not None and self.samples_per_peer < 1:
            raise UsageError(f"split: samples_per_peer={self.samples_per_peer}; need at least 1")
        if self.with_replacement and self.samples_per_peer is None:
            raise UsageError("split: with_replacement needs samples_per_peer (set it)")

    def parts(self, labels: np.ndarray, peers: int, seed: int) -> list[np.ndarray]:
        """Positions in `labels` of every peer."""
        rng = np.random.default_rng(keyed.fold(0, seed, "split"))
        holders = range(peers) if self.holders is None else sorted(set(self.holders))
        if not holders or holders[0] < 0 or holders[-1] >= peers:
            raise UsageError(
                f"split: holders={self.holders}; need some of the ids 0 to {peers - 1}"
            )
        wanted = self.samples_per_peer
        if wanted is not None and not self.with_replacement and wanted * len(holders) > len(labels):
            raise UsageError(
                f"split: {len(holders)} peers x samples_per_peer={wanted} need more than the "
                f"{len(labels)} samples there are (lower it, or set with_replacement = true)"
            )
        if len(holders) > len(labels) and not self.with_replacement:
            raise UsageError(
                f"split: {len(holders)} peers share {len(labels)} samples; some would have none "
                "(set samples_per_peer and with_replacement = true)"
            )
        pieces = len(holders) * self.classes_per_peer
        if self.kind == "classes" and wanted is None and pieces > len(labels):
            raise UsageError(
                f"split: {len(holders)} peers x classes_per_peer={self.classes_per_peer} need "
                f"{pieces} pieces of {len(labels)} samples; some would be empty (lower it)"
            )
        dealt = self._dealt(labels, len(holders), rng)
        empty = np.zeros(0, np.int64)
        placed = [empty] * peers
        for peer, part in zip(holders, dealt, strict=True):
            placed[peer] = np.sort(part)
        return placed

    def _dealt(self, labels: np.ndarray, peers: int, rng: np.random.Generator) -> list[np.ndarray]:
        if self.with_replacement:
            assert self.samples_per_peer is not None
            return self._drawn(labels, peers, self.samples_per_peer, rng)
        if self.kind == "iid":
            dealt = _balanced(labels, peers, rng)
        elif self.kind == "dirichlet":
            dealt = _dirichlet(labels, peers, self.alpha, rng)
        elif self.kind == "classes":
            dealt = _by_class(labels, peers, self.classes_per_peer, rng)
        elif self.kind == "uneven":
            dealt = _uneven(labels, peers, self.classes_per_peer, self.spread, rng)
        else:
            dealt = _by_size(len(labels), peers, self.spread, rng)
        wanted = self.samples_per_peer
        if wanted is None:
            return dealt
        # Short shards are filled up from the samples that the long ones have too many of.
        shuffled = [rng.permutation(part) for part in dealt]
        spare = np.concatenate([part[wanted:] for part in shuffled])
        if self.kind == "iid" and len(spare) < sum(max(0, wanted - len(p)) for p in shuffled):
            raise AssertionError("a balanced split ran short")
        out, used = [], 0
        for part in shuffled:
            lack = max(0, wanted - len(part))
            out.append(np.concatenate((part[:wanted], spare[used : used + lack])))
            used += lack
        return out

    def _drawn(
        self, labels: np.ndarray, peers: int, count: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Every peer draws from the whole table, by class proportions where the split has some."""
        if self.kind in ("iid", "sizes"):
            return list(rng.integers(0, len(labels), (peers, count)))
        classes = np.unique(labels)
        table = [np.flatnonzero(labels == c) for c in classes]
        if self.kind == "dirichlet":
            shares = rng.dirichlet(np.full(len(classes), self.alpha), peers)
        else:
            kept = rng.random((peers, len(classes))).argsort(1) < self.classes_per_peer
            shares = kept / kept.sum(1, keepdims=True)
        out = []
        for share in shares:
            counts = rng.multinomial(count, share)
            drawn = [t[rng.integers(0, len(t), n)] for t, n in zip(table, counts, strict=True)]
            out.append(np.concatenate(drawn))
        return out


def _balanced(labels: np.ndarray, peers: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Equal sizes, every class dealt out like cards, so that all peers see all of them."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    places = np.arange(len(order)) % peers
    # Peers differ in which remainder they get.
    return [order[places == p] for p in rng.permutation(peers)]


def _dirichlet(
    labels: np.ndarray, peers: int, alpha: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Proportions of each class from Dirichlet(alpha); nobody is left without a sample."""
    parts: list[list[np.ndarray]] = [[] for _ in range(peers)]
    for c in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == c))
        shares = rng.dirichlet(np.full(peers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, np.split(own, cuts), strict=True):
            part.append(piece)
    return _nobody_empty(parts)


def _uneven(
    labels: np.ndarray, peers: int, fewest: int, spread: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Some classes for every peer, in unequal parts; nobody is left without a sample."""
    classes = np.unique(labels)
    most = min(2 * fewest - 1, len(classes))
    has = np.zeros((peers, len(classes)), bool)
    for own in has:
        # The classes that fewest have, so that every class has about as many owners.
        order = np.lexsort((rng.permutation(len(classes)), has.sum(0)))
        own[order[: rng.integers(min(fewest, most), most + 1)]] = True
    # With few peers there are classes that nobody drew.
    has[rng.integers(0, peers, len(classes)), range(len(classes))] |= ~has.any(0)
    parts: list[list[np.ndarray]] = [[] for _ in range(peers)]
    for place, c in enumerate(classes):
        weights = np.exp(spread * rng.standard_normal(peers)) * has[:, place]
        own = rng.permutation(np.flatnonzero(labels == c))
        cuts = np.round(np.cumsum(weights / weights.sum())[:-1] * len(own)).astype(int)
        for part, piece in zip(parts, np.split(own, cuts), strict=True):
            part.append(piece)
    return _nobody_empty(parts)


def _nobody_empty(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Each peer's pieces joined; who has nothing gets a sample of the richest."""
    joined = [np.concatenate(part) for part in parts]
    for p, part in enumerate(joined):
        if not len(part):
            rich = max(range(len(joined)), key=lambda q: len(joined[q]))
            joined[p], joined[rich] = joined[rich][:1], joined[rich][1:]
    return joined


def _by_class(
    labels: np.ndarray, peers: int, each: int, rng: np.random.Generator
) -> list[np.ndarray]:
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, peers * each)
    dealt = rng.permutation(peers * each).reshape(peers, each)
    return [np.concatenate([pieces[i] for i in row]) for row in dealt]


def _by_size(count: int, peers: int, spread: float, rng: np.random.Generator) -> list[np.ndarray]:
    weights = np.exp(spread * rng.standard_normal(peers))
    # One sample is everybody's; the rest goes by weight.
    cuts = np.round(np.cumsum(weights / weights.sum()) * (count - peers)).astype(int)
    sizes = np.diff(cuts, prepend=0) + 1
    return np.split(rng.permutation(count), np.cumsum(sizes)[:-1])


def shards_of(parts: Sequence[np.ndarray], device: str = "cpu") -> Shard:
    """A stacked shard [peers, most] from each peer's positions; padded with 0.

    >>> shards_of([np.array([4, 7]), np.array([5])]).index.tolist()
    [[4, 7], [5, 0]]
    """
    most = max(1, *(len(part) for part in parts)) if parts else 1
    index = torch.zeros((len(parts), most), dtype=torch.int64, device="cpu")
    for peer, part in enumerate(parts):
        index[peer, : len(part)] = torch.from_numpy(np.asarray(part, np.int64))
    size = torch.tensor([len(part) for part in parts], dtype=torch.int64, device=device)
    return Shard(index.to(device), size)


def set_aside(
    parts: Sequence[np.ndarray], labels: np.ndarray, count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Each peer's positions without `count` of them, and those [peers, count], padded with -1.

    Each class gives up the same share of its samples, the last ones, and keeps at least one. So a
    peer with few samples of many classes sets aside fewer than `count`.

    >>> kept, held = set_aside([np.arange(6)], np.array([0, 0, 0, 1, 1, 1]), 2)
    >>> kept[0].tolist(), held.tolist()
    ([0, 1, 3, 4], [[2, 5]])
    """
    kept, held = [], np.full((len(parts), count), -1, np.int64)
    for peer, part in enumerate(parts):
        share = np.full(len(part), np.inf)
        for c in np.unique(labels[part]):
            own = np.flatnonzero(labels[part] == c)
            share[own[1:]] = (np.arange(len(own) - 2, -1, -1) + 0.5) / len(own)
        first = np.argsort(share, kind="stable")[:count]
        aside = np.sort(first[np.isfinite(share[first])])
        held[peer, : len(aside)] = part[aside]
        kept.append(np.delete(part, aside))
    return kept, held


def subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` positions, classes balanced as far as they go."""
    if not 1 <= count <= len(labels):
        raise UsageError(f"train_samples={count}; need 1 to {len(labels)} (there are no more)")
    rng = np.random.default_rng(keyed.fold(0, seed, "subset"))
    order = rng.permutation(len(labels))
    rank = np.zeros(len(labels), int)
    for c in np.unique(labels):
        own = order[labels[order] == c]
        rank[own] = np.arange(len(own))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:count])
