"""Identifiers that every layer shares."""

from __future__ import annotations

from typing import NewType

PeerId = NewType("PeerId", int)
"""A peer's number, 0..n-1: its row in everything that is stacked over peers."""

Tag = tuple[int | str, ...]
"""What distinguishes messages of one kind, such as `(round,)`; compared lexicographically."""


class _Any:
    """Matches every tag."""

    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()
