"""Balanced clusters of samples in two stages: many fine groups, then groups of groups."""

from __future__ import annotations

import numpy as np

from shoal.base import keyed
from shoal.base.errors import UsageError

SWEEPS = 20


def partition(
    features: np.ndarray, k: int, fine: int = 1024, balance: float = 1.25, seed: int = 0
) -> np.ndarray:
    """The cluster of each row of features [n, width]: int64 [n], numbers 0 to k - 1, none empty.

    k-means finds `fine` groups (at most a third of the samples), then k clusters of whole groups:
    a group goes to the nearest cluster that has room for it, those first that would lose most. A
    cluster holds at most balance * n / k samples and one group more. Fine groups keep what looks
    alike together, which balancing single samples would not.
    Raises UsageError when there are fewer samples, or fewer different ones, than clusters.
    Source: McAllister et al. 2025, section 4.1 (arXiv 2501.05450).

    >>> partition(np.array([[0.0], [0.1], [9.0], [9.1], [0.2], [9.2]]), 2).tolist() in (
    ...     [0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0])
    True
    """
    count = len(features)
    if not 1 <= k <= count:
        raise UsageError(f"partition: {k} clusters of {count} samples; need 1 to all of them")
    if fine < k or not 1.0 <= balance < float("inf"):
        raise UsageError(
            f"partition: fine={fine}, balance={balance}; need as many fine groups as clusters "
            f"({k}) or more, and a balance of 1 or more"
        )
    if k == 1:
        return np.zeros(count, np.int64)
    flat = np.ascontiguousarray(features.reshape(count, -1), np.float64)
    group, centers = _groups(flat, min(fine, max(k, count // 3)), seed)
    if len(centers) < k:
        raise UsageError(
            f"partition: {len(centers)} different samples for {k} clusters (fewer clusters)"
        )
    sizes = np.bincount(group, minlength=len(centers))
    return _coarse(centers, sizes, k, balance * count / k, seed)[group]


def _groups(flat: np.ndarray, fine: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each sample, centers of the groups); no group is empty."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    different = len(np.unique(flat, axis=0))
    means = KMeans(min(fine, different), n_init=1, random_state=_state(seed, "fine"))
    # With one thread sums have one order, and equal seeds give equal groups.
    with threadpool_limits(1):
        labels = means.fit(flat).labels_
    used, group = np.unique(labels, return_inverse=True)
    return group.astype(np.int64), means.cluster_centers_[used]


def _coarse(centers: np.ndarray, sizes: np.ndarray, k: int, room: float, seed: int) -> np.ndarray:
    """The cluster of each group."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    means = KMeans(k, n_init=4, random_state=_state(seed, "coarse"))
    with threadpool_limits(1):
        middle = means.fit(centers, sample_weight=sizes).cluster_centers_
    place = np.full(len(centers), -1)
    for _ in range(SWEEPS):
        before, place = place, _placed(centers, sizes, middle, room)
        if np.array_equal(before, place):
            break
        middle = np.stack(
            [np.average(centers[place == j], axis=0, weights=sizes[place == j]) for j in range(k)]
        )
    return place


def _placed(centers: np.ndarray, sizes: np.ndarray, middle: np.ndarray, room: float) -> np.ndarray:
    """Groups to clusters with room, those first that gain most by being first; none stays empty."""
    apart = np.square(centers[:, None] - middle[None]).sum(-1)
    two = np.sort(apart, axis=1)[:, :2]
    place = np.full(len(centers), -1)
    load = np.zeros(len(middle))
    for i in np.argsort(two[:, 0] - two[:, 1], kind="stable"):
        open_ = load + sizes[i] <= room
        # Without room anywhere the emptiest takes it: by at most this group it is too full.
        j = int(np.where(open_, apart[i], np.inf).argmin()) if open_.any() else int(load.argmin())
        place[i] = j
        load[j] += sizes[i]
    for j in np.flatnonzero(np.bincount(place, minlength=len(middle)) == 0):
        many = np.bincount(place, minlength=len(middle))[place] > 1
        nearest = int(np.where(many, apart[:, j], np.inf).argmin())
        place[nearest] = j
    return place


def _state(seed: int, word: str) -> int:
    return keyed.fold(0, seed, "partition", word) % (1 << 31)
