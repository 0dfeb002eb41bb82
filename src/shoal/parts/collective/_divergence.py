"""Peers that wait for different things, none of which can happen."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

Wait = tuple[str, int | str]
"""("vote", label) or ("call", its name)."""

OF_A_GROUP = ("sync", "synced")
"""Joint calls that do not wait for other groups."""


def diverged(waits: Mapping[int, frozenset[Wait]], group_of: Mapping[int, int]) -> set[int]:
    """Which of those who have long waited wait for ever.

    waits: what each of them waits for (it goes on when any of it happens). Two peers of a group
    that have nothing in common both wait for the other. Peers of different groups do so only where
    both wait for everybody, for different calls: votes and states are a group's own, and its other
    members may still be at work.

    >>> votes, call = frozenset({("vote", 0)}), frozenset({("call", "update_topology")})
    >>> diverged({1: votes, 2: call}, {1: 0, 2: 0})
    {1, 2}
    >>> diverged({1: votes, 2: call}, {1: 0, 2: 1})
    set()
    """
    stuck: set[int] = set()
    for a, b in combinations(sorted(waits), 2):
        if waits[a] & waits[b]:
            continue
        mine = group_of[a] == group_of[b]
        if mine or (_of_all(waits[a]) and _of_all(waits[b])):
            stuck |= {group_of[a], group_of[b]}
    return {peer for peer in waits if group_of[peer] in stuck}


def _of_all(waits: frozenset[Wait]) -> bool:
    return all(kind == "call" and name not in OF_A_GROUP for kind, name in waits)
