"""Identifiers that every layer shares."""

from __future__ import annotations

from typing import NewType

PeerId = NewType("PeerId", int)
"""Dense 0..n-1 in simulation and under `shoal up`; 63 bits of a key's fingerprint elsewhere."""

Tag = tuple[int | str, ...]
"""What distinguishes messages of one kind, such as `(round,)`; compared lexicographically."""


class _Any:
    """Matches every tag."""

    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()
